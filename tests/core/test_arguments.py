"""Arguments of a wrong type: what is passed in the place of a `DBConnect` is named, and what to pass."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker
from tests.support.database import Database

from ctxdb_core import (
    ArgumentTypeError,
    ArgumentValueError,
    CtxDBError,
    DBConnect,
    TransactionContext,
    atomic_db_session,
    close_db_session,
    commit_db_session,
    db_session,
    gather_in_new_ctx,
    new_db_ctx,
    new_non_ctx_atomic_session,
    new_non_ctx_session,
    on_begin,
    on_commit,
    on_rollback,
    rollback_db_session,
    run_in_new_ctx,
    transactional,
)
from ctxdb_core.adapters import begin, close_all
from ctxdb_core.asgi import ASGIHTTPDBSessionMiddleware
from ctxdb_core.testing import (
    TableCleaner,
    put_savepoint_session_in_ctx,
    rollback_session,
    set_test_context,
    shared_transaction,
)


@pytest.fixture
async def engine(database: Database) -> AsyncIterator[AsyncEngine]:
    engine = database.watch_new()
    yield engine
    await engine.dispose()


def test_an_argument_type_error_is_a_type_error() -> None:
    assert issubclass(ArgumentTypeError, CtxDBError)
    assert issubclass(ArgumentTypeError, TypeError)


@pytest.mark.parametrize("ask", [db_session, commit_db_session, rollback_db_session, close_db_session])
async def test_a_function_that_is_given_an_engine_says_what_to_pass(
    engine: AsyncEngine, ask: Callable[[Any], Awaitable[object]]
) -> None:
    with pytest.raises(ArgumentTypeError, match=r"`DBConnect`.*AsyncEngine.*TransactionContext"):
        await ask(engine)
    async with new_db_ctx():
        with pytest.raises(ArgumentTypeError, match=r"`DBConnect`.*AsyncEngine.*TransactionContext"):
            await ask(engine)


@pytest.mark.parametrize("wrong", ["postgresql+asyncpg://shop:secret@localhost/shop", None, [], DBConnect])
async def test_an_argument_that_is_no_database_is_named_without_its_secrets(wrong: Any) -> None:
    async with new_db_ctx():
        with pytest.raises(ArgumentTypeError, match="from_url") as caught:
            await db_session(wrong)
    assert "secret" not in str(caught.value)


def _on_commit(db: Any) -> None:
    on_commit(db, lambda: None)


@pytest.mark.parametrize("call", [_on_commit, transactional, TableCleaner])
async def test_a_call_that_is_given_an_engine_says_what_to_pass(
    engine: AsyncEngine, call: Callable[[Any], object]
) -> None:
    async with new_db_ctx():
        with pytest.raises(ArgumentTypeError, match="`DBConnect`"):
            call(engine)


@pytest.mark.parametrize(
    "block",
    [
        atomic_db_session,
        new_non_ctx_session,
        new_non_ctx_atomic_session,
        rollback_session,
        shared_transaction,
    ],
)
async def test_a_block_that_is_given_an_engine_says_what_to_pass(
    engine: AsyncEngine, block: Callable[[Any], AbstractAsyncContextManager[object]]
) -> None:
    with pytest.raises(ArgumentTypeError, match="`DBConnect`"):
        async with new_db_ctx(), block(engine):
            pytest.fail("the block was entered")


async def test_a_transaction_context_in_the_place_of_a_database_is_told_of_its_own_blocks(db: DBConnect) -> None:
    wrong: Any = TransactionContext(db)
    with pytest.raises(ArgumentTypeError, match=r"\.transaction\(\)"):
        transactional(wrong)
    async with new_db_ctx():
        with pytest.raises(ArgumentTypeError, match=r"\.transaction\(\)"):
            await db_session(wrong)


async def test_a_session_in_the_place_of_its_database_is_named_by_the_class_of_sqlalchemy(db: DBConnect) -> None:
    async with new_db_ctx():
        session: Any = await db_session(db)
        with pytest.raises(ArgumentTypeError, match=r"an AsyncSession is given.*find the session of a database"):
            await commit_db_session(session)


async def test_a_transaction_context_is_made_of_an_engine_or_a_database_alone() -> None:
    with pytest.raises(ArgumentTypeError, match="AsyncEngine or a DBConnect"):
        TransactionContext("postgresql+asyncpg://localhost")  # type: ignore[call-overload]  # what is tested


async def test_sessions_are_put_into_a_test_context_in_the_right_order(db: DBConnect) -> None:
    swapped: Any = put_savepoint_session_in_ctx
    async with rollback_session(db) as session, set_test_context():
        with pytest.raises(ArgumentTypeError, match="`DBConnect`"):
            async with swapped(session, db):
                pytest.fail("the block was entered")
        with pytest.raises(ArgumentTypeError, match="AsyncSession"):
            async with swapped(db, db):
                pytest.fail("the block was entered")


async def test_close_all_closes_each_database_beside_an_argument_that_is_none(
    db: DBConnect, engine: AsyncEngine
) -> None:
    wrong: Any = engine
    with pytest.raises(ArgumentTypeError, match="`DBConnect`"):
        await close_all(db, wrong)


async def test_a_call_in_the_place_of_a_function_is_told() -> None:
    wrong: Any = 1
    with pytest.raises(ArgumentTypeError, match="an int is no async function"):
        await run_in_new_ctx(wrong)


URL = "postgresql+asyncpg://ada:secret@db.invalid/shop"


async def _create(host: str) -> AsyncEngine:
    return create_async_engine(URL)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda connect: connect(create_async_engine(URL)), r"DBConnect\.from_engine\(engine\)"),
        (lambda connect: connect(create_engine("sqlite://")), "create_async_engine"),
        (lambda connect: connect(URL), r"DBConnect\.from_url\(url\)"),
        (lambda connect: connect(make_url(URL)), r"DBConnect\.from_url\(url\)"),
        (lambda connect: connect(async_sessionmaker()), "session_maker_creator="),
        (lambda connect: connect(None), "None is given"),
        (lambda connect: connect(DBConnect), "the class DBConnect"),
        (lambda connect: connect(_create, host="h"), "without `await`"),
        (lambda connect: connect(lambda host, port: None, host="h"), "needs 2 arguments"),
        (lambda connect: connect(lambda host: None, AsyncSession, host="h"), "the class AsyncSession"),
        (lambda connect: connect(lambda host: None, async_sessionmaker(), host="h"), "a session maker is given"),
        (lambda connect: connect(lambda host: None, "h"), "a str is given"),
        (lambda connect: connect(lambda host: None, lambda: None), "takes no engine"),
        (lambda connect: connect(lambda host: None, lambda engine, host: None), "needs 2 arguments"),
        (lambda connect: connect.from_url(create_async_engine(URL)), r"DBConnect\.from_engine\(engine\)"),
        (lambda connect: connect.from_url(lambda host: None), r"DBConnect\(engine_creator\)"),
        (lambda connect: connect.from_url(5), "an int is given"),
        (lambda connect: connect.from_url(URL, session_maker_creator=async_sessionmaker()), "lambda engine"),
        (lambda connect: connect.from_url(URL, session_maker_creator=AsyncSession), "lambda engine"),
        (lambda connect: connect.from_url(URL, class_=AsyncSession), "class_=YourSession"),
        (lambda connect: connect.from_url(URL, expire_on_commit=False), "expire_on_commit=False already"),
        (
            lambda connect: connect.from_url(URL, autoflush=False, info={}),
            "`autoflush`, `info` are options of sessions",
        ),
        (lambda connect: connect.from_url(URL, host="h"), "parts of the URL"),
        (lambda connect: connect.from_url(URL, pol_size=5), "pol_size"),
        (lambda connect: connect.from_engine(URL), r"DBConnect\.from_url\(url\)"),
        (lambda connect: connect.from_engine(create_engine("sqlite://")), "create_async_engine"),
        (lambda connect: connect.from_engine(lambda host: None), r"DBConnect\(engine_creator\)"),
        (lambda connect: connect.from_engine(create_async_engine(URL), session_maker_creator=5), "an int is given"),
        (lambda connect: connect(lambda host: None, host=5), "an int is given as the host"),
        (
            lambda connect: connect(lambda host: None, host="h", before_create_session_handler="h"),
            "a str is given as `before_create_session_handler`",
        ),
        (
            lambda connect: connect(lambda host: None, host="h", before_create_session_handler=lambda: None),
            r"takes no argument: write `async def handler\(db\)",
        ),
        (
            lambda connect: connect(lambda host: None, host="h", before_create_session_handler=lambda db, host: None),
            r"needs 2 arguments: write `async def handler\(db\)",
        ),
        (lambda connect: connect(lambda host: None, warn_connection_held_after="5"), "a str is given as `warn_"),
        (lambda connect: connect.from_url(URL, warn_connection_held_after="5"), "give a number of seconds"),
    ],
)
def test_a_database_that_is_made_in_a_wrong_way_says_how_to_make_it(
    mistake: Callable[[Any], object], told: str
) -> None:
    with pytest.raises(ArgumentTypeError, match=told) as caught:
        mistake(DBConnect)
    assert "secret" not in str(caught.value)


async def test_options_of_engines_and_sessions_alike_are_the_engines(database: Database) -> None:
    options: dict[str, Any] = {"execution_options": {"logging_token": "shop"}, "future": True}
    async with DBConnect.from_url(database.url, **options) as db:
        assert (await db.engine()).get_execution_options()["logging_token"] == "shop"


async def test_a_host_that_is_no_string_is_told() -> None:
    with pytest.raises(ArgumentTypeError, match="an int is given as the host"):
        await DBConnect(lambda host: create_async_engine(URL)).connect(5)  # type: ignore[arg-type]  # which is the mistake


@pytest.mark.parametrize("wrong", [None, 5, "two", lambda: ["two"]])
async def test_hosts_to_keep_that_are_no_collection_are_told_and_nothing_changes(wrong: Any) -> None:
    async with DBConnect(lambda host: create_async_engine(URL), host="one") as db:
        with pytest.raises(ArgumentTypeError, match="give a collection of hosts"):
            await db.change_host("two", keep=wrong)
        assert db.host == "one"


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_time_to_hold_a_connection_that_means_nothing_is_told(seconds: float) -> None:
    with pytest.raises(ArgumentValueError, match="warn_connection_held_after is"):
        DBConnect.from_url(URL, warn_connection_held_after=seconds)


@pytest.mark.parametrize("wrong", [5, 0, "", lambda: None, AsyncSession, async_sessionmaker])
async def test_a_session_maker_of_a_transaction_context_that_is_none_is_told(db: DBConnect, wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="as `default_session_maker`, which takes an `async_sessionmaker`"):
        TransactionContext(db, default_session_maker=wrong)
    context = TransactionContext(db)
    for block in (context.session, context.transaction, context.new_session, context.new_transaction):
        with pytest.raises(ArgumentTypeError, match="as `session_maker`, which takes an `async_sessionmaker`"):
            async with block(session_maker=wrong):
                pytest.fail("the block was entered")


@pytest.mark.parametrize(
    "give",
    [
        run_in_new_ctx,
        gather_in_new_ctx,
        lambda url: gather_in_new_ctx(max_concurrent=url),
        lambda url: new_db_ctx(statement_timeout=url).__aenter__(),
        lambda url: new_db_ctx(deadline=url).__aenter__(),
        lambda url: ASGIHTTPDBSessionMiddleware(_application, commit_policy=url),
    ],
)
async def test_a_url_in_a_wrong_place_is_told_without_its_password(give: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentTypeError, match="a str is") as caught:
        await give(URL)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("ask", [on_begin, on_commit, on_rollback])
async def test_a_coroutine_in_the_place_of_a_callback_is_told(ask: Callable[[Any, Any], object]) -> None:
    async def send_mail() -> None: ...

    db = DBConnect.from_url(URL)
    async with new_db_ctx():
        with pytest.raises(ArgumentTypeError, match=r"functools\.partial"):
            ask(db, send_mail())
        with pytest.raises(ArgumentTypeError, match="None is given as the callback of"):
            ask(db, None)


async def _application(*args: object) -> None: ...


@pytest.mark.parametrize(
    "give",
    [
        lambda hook: begin(before_commit=hook),
        lambda hook: new_db_ctx(before_commit=hook).__aenter__(),
        lambda hook: ASGIHTTPDBSessionMiddleware(_application, before_commit=hook),
        lambda hook: ASGIHTTPDBSessionMiddleware(_application, deadline=hook),
        lambda hook: TransactionContext(DBConnect.from_url(URL), default_session_maker=hook),
    ],
)
async def test_a_hook_that_is_no_function_is_told(give: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentTypeError, match="an int is given"):
        await give(5)


@pytest.mark.parametrize("run", [run_in_new_ctx, gather_in_new_ctx])
async def test_a_function_that_is_not_async_is_told(run: Callable[[Any], Awaitable[object]]) -> None:
    with pytest.raises(ArgumentTypeError, match="`async def`"):
        await run(lambda: 5)


async def test_a_plain_function_that_should_be_awaited_before_each_session_is_named() -> None:
    def follow(db: DBConnect) -> None: ...

    db = DBConnect(lambda host: create_async_engine(URL), host="one", before_create_session_handler=follow)  # type: ignore[arg-type]  # the mistake
    with pytest.raises(ArgumentTypeError, match=r"follow.*, given as `before_create_session_handler`"):
        await db.create_session()


async def test_a_session_maker_of_synchronous_sessions_is_refused() -> None:
    db = DBConnect(lambda host: create_async_engine(URL), lambda engine: sessionmaker(engine.sync_engine), host="one")  # type: ignore[arg-type, return-value]  # the mistake
    with pytest.raises(ArgumentTypeError, match="sessions are synchronous"):
        await db.session_maker()


async def test_coroutines_are_refused_where_functions_are_gathered_and_none_is_left_unawaited() -> None:
    # A coroutine that was never awaited is a warning, and each warning fails the test.
    with pytest.raises(ArgumentTypeError, match="A coroutine was passed"):
        await gather_in_new_ctx(_nothing(), _nothing())  # type: ignore[arg-type]  # the mistake
    gc.collect()


async def _nothing() -> None:
    pass


def test_a_url_of_a_database_without_a_known_asyncio_driver_asks_for_one() -> None:
    with pytest.raises(ArgumentValueError, match="'mssql' URL is not for asyncio: name a driver that is"):
        DBConnect.from_url("mssql://server/shop")


def test_a_url_without_an_asyncio_driver_is_told_at_once() -> None:
    with pytest.raises(ArgumentValueError, match=r"postgresql\+asyncpg"):
        DBConnect.from_url("postgresql+psycopg2://db.invalid/shop")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgres://ada:secret@db.invalid/shop", r"'postgres' URL is not known.*write 'postgresql\+asyncpg'"),
        ("postgresql+asyncpgg://ada:secret@db.invalid/shop", r"asyncpgg' URL is not known.*'postgresql\+asyncpg'"),
        ("shop://ada:secret@db.invalid/shop", "'shop' URL is not known.*name a driver that is"),
    ],
)
def test_a_url_of_a_driver_that_nobody_knows_is_told_what_to_write(url: str, told: str) -> None:
    with pytest.raises(ArgumentValueError, match=told) as caught:
        DBConnect.from_url(url)
    assert "secret" not in str(caught.value)


def test_a_url_that_an_at_sign_in_its_password_cuts_is_told_without_the_password() -> None:
    with pytest.raises(ArgumentValueError, match="%40") as caught:
        DBConnect.from_url("postgresql+asyncpg://ada:b@d:secret@db.invalid/shop")
    with pytest.raises(ArgumentValueError, match="%40"):
        DBConnect.from_url(URL).overridden("postgresql+asyncpg://ada:b@d:secret@db.invalid/shop")
    assert "secret" not in str(caught.value)
    # The error of Python, which shows it, would be printed with this one.
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("wrong", [None, DBConnect.from_url(URL)])
def test_an_asgi_application_that_is_none_is_told_at_once(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="given as `app`, the ASGI application"):
        ASGIHTTPDBSessionMiddleware(wrong)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda db: db.engine.begin(), r"`engine = await db\.engine\(\)`, then `engine\.begin\(\.\.\.\)`"),
        (lambda db: db.engine.connect(), r"engine\.connect"),
        (lambda db: db.engine.dispose(), r"engine\.dispose"),
        (lambda db: db.session_maker.begin(), r"`maker = await db\.session_maker\(\)`, then `maker\.begin"),
    ],
)
def test_a_missing_call_of_a_method_is_told(mistake: Callable[[Any], object], told: str) -> None:
    with pytest.raises(ArgumentTypeError, match=told):
        mistake(DBConnect.from_url(URL))


async def test_sessions_are_made_by_the_session_maker_of_a_url(database: Database) -> None:
    class ShopSession(AsyncSession):
        pass

    db = DBConnect.from_url(
        database.url, session_maker_creator=lambda engine: async_sessionmaker(engine, class_=ShopSession)
    )
    async with db, new_db_ctx():
        assert isinstance(await db_session(db), ShopSession)
