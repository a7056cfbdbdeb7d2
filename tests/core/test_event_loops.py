"""Units of work and sessions that are found on another event loop of their thread: in a fork, in an inner loop."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import warnings
from asyncio import _get_running_loop, _set_running_loop  # for implementers of event loops
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import pytest
from sqlalchemy import text
from tests.support.connection import BODY, START, Connection
from tests.support.database import Database, insert

from ctxdb_core import ContextNotInitiatedError, DBConnect, db_session, new_db_ctx
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware, Receive, Scope, Send

Work: TypeAlias = Callable[[], Awaitable[object]]

_PATIENCE_SECONDS = 10
"""A forked process that hangs is ended after this time."""


async def _outcome(work: Work) -> str:
    try:
        await work()
    except ContextNotInitiatedError:
        return "refused"
    return "done"


def _in_a_forked_process(work: Work) -> str:
    """Run `work` on a loop of its own in a new process, as `multiprocessing` does by ``fork``; say what came of it."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Threads of other tests may be at work (Python 3.12 warns of them).
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_PATIENCE_SECONDS)
            os.write(writing, asyncio.run(_outcome(work)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        outcome = pipe.read()
    os.waitpid(child, 0)
    return outcome


def _in_an_inner_loop(work: Work) -> str:
    """Run `work` on a loop of its own inside of the running task, as nest_asyncio lets code do; say what came of it."""
    outer = _get_running_loop()
    _set_running_loop(None)
    try:
        with asyncio.Runner() as runner:
            return runner.run(asyncio.wait_for(_outcome(work), _PATIENCE_SECONDS))
    finally:
        _set_running_loop(outer)


ELSEWHERE = pytest.mark.parametrize(
    "elsewhere",
    [
        pytest.param(
            _in_a_forked_process,
            marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes"),
            id="forked process",
        ),
        pytest.param(
            _in_an_inner_loop,
            marks=pytest.mark.skipif(sys.version_info >= (3, 14), reason="asyncio itself refuses inner loops"),
            id="inner loop",
        ),
    ],
)


@ELSEWHERE
@pytest.mark.parametrize("database_kind", ["asyncpg", "psycopg", "sqlite"], indirect=True)
async def test_a_session_is_refused_on_another_event_loop_of_its_thread(
    db: DBConnect, elsewhere: Callable[[Work], str]
) -> None:
    async with new_db_ctx():
        session = await db_session(db)
        assert (await session.execute(text("SELECT 1"))).scalar_one() == 1

        async def use() -> None:
            await session.execute(text("SELECT 2"))

        assert elsewhere(use) == "refused"
        assert elsewhere(session.commit) == "refused"
        assert (await session.execute(text("SELECT 3"))).scalar_one() == 3


@ELSEWHERE
@pytest.mark.parametrize("has_session", [False, True], ids=["no session yet", "a session"])
async def test_a_request_is_not_joined_from_another_event_loop_of_its_thread(
    db: DBConnect, database: Database, elsewhere: Callable[[Work], str], *, has_session: bool
) -> None:
    outcomes: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if has_session:
            await insert(db, "before")
        outcomes.append(elsewhere(lambda: insert(db, "elsewhere")))
        await insert(db, "request")
        await send(START)
        await send(BODY)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert outcomes == ["refused"]
    assert connection.sent == [START, BODY]
    assert await database.names() == (["before", "request"] if has_session else ["request"])
