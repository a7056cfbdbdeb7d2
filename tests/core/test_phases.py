"""The phases of a request: each transition of the table, and each end, through the ASGI middleware."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from tests.support.connection import BODY, START, Connection
from tests.support.database import Database, eventually, insert, insert_row_that_fails_at_commit
from tests.support.phases import ShownTransitions

from ctxdb_core import (
    AbandonedWorkError,
    ContextClosedError,
    DBConnect,
    StatementInterruptedError,
    db_session,
    on_commit,
)
from ctxdb_core._units import session_end
from ctxdb_core.adapters import FINISHING, TRANSITIONS, IllegalTransitionError, Phase, check_transition
from ctxdb_core.asgi import ASGIApp, ASGIHTTPDBSessionMiddleware, ASGIStreamBoundary, Message, Receive, Scope, Send

CHUNK: Message = {**BODY, "more_body": True}
ERROR: Message = {**START, "status": 503}
TRAILERS: Message = {"type": "http.response.trailers", "headers": []}

ROWS = [(current, following) for current in Phase for following in Phase if following in TRANSITIONS[current]]

shows = ShownTransitions()


class Trace:
    """The phases that an exchange passes through, as far as its application can see them."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.exchange: Any = None

    def note(self, scope: Scope | None = None) -> None:
        if scope is not None:
            self.exchange = scope["ctxdb.unit_of_work"]
        if not self.phases or self.phases[-1] is not self.exchange.phase:
            self.phases.append(self.exchange.phase)

    def around(self, app: ASGIApp) -> ASGIApp:
        """Return `app`, with a look at the phase whenever it begins, sends something, or ends."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            async def noting(message: Message) -> None:
                self.note()
                try:
                    await send(message)
                finally:
                    self.note()

            self.note(scope)
            try:
                await app(scope, receive, noting)
            finally:
                self.note()

        return traced


class Answering(ASGIHTTPDBSessionMiddleware):
    """Answers a refused response by a 409."""

    async def answer_error(
        self, error: Exception, scope: Scope, receive: Receive, send: Send, root_app: object
    ) -> None:
        await send({**START, "status": 409})
        await send(BODY)


def told(connection: Connection) -> list[object]:
    """Return the statuses and bodies that were sent."""
    return [message.get("status", message.get("body", message["type"])) for message in connection.sent]


def holding_back(app: ASGIApp, instead: Callable[[Message, Send], Awaitable[None]]) -> ASGIApp:
    """Return `app` beneath a boundary and a middleware that does something else with its messages."""
    boundary = ASGIStreamBoundary(app)

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        async def replace(message: Message) -> None:
            await instead(message, send)

        await boundary(scope, receive, replace)

    return middleware


def sending_start_with_first_part(
    app: ASGIApp,
    before: Callable[[], Awaitable[object]] | None = None,
    after: Callable[[], Awaitable[object]] | None = None,
) -> ASGIApp:
    """Return `app` beneath a middleware that holds its start back until the first part of its body.

    Args:
        app: the application, with a boundary around it.
        before: awaited by the middleware right before it sends the start.
        after: awaited by it right after that.
    """
    held: list[Message] = []

    async def hold(message: Message, send: Send) -> None:
        held.append(message)
        if message is CHUNK:
            for step in (before, lambda: send(held[0]), after):
                if step is not None:
                    await step()
        if message is not START:
            await send(message)

    return holding_back(app, hold)


# --- the rows of the table --------------------------------------------------------------------------------------------


@shows(Phase.HANDLING, Phase.BODY)
async def test_a_response_that_is_let_through_is_in_its_body(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send(START)
        assert await database.names() == ["response"]

    trace = Trace()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.BODY]
    assert told(connection) == [200]


@shows(Phase.BODY, Phase.AFTER)
async def test_the_last_chunk_of_a_body_commits_its_work(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        session = await insert(db, "body")
        # A result that the body has left open keeps nothing from being committed.
        await session.stream(text("SELECT generate_series(1, 5000)"))
        await send(CHUNK)
        assert await database.names() == []
        await send(BODY)
        assert await database.names() == ["body"]

    trace = Trace()
    await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.BODY, Phase.AFTER]


@shows(Phase.HANDLING, Phase.REFUSED)
async def test_a_response_whose_commit_fails_is_refused(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        await send(START)

    trace = Trace()
    connection = Connection()
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.REFUSED]
    assert connection.sent == []


@shows(Phase.REFUSED, Phase.HANDLING)
async def test_the_error_of_a_refused_response_is_answered(db: DBConnect, database: Database) -> None:
    class Tracing(Answering):
        async def answer_error(
            self, error: Exception, scope: Scope, receive: Receive, send: Send, root_app: object
        ) -> None:
            trace.note()
            await insert(db, "lost with the 409")
            await super().answer_error(error, scope, receive, send, root_app)
            trace.note()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        await send(START)

    trace = Trace()
    connection = await Connection().run(Tracing(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.REFUSED, Phase.HANDLING, Phase.AFTER]
    assert told(connection) == [409, b"body"]
    assert await database.names() == []


async def test_an_answer_that_is_refused_as_well_has_no_answer(db: DBConnect) -> None:
    class Failing(Answering):
        async def answer_error(
            self, error: Exception, scope: Scope, receive: Receive, send: Send, root_app: object
        ) -> None:
            answers.append(error)
            await insert_row_that_fails_at_commit(db)
            await send(START)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        await send(START)

    answers: list[Exception] = []
    connection = Connection()
    with pytest.raises(IntegrityError) as caught:
        await connection.run(Failing(app))
    assert connection.sent == []
    assert len(answers) == 1
    assert caught.value is not answers[0]


@shows(Phase.HANDLING, Phase.ABANDONED)
async def test_a_handler_in_whose_place_a_middleware_answers_is_abandoned(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        at_work.set()
        await answered.wait()
        with pytest.raises(ContextClosedError):
            await insert(db, "handler")

    async def give_up(scope: Scope, receive: Receive, send: Send) -> None:
        call = asyncio.create_task(boundary(scope, receive, send))
        await at_work.wait()
        await insert(db, "middleware")
        await send(START)
        assert await database.names() == ["middleware"]
        answered.set()
        await call

    at_work, answered = asyncio.Event(), asyncio.Event()
    boundary = ASGIStreamBoundary(app)
    trace = Trace()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(give_up)))
    assert trace.phases == [Phase.HANDLING, Phase.ABANDONED]
    assert told(connection) == [200]


@shows(Phase.ABANDONED, Phase.REFUSED)
@pytest.mark.parametrize("reason", ["the commit fails", "the work of both cannot be told apart"])
async def test_an_answer_in_the_place_of_a_handler_is_refused_like_any_other(
    db: DBConnect, database: Database, reason: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if reason != "the commit fails":
            await insert(db, "handler")
        at_work.set()
        await asyncio.Event().wait()

    async def give_up(scope: Scope, receive: Receive, send: Send) -> None:
        call = asyncio.create_task(boundary(scope, receive, send))
        await at_work.wait()
        await insert_row_that_fails_at_commit(db)
        trace.note(scope)
        try:
            await send(START)
        finally:
            trace.note()
            call.cancel()
            with suppress(asyncio.CancelledError):
                await call

    async def before_commit(session: object) -> None:
        trace.note()

    at_work = asyncio.Event()
    boundary = ASGIStreamBoundary(app)
    trace = Trace()
    connection = Connection()
    expected = IntegrityError if reason == "the commit fails" else AbandonedWorkError
    with pytest.raises(expected):
        await connection.run(ASGIHTTPDBSessionMiddleware(give_up, before_commit))
    # ctxdb does not try to commit work whose authors cannot be told apart: `before_commit` is not asked.
    assert trace.phases[-1] is Phase.REFUSED
    if reason == "the commit fails":
        assert trace.phases == [Phase.HANDLING, Phase.ABANDONED, Phase.REFUSED]
    assert connection.sent == []
    assert await database.names() == []


@shows(Phase.HANDLING, Phase.AHEAD)
@shows(Phase.AHEAD, Phase.BODY)
@pytest.mark.parametrize("body_is_quick", [False, True])
async def test_a_streamed_body_may_run_ahead_of_its_start(
    db: DBConnect, database: Database, body_is_quick: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send(START)
        if body_is_quick:
            await insert(db, "body")
        await send(CHUNK)
        await send(BODY)

    held: list[Message] = []

    async def hold(message: Message, send: Send) -> None:
        trace.note()
        held.append(message)
        if len(held) == 1:
            assert await database.names() == ["response"]
        elif len(held) == 2:
            if not body_is_quick:
                await insert(db, "middleware")
            await send(held[0])
            # What the body has open is not committed with its start; what a middleware has done meanwhile is.
            assert await database.names() == (["response"] if body_is_quick else ["middleware", "response"])
            await send(held[1])
        else:
            await send(message)

    trace = Trace()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(holding_back(app, hold))))
    assert trace.phases == [Phase.HANDLING, Phase.AHEAD, Phase.BODY, Phase.AFTER]
    assert told(connection) == [200, b"body", b"body"]
    assert await database.names() == (["body", "response"] if body_is_quick else ["middleware", "response"])


@shows(Phase.AHEAD, Phase.REFUSED)
async def test_a_start_for_which_a_middlewares_work_cannot_be_committed_is_refused(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send(START)

    async def audit(message: Message, send: Send) -> None:
        trace.note()
        await insert_row_that_fails_at_commit(db)
        with pytest.raises(IntegrityError):
            await send(message)
        await send(CHUNK)

    trace = Trace()
    connection = await Connection().run(Answering(trace.around(holding_back(app, audit))))
    assert trace.phases == [Phase.HANDLING, Phase.AHEAD, Phase.REFUSED]
    assert told(connection) == [409, b"body"]
    # The response's own work was committed where its body began.
    assert await database.names() == ["response"]


@shows(Phase.AHEAD, Phase.ABANDONED)
@pytest.mark.parametrize("handler_writes", [False, True])
async def test_a_middleware_may_give_up_on_a_second_call_beside_a_stream_that_it_drops(
    db: DBConnect, database: Database, handler_writes: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            await send({**START, "status": 500})
            await send(BODY)
            streamed.set()
        else:
            if handler_writes:
                await insert(db, "handler")
            at_work.set()
        await asyncio.Event().wait()

    async def retry(scope: Scope, receive: Receive, send: Send) -> None:
        async def drop(message: Message) -> None:
            trace.note()

        trace.note(scope)
        calls = [asyncio.create_task(boundary(scope, receive, drop))]
        await streamed.wait()
        calls.append(asyncio.create_task(boundary(scope, receive, drop)))
        await at_work.wait()
        if not handler_writes:
            await insert(db, "middleware")
        await send(START)
        await send(BODY)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)

    attempts: list[int] = []
    streamed, at_work = asyncio.Event(), asyncio.Event()
    boundary = ASGIStreamBoundary(app)
    trace = Trace()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(retry)))
    assert trace.phases == [Phase.HANDLING, Phase.AHEAD, Phase.ABANDONED]
    assert told(connection) == [200, b"body"]
    assert await database.names() == ([] if handler_writes else ["middleware"])


@shows(Phase.AHEAD, Phase.HANDLING)
@pytest.mark.parametrize(
    ("status", "commit_fails", "answer", "names"),
    [(200, False, 200, ["response"]), (200, True, 409, []), (503, False, 503, [])],
)
async def test_a_second_call_after_a_stream_that_was_dropped_is_ended_before_its_start(
    db: DBConnect, database: Database, status: int, commit_fails: bool, answer: int, names: list[str]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        trace.note()
        attempts.append(len(attempts))
        if len(attempts) == 1:
            await send(START)
            await insert(db, "dropped")
            raise LookupError
        await (insert_row_that_fails_at_commit(db) if commit_fails else insert(db, "response"))
        await send({**START, "status": status, "headers": [(b"content-length", b"4")]})
        seen.append(await database.names())
        await send(BODY)

    async def retry(scope: Scope, receive: Receive, send: Send) -> None:
        async def drop(message: Message) -> None:
            trace.note()

        trace.note(scope)
        with pytest.raises(LookupError):
            await boundary(scope, receive, drop)
        await boundary(scope, receive, send)

    attempts: list[int] = []
    seen: list[list[str]] = []
    boundary = ASGIStreamBoundary(app)
    trace = Trace()
    connection = await Connection().run(Answering(trace.around(retry)))
    assert trace.phases[:3] == [Phase.HANDLING, Phase.AHEAD, Phase.HANDLING]
    assert told(connection) == [answer, b"body"]
    assert seen == ([] if commit_fails else [names])
    assert await database.names() == names


async def test_a_second_call_after_a_stream_that_was_cut_off_and_dropped_leaves_nothing_open(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send(START)
            await insert(db, "dropped")
            await send(CHUNK)
            await asyncio.Event().wait()

        if not chunk_dropped.is_set():
            streaming = asyncio.create_task(stream())
            await chunk_dropped.wait()
            streaming.cancel()
            await asyncio.wait([streaming])
            return
        await send(START)
        assert database.checked_out == 0
        await send(BODY)

    async def retry(scope: Scope, receive: Receive, send: Send) -> None:
        async def drop(message: Message) -> None:
            if message is CHUNK:
                chunk_dropped.set()

        await boundary(scope, receive, drop)
        await boundary(scope, receive, send)

    chunk_dropped = asyncio.Event()
    boundary = ASGIStreamBoundary(app)
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(retry))
    assert told(connection) == [200, b"body"]
    assert await database.names() == []


@pytest.mark.parametrize("commit_fails", [False, True])
async def test_a_success_whose_start_was_held_back_until_its_body_was_made_waits_for_the_commit_of_it_all(
    db: DBConnect, database: Database, commit_fails: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await (insert_row_that_fails_at_commit(db) if commit_fails else insert(db, "body"))
        await send(CHUNK)
        await send(BODY)

    held: list[Message] = []

    async def hold(message: Message, send: Send) -> None:
        held.append(message)
        if message is BODY:
            await send(held[0])
            assert await database.names() == ["body"]
            assert database.checked_out == 0
            for each in held[1:]:
                await send(each)

    connection = await Connection().run(Answering(holding_back(app, hold)))
    assert told(connection) == ([409, b"body"] if commit_fails else [200, b"body", b"body"])


@pytest.mark.parametrize(
    ("start", "commit_fails", "answer", "names"),
    [(START, False, 200, ["body"]), (START, True, 409, []), (ERROR, False, 503, ["body"])],
)
async def test_a_start_that_was_held_back_until_its_handler_had_returned_is_sent_with_the_work_of_the_body(
    db: DBConnect, database: Database, start: Message, commit_fails: bool, answer: int, names: list[str]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        await (insert_row_that_fails_at_commit(db) if commit_fails else insert(db, "body"))
        await send(CHUNK)

    async def hold(scope: Scope, receive: Receive, send: Send) -> None:
        async def keep(message: Message) -> None:
            held.append(message)

        await ASGIStreamBoundary(app)(scope, receive, keep)
        for each in held:
            await send(each)

    held: list[Message] = []
    connection = await Connection().run(Answering(hold))
    assert told(connection) == [answer, b"body"]
    assert await database.names() == names


async def test_an_error_whose_start_was_held_back_leaves_no_connection_to_a_body_that_has_only_read(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ERROR)
        await (await db_session(db)).execute(text("SELECT 1"))
        await send(BODY)

    async def hold(message: Message, send: Send) -> None:
        if message is BODY:
            await send(ERROR)
            assert database.checked_out == 0
            await send(BODY)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(holding_back(app, hold)))
    assert told(connection) == [503, b"body"]


async def test_a_body_that_only_reads_stays_in_its_transaction_while_its_start_is_sent(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        session = await db_session(db)
        async with session.begin():
            for message in (CHUNK, BODY):
                began.append(await session.scalar(text("SELECT now()")))
                await send(message)

    began: list[object] = []
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(sending_start_with_first_part(app)))
    assert told(connection) == [200, b"body", b"body"]
    assert began[0] == began[1]


async def test_what_a_middleware_writes_in_the_transaction_of_a_body_is_committed_with_the_body(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await insert(db, "body")
        await send(CHUNK)
        await insert(db, "rest")
        await send(BODY)

    async def audit() -> None:
        await insert(db, "middleware")

    async def look() -> None:
        assert await database.names() == []

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(sending_start_with_first_part(app, audit, look)))
    assert told(connection) == [200, b"body", b"body"]
    assert await database.names() == ["body", "middleware", "rest"]


async def test_an_error_whose_start_was_held_back_keeps_the_work_of_its_body(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send(ERROR)
        await insert(db, "body")
        await send(BODY)

    held: list[Message] = []

    async def hold(message: Message, send: Send) -> None:
        held.append(message)
        if message is BODY:
            for each in held:
                await send(each)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(holding_back(app, hold)))
    assert told(connection) == [503, b"body"]
    assert await database.names() == ["body"]


async def test_a_start_waits_for_the_commit_of_a_middlewares_work_if_its_body_has_only_read(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await (await db_session(db)).execute(text("SELECT 1"))
        await send(CHUNK)

    held: list[Message] = []

    async def audit(message: Message, send: Send) -> None:
        held.append(message)
        if message is CHUNK:
            await insert_row_that_fails_at_commit(db)
            await send(held[0])

    connection = await Connection().run(Answering(holding_back(app, audit)))
    assert told(connection) == [409, b"body"]


@shows(Phase.AHEAD, Phase.OVERRULED)
async def test_an_error_in_the_place_of_a_streamed_success_overrules_its_body(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send(START)
        await insert(db, "body")
        await send(CHUNK)
        with pytest.raises(ContextClosedError):
            await insert(db, "rest of the body")

    async def overrule(message: Message, send: Send) -> None:
        trace.note()
        if message is CHUNK:
            await send(ERROR)
            await insert(db, "middleware")
            await send(BODY)

    trace = Trace()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(holding_back(app, overrule))))
    assert trace.phases == [Phase.HANDLING, Phase.AHEAD, Phase.OVERRULED]
    assert told(connection) == [503, b"body"]
    assert await database.names() == ["middleware", "response"]


async def test_the_end_of_an_overruled_body_undoes_nothing_of_what_the_middleware_does(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send(START)
            await insert(db, "body")
            await send(CHUNK)

        streaming = asyncio.create_task(stream())
        await overruled.wait()
        streaming.cancel()
        await asyncio.wait([streaming])
        cut_off.set()

    async def overrule(scope: Scope, receive: Receive, send: Send) -> None:
        async def replace(message: Message) -> None:
            if message is CHUNK:
                await send(ERROR)
                await insert(db, "middleware")
                overruled.set()
                await asyncio.Event().wait()

        call = asyncio.create_task(ASGIStreamBoundary(app)(scope, receive, replace))
        await cut_off.wait()
        await send(BODY)
        await call

    overruled, cut_off = asyncio.Event(), asyncio.Event()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(overrule))
    assert told(connection) == [503, b"body"]
    assert await database.names() == ["middleware"]


@pytest.mark.parametrize("overrules", [False, True])
async def test_an_error_that_waits_for_a_statement_of_its_request_can_be_cancelled(
    db: DBConnect, database: Database, overrules: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = await db_session(db)
        if overrules:
            await send(START)
        sleeping.append(asyncio.create_task(session.execute(text("SELECT pg_sleep(600)"))))
        await eventually(lambda: bool(database.backends("wait_event = 'PgSleep'")), "no statement")
        waits.set()
        await send(ERROR)

    async def pass_errors(message: Message, send: Send) -> None:
        if message is ERROR:
            await send(message)

    sleeping: list[asyncio.Task[object]] = []
    waits = asyncio.Event()
    connection = Connection()
    request = asyncio.create_task(connection.run(ASGIHTTPDBSessionMiddleware(holding_back(app, pass_errors))))
    await waits.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    with pytest.raises(StatementInterruptedError):
        await sleeping[0]
    assert connection.sent == []


async def test_an_overruled_body_that_was_cut_off_before_leaves_nothing_open(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def stream() -> None:
            await send(START)
            await insert(db, "body")
            await send(CHUNK)
            await asyncio.Event().wait()

        streaming = asyncio.create_task(stream())
        await chunk_held.wait()
        streaming.cancel()
        with suppress(asyncio.CancelledError):
            await streaming
        cut_off.set()
        await overruled.wait()

    async def overrule(scope: Scope, receive: Receive, send: Send) -> None:
        async def hold(message: Message) -> None:
            if message is CHUNK:
                chunk_held.set()

        call = asyncio.create_task(boundary(scope, receive, hold))
        await cut_off.wait()
        await send(ERROR)
        assert database.checked_out == 0
        await send(BODY)
        overruled.set()
        await call

    chunk_held, cut_off, overruled = asyncio.Event(), asyncio.Event(), asyncio.Event()
    boundary = ASGIStreamBoundary(app)
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(overrule))
    assert told(connection) == [503, b"body"]
    assert await database.names() == []


@shows(Phase.OVERRULED, Phase.BROKEN)
async def test_an_error_in_the_place_of_a_stream_breaks_off_if_its_own_work_cannot_be_committed(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)

    async def overrule(message: Message, send: Send) -> None:
        await send(ERROR)
        await insert_row_that_fails_at_commit(db)
        await send(CHUNK)
        trace.note()
        await send(BODY)

    trace = Trace()
    connection = Connection()
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(trace.around(holding_back(app, overrule))))
    assert trace.phases[-2:] == [Phase.OVERRULED, Phase.BROKEN]
    assert told(connection) == [503, b"body"]


@shows(Phase.BODY, Phase.HANDLING)
@pytest.mark.parametrize(
    ("status", "commit_fails", "answer", "names"),
    [(200, False, 200, ["middleware"]), (200, True, 409, []), (504, False, 504, [])],
)
async def test_a_response_in_the_place_of_one_whose_start_was_cancelled_is_ended_like_any_other(
    db: DBConnect, database: Database, status: int, commit_fails: bool, answer: int, names: list[str]
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send(START)

    async def limit_time(scope: Scope, receive: Receive, send: Send) -> None:
        call = asyncio.create_task(app(scope, receive, send))
        await committing.wait()
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
        trace.note(scope)
        await (insert_row_that_fails_at_commit(db) if commit_fails else insert(db, "middleware"))
        await send({**START, "status": status})
        trace.note()
        await send(BODY)

    async def before_commit(session: object) -> None:
        if not committing.is_set():
            committing.set()
            await asyncio.Event().wait()
        trace.note()

    committing = asyncio.Event()
    trace = Trace()
    connection = await Connection().run(Answering(limit_time, before_commit))
    assert told(connection) == [answer, b"body"]
    assert await database.names() == names
    if status == 200:
        assert trace.phases[:2] == [Phase.BODY, Phase.HANDLING]


@pytest.mark.parametrize("start", [START, ERROR])
@pytest.mark.parametrize("answers", [False, True])
async def test_work_of_a_response_whose_start_was_cancelled_is_undone_and_what_comes_in_its_place_is_committed(
    db: DBConnect, database: Database, start: Message, answers: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = await insert(db, "response")
        sleeping = asyncio.create_task(session.execute(text("SELECT pg_sleep(600)")))
        await eventually(lambda: bool(database.backends("query ~ 'pg_sleep' AND state = 'active'")), "no statement")
        starting = asyncio.ensure_future(send(start))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait([starting])
        with pytest.raises(StatementInterruptedError):
            await sleeping
        await insert(db, "in its place")
        if answers:
            await send(START)
            assert await database.names() == ["in its place"]
            await send(BODY)

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert told(connection) == ([200, b"body"] if answers else [])
    assert await database.names() == ["in its place"]


async def test_work_that_another_task_begins_behind_a_commit_is_not_undone_by_the_cancellation_of_the_start(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with database.held_commits():
            await insert(db, "response")
            starting = asyncio.ensure_future(send(START))
            await database.commit_is_held()
            beside = asyncio.create_task(insert(db, "beside"))
            await asyncio.sleep(0)
            starting.cancel()
        await asyncio.wait([starting])
        await beside

    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == []
    assert await database.names() == ["beside", "response"]


@pytest.mark.parametrize("waits_for", ["commit", "on_commit"])
async def test_the_start_of_a_response_whose_commit_was_seen_through_leaves_before_the_cancellation(
    db: DBConnect, database: Database, waits_for: str
) -> None:
    called, release = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        called.set()
        await release.wait()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        if waits_for == "on_commit":
            on_commit(db, wait)
        await send(START)
        await send(BODY)

    connection = Connection()
    with database.held_commits() if waits_for == "commit" else nullcontext():
        request = asyncio.create_task(connection.run(ASGIHTTPDBSessionMiddleware(app)))
        await (database.commit_is_held() if waits_for == "commit" else called.wait())
        request.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await request
    release.set()
    assert told(connection) == [200]
    assert await database.names() == ["response"]


async def test_a_unit_of_work_ends_with_a_cancelled_start_beside_a_call_that_cannot_be_stopped(
    db: DBConnect, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with database.held_commits():
            session = await insert(db, "sibling")
            beside = asyncio.create_task(session.commit())
            await database.commit_is_held()
            starting = asyncio.ensure_future(send(ERROR))
            await asyncio.sleep(0)
            starting.cancel()
            await asyncio.wait([starting])
            with pytest.raises(ContextClosedError):
                await insert(db, "behind")
        await beside

    monkeypatch.setattr(session_end, "INTERRUPTION_SECONDS", 0.01)
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.sent == []
    assert await database.names() == ["sibling"]


async def test_a_body_in_the_place_of_a_cancelled_start_is_the_servers_to_refuse(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        starting = asyncio.ensure_future(send(START))
        await committing.wait()
        starting.cancel()
        await asyncio.wait([starting])
        await send(BODY)
        await send(START)

    async def before_commit(session: object) -> None:
        committing.set()
        await asyncio.Event().wait()

    committing = asyncio.Event()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(app, before_commit))
    assert told(connection) == [b"body", 200]


@shows(Phase.BODY, Phase.BROKEN)
async def test_a_body_whose_work_cannot_be_committed_breaks_off(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await insert_row_that_fails_at_commit(db)
        await send(CHUNK)
        with suppress(IntegrityError):
            await send(BODY)
        await send(TRAILERS)

    trace = Trace()
    connection = await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.BODY, Phase.BROKEN]
    assert told(connection) == [200, b"body"]


@shows(Phase.AFTER, Phase.BROKEN)
async def test_trailers_are_not_sent_if_the_work_before_them_cannot_be_committed(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "response")
        await send({**START, "trailers": True})
        await send(BODY)
        await insert_row_that_fails_at_commit(db)
        await send(TRAILERS)

    trace = Trace()
    connection = Connection()
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.BODY, Phase.AFTER, Phase.BROKEN]
    assert told(connection) == [200, b"body"]


async def test_a_body_whose_first_work_is_a_callback_is_sent(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        on_commit(db, lambda: called.append(len(connection.sent)))
        await send(BODY)

    called: list[int] = []
    connection = Connection()
    await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert told(connection) == [200, b"body"]
    assert called == [2]


async def test_a_part_of_a_body_is_sent_while_what_has_only_read_holds_no_connection(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await (await db_session(db)).execute(text("SELECT 1"))
        await send(CHUNK)
        checked_out.append(database.checked_out)
        await send(BODY)

    checked_out: list[int] = []
    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    assert checked_out == [0]


async def test_trailers_wait_for_the_commit_of_the_first_work_behind_the_body(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "trailers": True})
        await send(BODY)
        await insert(db, "checksum")
        await send(TRAILERS)
        assert await database.names() == ["checksum"]

    trace = Trace()
    await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.BODY, Phase.AFTER]


@shows(Phase.BODY, Phase.REFUSED)
async def test_a_websocket_whose_work_cannot_be_committed_is_closed_as_failed(db: DBConnect) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await insert_row_that_fails_at_commit(db)
        try:
            await send({"type": "websocket.close"})
        except IntegrityError as exc:
            told_to_application.append(exc)
        await send({"type": "websocket.send", "text": "too late"})

    told_to_application: list[Exception] = []
    trace = Trace()
    connection = Connection("websocket")
    with pytest.raises(IntegrityError) as caught:
        await connection.run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.BODY, Phase.REFUSED]
    assert connection.types == ["websocket.accept", "websocket.close"]
    assert connection.sent[-1]["code"] == 1011
    assert told_to_application == [caught.value]


async def test_a_second_close_tells_the_application_that_its_work_since_the_first_one_cannot_be_committed(
    db: DBConnect, database: Database
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await insert(db, "message")
        await send({"type": "websocket.close"})
        await insert_row_that_fails_at_commit(db)
        await send({"type": "websocket.close"})

    connection = Connection("websocket")
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(app))
    assert connection.types == ["websocket.accept", "websocket.close"]
    assert await database.names() == ["message"]


async def test_a_handshake_whose_work_cannot_be_committed_is_not_accepted(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert_row_that_fails_at_commit(db)
        with pytest.raises(IntegrityError):
            await send({"type": "websocket.accept"})
        checked_out.append(database.checked_out)
        await insert(db, "late")
        await send({"type": "websocket.send", "text": "too late"})
        await send({"type": "websocket.close"})

    checked_out: list[int] = []
    trace = Trace()
    connection = Connection("websocket")
    with pytest.raises(IntegrityError):
        await connection.run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.REFUSED]
    assert (connection.sent, checked_out) == ([], [0])
    assert await database.names() == []


async def test_work_behind_a_handshake_that_was_refused_is_committed(db: DBConnect, database: Database) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "handshake")
        await send({"type": "websocket.close"})
        await insert(db, "background")

    trace = Trace()
    connection = await Connection("websocket").run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.AFTER]
    assert connection.types == ["websocket.close"]
    assert await database.names() == ["background"]


@pytest.mark.parametrize("commit_fails", [False, True])
async def test_the_end_of_a_denial_waits_for_the_commit_of_its_body(
    db: DBConnect, database: Database, commit_fails: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await insert(db, "handshake")
        await send({"type": "websocket.http.response.start", "status": 403, "headers": []})
        await (insert_row_that_fails_at_commit(db) if commit_fails else insert(db, "body"))
        await (await db_session(db)).stream(text("SELECT generate_series(1, 5000)"))
        await send({"type": "websocket.http.response.body", "body": b"1", "more_body": True})
        try:
            await send({"type": "websocket.http.response.body", "body": b"2"})
        finally:
            assert database.checked_out == 0
            assert await database.names() == ([] if commit_fails else ["body"])

    trace = Trace()
    connection = Connection("websocket")
    with pytest.raises(IntegrityError) if commit_fails else nullcontext():
        await connection.run(ASGIHTTPDBSessionMiddleware(trace.around(app)))
    assert trace.phases == [Phase.HANDLING, Phase.BODY, Phase.BROKEN if commit_fails else Phase.AFTER]
    assert told(connection)[1:] == ([b"1"] if commit_fails else [b"1", b"2"])


def test_each_row_of_the_table_has_a_test() -> None:
    shows.assert_complete()


# --- the end of a request in each phase -------------------------------------------------------------------------------

InPhase = Callable[[Send], Awaitable[None]]


def application_in(phase: Phase, db: DBConnect, act: InPhase) -> ASGIApp:
    """Return an application that brings its request into `phase`, and then awaits `act` with its `send`."""
    at_work, finished = asyncio.Event(), asyncio.Event()

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        if phase is Phase.REFUSED:
            await insert_row_that_fails_at_commit(db)
        with suppress(IntegrityError):
            if phase is not Phase.HANDLING:
                await send(START)
            if phase is Phase.AFTER:
                await insert(db, "body")
                await send(BODY)
            if phase is Phase.BROKEN:
                await insert_row_that_fails_at_commit(db)
                await send(BODY)
        await act(send)

    async def ahead(message: Message, send: Send) -> None:
        if phase is Phase.OVERRULED:
            await send(ERROR)
        await act(send)

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        at_work.set()
        await finished.wait()

    async def give_up(scope: Scope, receive: Receive, send: Send) -> None:
        call = asyncio.create_task(boundary(scope, receive, send))
        await at_work.wait()
        await send(START)
        try:
            await act(send)
        finally:
            finished.set()
            await call

    if phase in (Phase.AHEAD, Phase.OVERRULED):
        return holding_back(stream, ahead)
    boundary = ASGIStreamBoundary(work)
    return give_up if phase is Phase.ABANDONED else plain


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ABANDONED])
async def test_open_work_is_committed_at_the_return_if_a_response_has_begun(
    db: DBConnect, database: Database, phase: Phase
) -> None:
    async def write(send: Send) -> None:
        assert trace.exchange.phase is phase
        await insert(db, "late")

    trace = Trace()
    with suppress(IntegrityError):
        await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(application_in(phase, db, write))))
    assert ("late" in await database.names()) is (phase in FINISHING)
    assert database.checked_out == 0


async def test_abandoned_unit_refuses_further_work(db: DBConnect) -> None:
    async def write(send: Send) -> None:
        assert trace.exchange.phase is Phase.ABANDONED
        with pytest.raises(ContextClosedError):
            await insert(db, "late")

    trace = Trace()
    await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(application_in(Phase.ABANDONED, db, write))))


@pytest.mark.parametrize("phase", Phase)
async def test_an_exception_rolls_back_in_each_phase(db: DBConnect, database: Database, phase: Phase) -> None:
    async def fail(send: Send) -> None:
        assert trace.exchange.phase is phase
        with suppress(ContextClosedError):
            await insert(db, "late")
        raise LookupError

    trace = Trace()
    # The error of a commit counts more than what the application makes of it.
    expected = IntegrityError if phase is Phase.REFUSED else LookupError
    with pytest.raises(expected):
        await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(application_in(phase, db, fail))))
    assert "late" not in await database.names()
    assert database.checked_out == 0


# --- what is no transition --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("message", [START, ERROR, CHUNK, BODY, TRAILERS], ids=lambda each: str(told_by(each)))
@pytest.mark.parametrize("phase", Phase)
async def test_no_message_of_an_application_is_a_defect_of_the_adapter(
    db: DBConnect, database: Database, phase: Phase, message: Message, commits: bool
) -> None:
    """A server refuses what comes at the wrong time: the exchange passes it on, or drops it with its response."""

    async def send_message(send: Send) -> None:
        assert trace.exchange.phase is phase
        with suppress(ContextClosedError):
            await (insert(db, "late") if commits else insert_row_that_fails_at_commit(db))
        await send(message)

    trace = Trace()
    try:
        await Connection().run(ASGIHTTPDBSessionMiddleware(trace.around(application_in(phase, db, send_message))))
    except IntegrityError:
        assert not commits or phase is Phase.REFUSED
    assert database.checked_out == 0


def told_by(message: Message) -> object:
    return message.get("status", message["type"].rpartition(".")[2] + "+" * message.get("more_body", False))


@pytest.mark.parametrize(
    ("current", "following"), [(a, b) for a in Phase for b in Phase if (a, b) not in ROWS and a is not b]
)
async def test_a_transition_that_is_not_in_the_table_is_refused(current: Phase, following: Phase) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Any = scope["ctxdb.unit_of_work"]
        exchange.phase = current
        with pytest.raises(IllegalTransitionError, match=f"{current.value} cannot become {following.value}"):
            exchange.move_to(following)
        assert exchange.phase is current
        exchange.phase = Phase.HANDLING

    await Connection().run(ASGIHTTPDBSessionMiddleware(app))
    with pytest.raises(IllegalTransitionError):
        check_transition(current, following)
