"""`ctxdb_core.prometheus`: the metrics, and the Grafana dashboard that shows them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from tests.support.dashboards import assert_panels_do_not_overlap, expressions_of, needs
from tests.support.database import Database, insert_row_that_fails_at_commit

from ctxdb_core import DBConnect, db_session, new_db_ctx
from ctxdb_core.prometheus import instrument

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboard.json"
METRIC = re.compile(r"\bctxdb_\w+")
SELECT = text("SELECT 1")


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def url_db(database: Database, registry: CollectorRegistry) -> AsyncIterator[DBConnect]:
    async with DBConnect.from_url(database.url, pool_size=2, max_overflow=1) as db:
        instrument(db, registry=registry)
        yield db


async def test_the_metrics_hold_the_figures_of_pools_and_units(registry: CollectorRegistry, url_db: DBConnect) -> None:
    async with new_db_ctx():
        await (await db_session(url_db)).execute(SELECT)
        (pool,) = url_db.status().pools
        assert registry.get_sample_value("ctxdb_pool_connections", {"pool": pool.name, "state": "in_use"}) == 1
        assert registry.get_sample_value("ctxdb_units_open") == 1
        assert (registry.get_sample_value("ctxdb_unit_oldest_seconds") or 0) > 0
    assert registry.get_sample_value("ctxdb_pool_connections", {"pool": pool.name, "state": "idle"}) == 1
    assert registry.get_sample_value("ctxdb_pool_connections_limit", {"pool": pool.name}) == 3
    assert registry.get_sample_value("ctxdb_pool_waiting", {"pool": pool.name}) == 0
    assert registry.get_sample_value("ctxdb_units_open") == 0
    assert registry.get_sample_value("ctxdb_unit_duration_seconds_count", {"outcome": "committed"}) == 1
    for name in ("create", "use", "wait"):
        assert registry.get_sample_value(f"ctxdb_connection_{name}_seconds_count", {"pool": pool.name}) == 1


async def test_the_metrics_count_transactions_by_their_outcomes(registry: CollectorRegistry, url_db: DBConnect) -> None:
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            await insert_row_that_fails_at_commit(url_db)
    with pytest.raises(LookupError):
        async with new_db_ctx():
            await (await db_session(url_db)).execute(SELECT)
            raise LookupError
    for outcome, count in {"commit_failed": 1, "rolled_back": 1, "committed": None}.items():
        labels = {"host": url_db.host or "", "outcome": outcome}
        assert registry.get_sample_value("ctxdb_transaction_duration_seconds_count", labels) == count


async def test_the_metrics_are_unregistered_at_the_end_of_the_instrumentation(
    database: Database, registry: CollectorRegistry
) -> None:
    async with DBConnect.from_url(database.url) as db:
        stop = instrument(db, registry=registry)
        with pytest.raises(ValueError, match="Duplicated"):
            instrument(db, registry=registry)
        stop()
        assert generate_latest(registry) == b""
        instrument(db, registry=registry)


async def test_prometheus_accepts_the_metrics(registry: CollectorRegistry, url_db: DBConnect) -> None:
    promtool = needs("promtool")
    async with new_db_ctx():
        await (await db_session(url_db)).execute(SELECT)
    content = generate_latest(registry)
    subprocess.run([promtool, "check", "metrics"], input=content, check=True, capture_output=True)


# --- the dashboard ----------------------------------------------------------------------------------------------------


async def test_every_metric_that_the_dashboard_names_exists_and_is_shown(
    registry: CollectorRegistry, url_db: DBConnect
) -> None:
    async with new_db_ctx():
        await (await db_session(url_db)).execute(SELECT)
    told = {
        line.split(" ")[2] + suffix
        for line in generate_latest(registry).decode().splitlines()
        if line.startswith("# TYPE ")
        for suffix in (("_bucket", "_count", "_sum") if line.endswith(" histogram") else ("",))
        if not line.split(" ")[2].endswith("_created")
    }
    named = {name for expression in expressions_of(DASHBOARD) for name in METRIC.findall(expression)}
    assert named - told == set()
    # The dashboard shows each metric.
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in told}
    assert families == {re.sub("_(bucket|count|sum)$", "", name) for name in named}


def test_the_panels_of_the_dashboard_are_told_apart_and_do_not_overlap() -> None:
    assert_panels_do_not_overlap(DASHBOARD)
