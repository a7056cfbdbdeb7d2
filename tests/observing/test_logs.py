"""`ctxdb_core.logs`: the log records of units of work, and their fields."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tests.support.database import Database, insert_row_that_fails_at_commit

from ctxdb_core import DBConnect, db_session, new_db_ctx, new_non_ctx_session
from ctxdb_core.adapters import running_unit
from ctxdb_core.logs import UnitFields, add_unit_fields, log_units
from ctxdb_starlette import DBSessionMiddleware

SELECT = text("SELECT 1")


class Records(logging.Handler):
    """A handler that keeps the records that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def records_of(name: str) -> Iterator[list[Any]]:
    logger, handler = logging.getLogger(name), Records()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler.records
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@pytest.fixture
async def logged(db: DBConnect) -> AsyncIterator[list[Any]]:
    stop = log_units(db)
    with records_of("ctxdb.units") as records:
        yield records
    stop()


async def test_a_unit_is_logged_with_its_id_outcome_and_hold_time(db: DBConnect, logged: list[Any]) -> None:
    async with new_db_ctx():
        await (await db_session(db)).execute(SELECT)
        unit = running_unit()
        assert unit is not None
    (record,) = logged
    assert (record.ctxdb_unit, record.ctxdb_outcome, record.ctxdb_transactions) == (unit.id, "committed", 1)
    assert 0 < record.ctxdb_held <= record.ctxdb_duration
    assert record.ctxdb_request is None
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(f"unit {unit.id}: committed, held a connection for ")


async def test_a_failed_commit_is_a_warning(db: DBConnect, logged: list[Any]) -> None:
    with pytest.raises(DBAPIError):
        async with new_db_ctx():
            await insert_row_that_fails_at_commit(db)
    (record,) = logged
    assert (record.levelno, record.ctxdb_outcome) == (logging.WARNING, "commit_failed")


async def test_a_request_is_logged_with_its_line_and_status(db: DBConnect, logged: list[Any]) -> None:
    async def refuse(request: Request) -> Response:
        await (await db_session(db)).execute(SELECT)
        return PlainTextResponse("no", 409)

    app = Starlette(routes=[Route("/refuse", refuse)])
    app.add_middleware(DBSessionMiddleware)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/refuse?token=secret")
    (record,) = logged
    assert (record.ctxdb_request, record.ctxdb_status) == ("GET /refuse", 409)
    assert record.ctxdb_outcome == "rolled_back"


async def test_a_transaction_outside_of_units_is_logged_by_itself(db: DBConnect, logged: list[Any]) -> None:
    async with new_non_ctx_session(db) as session:
        await session.execute(SELECT)
        await session.commit()
    (record,) = logged
    assert (record.ctxdb_unit, record.ctxdb_outcome) == (None, "committed")


async def test_a_warning_of_ctxdb_has_the_unit_and_the_hold_time(database: Database) -> None:
    with records_of("ctxdb") as records:
        async with (
            DBConnect.from_url(database.url, warn_connection_held_after=0) as strict,
            new_db_ctx(),
        ):
            await (await db_session(strict)).execute(SELECT)
            unit = running_unit()
            assert unit is not None
            unit_id = unit.id
            (record,) = records
    assert record.ctxdb_unit == unit_id
    assert record.ctxdb_held > 0


async def test_records_of_the_application_have_the_unit_by_a_filter(db: DBConnect) -> None:
    handler = Records()
    handler.addFilter(UnitFields())
    logger = logging.getLogger("tests.of.an.application")
    logger.addHandler(handler)
    logger.warning("outside")
    async with new_db_ctx():
        logger.warning("inside")
        unit = running_unit()
        assert unit is not None
        expected = unit.id
    logger.warning("given", extra={"ctxdb_unit": "another"})
    logger.removeHandler(handler)
    assert [record.ctxdb_unit for record in handler.records] == [None, expected, "another"]


async def test_structlog_shows_the_fields_of_its_own_events_and_of_the_standard_library(db: DBConnect) -> None:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer(),
            ],
        )
    )  # fmt: skip
    logger = logging.getLogger("ctxdb.units")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    own = structlog.wrap_logger(structlog.PrintLogger(output), [add_unit_fields, structlog.processors.JSONRenderer()])
    stop = log_units(db)
    try:
        async with new_db_ctx():
            own.info("working")
            await (await db_session(db)).execute(SELECT)
    finally:
        stop()
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    working, ended = map(json.loads, output.getvalue().splitlines())
    assert working["ctxdb_unit"] == ended["ctxdb_unit"]
    assert ended["ctxdb_outcome"] == "committed"
    assert ended["ctxdb_held"] > 0
