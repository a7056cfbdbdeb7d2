"""The sidecar answers as pg-status does: by a table of answers in `answers_of_pg_status.txt`."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.server import http_client
from tests.support.sidecar import app_of_hosts, cluster, dead, master, replica, serve_sidecar

from ctxdb_pgstatus import HostStatus
from ctxdb_pgstatus.locality import Locality
from ctxdb_pgstatus.lsn import parse_lsn
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.sidecar.settings import Settings

TABLE = Path(__file__).with_name("answers_of_pg_status.txt")
# The default limits of pg-status.
MAX_LAG_MS, MAX_LAG_BYTES = 1000, 1_000_000


@dataclass(frozen=True)
class State:
    """A state of a cluster, and the answers in it."""

    title: str
    lines: tuple[str, ...]
    answers: dict[str, str]


def read_table() -> list[State]:
    states = []
    for block in TABLE.read_text(encoding="utf-8").split("\n== ")[1:]:
        described, _, answered = block.strip().partition("\n--\n")
        title, *lines = described.split("\n")
        answers = dict(_split(line) for line in answered.split("\n"))
        states.append(State(title, tuple(lines), answers))
    return states


def _split(line: str) -> tuple[str, str]:
    question, _, answer = line.partition("  ")
    return question, answer.strip()


STATES = read_table()
CASES = [
    pytest.param(state, question, id=f"{state.title}: {question}") for state in STATES for question in state.answers
]


def an_app(state: State) -> SidecarApp:
    """Return the application of a sidecar that knows a state."""
    current_dc = current_geo = None
    hosts: list[HostStatus] = []
    places: dict[str, dict[str, str | None]] = {"dc": {}, "geo": {}}
    for line in state.lines:
        first, *rest = line.split()
        if first == "not":
            return SidecarApp(History())
        if first == "in":
            current_dc, current_geo = rest
            continue
        values = dict(each.split("=", 1) for each in rest if "=" in each)
        for kind, place in places.items():
            place[first] = values.get(kind)
        hosts.append(_host(first, rest, values))
    locality = Locality(places["dc"], places["geo"], current_dc, current_geo)
    the_master = next((host.host for host in hosts if host.role == "master"), None)
    app, monitor = app_of_hosts(locality=locality)
    monitor.status = cluster(*hosts, master=the_master)
    return app


def _host(name: str, words: list[str], values: dict[str, str]) -> HostStatus:
    if "dead" in words:
        return dead(name)
    position = parse_lsn(values["lsn"])
    if "master" in words:
        return master(name, position=position, possible_dead="possible_dead" in words)
    lag_ms, lag_bytes = int(values["ms"]), int(values["bytes"])
    return replica(
        name,
        position=position,
        lag_ms=lag_ms,
        lag_bytes=lag_bytes,
        in_sync_by_time=lag_ms <= MAX_LAG_MS,
        in_sync_by_bytes=lag_bytes <= MAX_LAG_BYTES,
        possible_dead="possible_dead" in words,
    )


@pytest.fixture
async def client(state: State) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_sidecar(an_app(state)) as url, http_client(url) as client:
        yield client


def test_the_table_has_20_states_and_14_questions() -> None:
    assert len(STATES) == 20
    assert {len(state.answers) for state in STATES} == {14}
    assert len({tuple(state.answers) for state in STATES}) == 1


@pytest.mark.parametrize(("state", "question"), CASES)
async def test_the_sidecar_answers_as_pg_status_does(state: State, question: str, client: httpx.AsyncClient) -> None:
    path, _, as_json = question.partition(" as ")
    headers = {"accept": "application/json"} if as_json else {}
    status, _, expected = state.answers[question].partition(" ")
    response = await client.get(path, headers=headers)
    assert response.status_code == int(status)
    if not expected:
        # If /status is asked for an unknown host, pg-status answers an empty body, and the sidecar an error text.
        assert response.text == (
            "" if not path.startswith("/status") else '{"error_text":"This host is not monitored"}'
        )
        return
    if expected.startswith(("{", "[")):
        assert_has(response.json(), json.loads(expected))
        return
    # Several hosts in one answer of the table take turns.
    hosts = expected.split()
    answers = Counter([response.text, *[(await client.get(path)).text for _ in range(2 * len(hosts) - 1)]])
    assert answers == dict.fromkeys(hosts, 2)


def assert_has(content: Any, expected: Any) -> None:
    """Assert that `content` is as expected. Its objects may have further members."""
    if isinstance(expected, list):
        assert len(content) == len(expected)
        for each, wanted in zip(content, expected, strict=True):
            assert_has(each, wanted)
    else:
        assert {name: content.get(name, "missing") for name in expected} == expected


# --- defaults ---------------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).parents[2] / "docs" / "deploying-pgstatus.md"
# The defaults that the documentation of pg-status 2.3 names.
DEFAULTS_OF_PG_STATUS = {
    "pg_user": "postgres",
    "pg_database": "postgres",
    "pg_port": "5432",
    "max_fails": "3",
    "sleep_ms": "1000",
    "query_timeout_ms": "1000",
    "conn_max_age_ms": "300000",
    "sync_max_lag_ms": "1000",
    "sync_max_lag_bytes": "1000000",
    "http_listen_address": "0.0.0.0",
    "http_port": "8000",
    "log_level": "info",
    "log_format": "text",
}


def test_every_default_that_differs_from_that_of_pg_status_stands_in_the_table_of_the_guide() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `?([^|`]+)`? \| `?([^|`]+)`? \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE
    )
    told = {name: (theirs, ours) for name, theirs, ours in rows if name in DEFAULTS_OF_PG_STATUS}
    settings = Settings.from_environment({"pg_status__hosts": "n1"})
    ours = {
        "pg_user": settings.user,
        "pg_database": settings.database,
        "pg_port": str(settings.hosts[0].port),
        "max_fails": str(settings.max_fails),
        "sleep_ms": f"{settings.poll_interval * 1000:.0f}",
        "query_timeout_ms": f"{settings.connect_timeout * 1000:.0f}",
        "conn_max_age_ms": f"{settings.conn_max_age * 1000:.0f}",
        "sync_max_lag_ms": str(settings.sync_max_lag_ms),
        "sync_max_lag_bytes": str(settings.sync_max_lag_bytes),
        "http_listen_address": settings.listen_address,
        "http_port": str(settings.listen_port),
        "log_level": logging.getLevelName(settings.log_level).lower(),
        "log_format": settings.log_format,
    }
    assert told == {
        name: (theirs, ours[name]) for name, theirs in DEFAULTS_OF_PG_STATUS.items() if theirs != ours[name]
    }
