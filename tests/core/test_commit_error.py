"""`commit_error`, for frameworks that answer errors further in than the middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy.exc import IntegrityError
from tests.support.database import Database, insert, insert_row_that_fails_at_commit

from ctxdb_core import DBConnect
from ctxdb_core.asgi import (
    ASGIApp,
    ASGIHTTPDBSessionMiddleware,
    Message,
    Receive,
    Scope,
    Send,
    answer_commit_error,
    commit_error,
)


def start(status: int) -> Message:
    return {"type": "http.response.start", "status": status, "headers": []}


def answering(answer: Callable[[Scope, Send], Awaitable[None]], db: DBConnect) -> ASGIApp:
    """Return an application whose commit fails, and which gives the error's response by `answer`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert commit_error(scope) is None
        await insert_row_that_fails_at_commit(db)
        with pytest.raises(IntegrityError) as caught:
            await send(start(200))
        # An answer is let through only after `commit_error` was asked for: before, it might claim a success.
        await send(start(200))
        assert commit_error(scope) is caught.value
        await answer(scope, send)

    return ASGIHTTPDBSessionMiddleware(app)


async def run(app: ASGIApp) -> list[int]:
    sent: list[int] = []

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message["status"])

    try:
        await app({"type": "http"}, receive, send)
    except IntegrityError:
        sent.append(0)
    return sent


@pytest.mark.parametrize(("status", "names"), [(202, ["answer"]), (409, [])])
async def test_answer_to_a_commit_error_is_committed_as_its_status_demands(
    db: DBConnect, database: Database, status: int, names: list[str]
) -> None:
    async def answer(scope: Scope, send: Send) -> None:
        answer_commit_error(scope)
        assert commit_error(scope) is None
        await insert(db, "answer")
        await send(start(status))

    assert await run(answering(answer, db)) == [status]
    assert await database.names() == names


async def test_without_an_answer_the_error_is_raised(db: DBConnect) -> None:
    async def answer(scope: Scope, send: Send) -> None: ...

    assert await run(answering(answer, db)) == [0]


async def test_no_further_answer_follows_an_answer_whose_commit_fails(db: DBConnect) -> None:
    async def answer(scope: Scope, send: Send) -> None:
        answer_commit_error(scope)
        await insert_row_that_fails_at_commit(db)
        with pytest.raises(IntegrityError):
            await send(start(200))
        # An assertion here would be an error of the application, which the error of the commit hides.
        errors.append(commit_error(scope))
        await send(start(500))

    errors: list[Exception | None] = []
    assert await run(answering(answer, db)) == [0]
    assert errors == [None]


async def test_unrelated_error_is_attached_and_a_consequence_of_the_commit_error_is_not(db: DBConnect) -> None:
    async def answer(scope: Scope, send: Send) -> None:
        error = commit_error(scope)
        assert error is not None
        consequence = RuntimeError("response already started")
        consequence.__cause__ = error
        answer_commit_error(scope, consequence)
        assert not hasattr(error, "__notes__")
        await send(start(409))

    async def answer_another(scope: Scope, send: Send) -> None:
        error = commit_error(scope)
        answer_commit_error(scope, LookupError("while cleaning up"))
        assert error is not None
        assert "while cleaning up" in error.__notes__[0]
        await send(start(409))

    assert await run(answering(answer, db)) == [409]
    assert await run(answering(answer_another, db)) == [409]


async def test_a_request_outside_of_any_adapter_has_no_commit_error() -> None:
    assert commit_error({"type": "http"}) is None
