"""Blocks around the yields of async generators: they are the generator's, and not its consumer's."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager

import aiosqlite
import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.database import Database, insert

from ctxdb_core import (
    ContextNotInitiatedError,
    DBConnect,
    SessionAlreadyActiveError,
    TransactionContext,
    atomic_db_session,
    commit_db_session,
    db_session,
    new_db_ctx,
    on_commit,
    run_in_new_ctx,
    set_statement_timeout,
    transactional,
)
from ctxdb_core.adapters import is_context_initiated

pytest_plugins = ["pytester"]

# After a run of pytest in this process, the modules that it has imported are removed. aiosqlite must stay, so it is
# imported before.
IMPORTED = (aiosqlite,)

Block = Callable[[DBConnect], AbstractAsyncContextManager[object]]

OWN_UNITS: dict[str, Block] = {
    "new_db_ctx": lambda db: new_db_ctx(),
    "requires_new": lambda db: transactional(db, "requires_new"),
    "not_supported": lambda db: transactional(db, "not_supported"),
    "new_transaction": lambda db: TransactionContext(db).new_transaction(),
    "new_session": lambda db: TransactionContext(db).new_session(),
}
ON_THE_UNITS_SESSION: dict[str, Block] = {
    "savepoint": lambda db: TransactionContext(db).transaction(),
    "nested": lambda db: transactional(db, "nested"),
    "atomic": atomic_db_session,
    "atomic savepoint": lambda db: atomic_db_session(db, "savepoint"),
}

own_units = pytest.mark.parametrize("block", OWN_UNITS.values(), ids=OWN_UNITS)
on_the_units_session = pytest.mark.parametrize("block", ON_THE_UNITS_SESSION.values(), ids=ON_THE_UNITS_SESSION)
all_blocks = pytest.mark.parametrize(
    "block", [*OWN_UNITS.values(), *ON_THE_UNITS_SESSION.values()], ids=[*OWN_UNITS, *ON_THE_UNITS_SESSION]
)


async def rows(db: DBConnect, block: Block, seen: list[AsyncSession] | None = None) -> AsyncGenerator[int]:
    async with block(db):
        for number in range(3):
            session = await db_session(db)
            if seen is not None:
                seen.append(session)
            yield number


async def one_session(db: DBConnect) -> AsyncGenerator[AsyncSession]:
    async with new_db_ctx():
        yield await db_session(db)


# --- the consumer's session -------------------------------------------------------------------------------------------


@own_units
async def test_the_consumer_keeps_its_own_session(db: DBConnect, database: Database, block: Block) -> None:
    seen: list[AsyncSession] = []
    with pytest.raises(LookupError):
        async with new_db_ctx():
            own = await db_session(db)
            async for number in rows(db, block, seen):
                assert await insert(db, str(number)) is own
                assert is_context_initiated()
            assert await db_session(db) is own
            raise LookupError
    assert own not in seen
    # The generator has the same session at each of its steps.
    assert [session is seen[0] for session in seen] == [True] * 3
    assert await database.names() == []


@own_units
async def test_the_consumer_can_stop_in_the_middle(db: DBConnect, database: Database, block: Block) -> None:
    async with new_db_ctx():
        own = await db_session(db)
        async for number in rows(db, block):
            assert await insert(db, str(number)) is own
            break
        assert await insert(db, "before the generator is closed") is own
        gc.collect()
        # The event loop closes the generator in a task.
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0)
        assert database.checked_out == 1
        assert await insert(db, "after it") is own
    assert len(await database.names()) == 3


@own_units
async def test_a_generator_that_its_consumer_closes_leaves_the_consumer_its_session(
    db: DBConnect, database: Database, block: Block
) -> None:
    async with new_db_ctx():
        own = await db_session(db)
        async with aclosing(rows(db, block)) as generator:
            async for number in generator:
                assert await insert(db, str(number)) is own
                break
        assert await insert(db, "after") is own
    assert await database.names() == ["0", "after"]


@own_units
async def test_a_generator_that_is_asked_by_anext_leaves_its_consumer_the_session(db: DBConnect, block: Block) -> None:
    async with new_db_ctx():
        own = await db_session(db)
        generator = rows(db, block)
        while (await anext(generator, None)) is not None:
            assert await db_session(db) is own


async def test_a_generator_with_two_yields_and_no_loop_leaves_its_consumer_the_session(db: DBConnect) -> None:
    async def two_rows() -> AsyncGenerator[AsyncSession]:
        async with new_db_ctx():
            yield await db_session(db)
            yield await db_session(db)

    async with new_db_ctx():
        mine = await db_session(db)
        generator = two_rows()
        first = await anext(generator)
        assert await db_session(db) is mine
        assert await anext(generator) is first is not mine
        assert await anext(generator, None) is None


async def test_a_generator_with_one_yield_that_is_iterated_over_leaves_its_consumer_the_session(db: DBConnect) -> None:
    async with new_db_ctx():
        mine = await db_session(db)
        async for theirs in one_session(db):
            assert await db_session(db) is mine is not theirs


async def test_a_generator_that_is_stepped_through_inside_of_an_iteration_hands_its_unit_on(db: DBConnect) -> None:
    async with new_db_ctx():
        mine = await db_session(db)
        async for session in rows(db, lambda db: new_db_ctx()):
            assert session in range(3)
            generator = one_session(db)
            theirs = await anext(generator)
            assert await db_session(db) is theirs is not mine
            assert await anext(generator, None) is None
            assert await db_session(db) is mine


@own_units
async def test_a_comprehension_is_a_consumer(db: DBConnect, block: Block) -> None:
    async with new_db_ctx():
        own = await db_session(db)
        assert [await db_session(db) is own async for _ in rows(db, block)] == [True] * 3


async def test_writes_of_a_generator_are_committed_at_its_end(db: DBConnect, database: Database) -> None:
    async def copy() -> AsyncGenerator[str]:
        async with new_db_ctx():
            on_commit(db, lambda: told.append("generator"))
            for name in ("one", "two"):
                await insert(db, name)
                yield name

    told: list[str] = []
    with pytest.raises(LookupError):
        async with new_db_ctx():
            async for name in copy():
                on_commit(db, lambda: told.append("consumer"))
                await insert(db, f"consumer of {name}")
            raise LookupError
    assert await database.names() == ["one", "two"]
    assert told == ["generator"]


@own_units
async def test_a_consumer_without_a_unit_is_told_that_the_open_unit_is_the_generators(
    db: DBConnect, block: Block
) -> None:
    consumed = []
    async for number in rows(db, block):
        assert not is_context_initiated()
        with pytest.raises(ContextNotInitiatedError, match=r"async generator rows\(\).*run_in_new_ctx"):
            await db_session(db)
        with pytest.raises(ContextNotInitiatedError, match="rows"):
            await commit_db_session(db)
        with pytest.raises(ContextNotInitiatedError, match="rows"):
            await set_statement_timeout(1)
        consumed.append(number)
    assert consumed == [0, 1, 2]
    with pytest.raises(ContextNotInitiatedError, match="There is no unit of work here"):
        await db_session(db)


@own_units
async def test_a_consumer_without_a_unit_can_open_a_unit(db: DBConnect, database: Database, block: Block) -> None:
    async for number in rows(db, block):
        await run_in_new_ctx(insert, db, f"unit {number}")
        async with TransactionContext(db).transaction():
            await insert(db, f"context {number}")
        async with transactional(db):
            await insert(db, f"transactional {number}")
    assert len(await database.names()) == 9


@own_units
async def test_a_unit_of_the_consumer_outlasts_a_generator_that_ends_inside_of_it(
    db: DBConnect, database: Database, block: Block
) -> None:
    async with new_db_ctx():
        outer = await db_session(db)
        generator = rows(db, block)
        assert await anext(generator) == 0
        async with new_db_ctx():
            inner = await insert(db, "inner")
            assert [number async for number in generator] == [1, 2]
            assert await db_session(db) is inner
        assert await db_session(db) is outer


async def test_two_generators_side_by_side_have_their_own_sessions(db: DBConnect) -> None:
    seen: dict[str, list[AsyncSession]] = {"one": [], "two": []}
    async with new_db_ctx():
        own = await db_session(db)
        one, two = (rows(db, OWN_UNITS["new_db_ctx"], seen[name]) for name in seen)
        async for _ in one:
            assert await anext(two) in range(3)
            assert await db_session(db) is own
        await two.aclose()
    assert [len(set(map(id, sessions))) for sessions in seen.values()] == [1, 1]
    assert len({id(own), id(seen["one"][0]), id(seen["two"][0])}) == 3


async def test_a_generator_that_iterates_over_another_is_its_consumer(db: DBConnect) -> None:
    async def names() -> AsyncGenerator[str]:
        async with new_db_ctx():
            own = await db_session(db)
            async for number in rows(db, OWN_UNITS["new_db_ctx"]):
                assert await db_session(db) is own
                yield str(number)

    async with new_db_ctx():
        own = await db_session(db)
        async for _ in names():
            assert await db_session(db) is own


async def test_tasks_have_the_session_of_the_code_that_waits_for_them(db: DBConnect) -> None:
    async def ask() -> AsyncSession:
        await asyncio.sleep(0)
        return await db_session(db)

    async def rows_by_tasks() -> AsyncGenerator[AsyncSession]:
        async with new_db_ctx():
            own = await db_session(db)
            for _ in range(2):
                assert await asyncio.gather(ask(), ask()) == [own, own]  # type: ignore[comparison-overlap]  # a list
                yield own

    async with new_db_ctx():
        own = await db_session(db)
        async for other in rows_by_tasks():
            assert other is not own
            assert await asyncio.gather(ask(), ask()) == [own, own]  # type: ignore[comparison-overlap]  # as above


async def test_units_that_the_consumer_opens_ask_the_before_commit_of_the_consumer(db: DBConnect) -> None:
    async def consumers(session: AsyncSession) -> None:
        asked.append("consumer's")

    async def generators(session: AsyncSession) -> None:
        asked.append("generator's")

    async def generator() -> AsyncGenerator[int]:
        async with new_db_ctx(before_commit=generators):
            for number in range(2):
                await run_in_new_ctx(insert, db, f"generator {number}")
                yield number

    asked: list[str] = []
    async with new_db_ctx(before_commit=consumers):
        async for number in generator():
            await run_in_new_ctx(insert, db, f"consumer {number}")
    assert asked == ["generator's", "consumer's"] * 2


# --- blocks on the consumer's own session -----------------------------------------------------------------------------


@on_the_units_session
async def test_a_consumer_whose_session_the_generator_has_in_a_block_is_refused(
    db: DBConnect, database: Database, block: Block
) -> None:
    async with new_db_ctx():
        await insert(db, "before")
        async with aclosing(rows(db, block)) as generator:
            async for _ in generator:
                with pytest.raises(ContextNotInitiatedError, match=r"async generator rows\(\).*into a list"):
                    await insert(db, "lost with the savepoint")
                with pytest.raises(ContextNotInitiatedError, match="rows"):
                    async with transactional(db):
                        pytest.fail("the block was entered")
                await run_in_new_ctx(insert, db, "beside")
                break
        await insert(db, "after")
    assert {"after", "beside"} <= set(await database.names()) <= {"after", "before", "beside"}


@on_the_units_session
async def test_rows_that_are_read_into_a_list_first_leave_the_session_free(
    db: DBConnect, database: Database, block: Block
) -> None:
    async with new_db_ctx():
        for number in [number async for number in rows(db, block)]:
            await insert(db, str(number))
    assert await database.names() == ["0", "1", "2"]


@all_blocks
async def test_a_block_that_ends_before_the_yields_leaves_the_session_free(
    db: DBConnect, database: Database, block: Block
) -> None:
    async def numbers() -> AsyncGenerator[int]:
        async with block(db):
            found = range(3)
        for number in found:
            yield number

    async with new_db_ctx():
        own = await db_session(db)
        async for number in numbers():
            assert await insert(db, str(number)) is own
    assert await database.names() == ["0", "1", "2"]


@pytest.mark.parametrize("joining", ["required", "mandatory", "supports", "session"])
async def test_a_block_that_only_joins_leaves_the_session_free(db: DBConnect, database: Database, joining: str) -> None:
    context = TransactionContext(db)

    def block(db: DBConnect) -> AbstractAsyncContextManager[object]:
        return context.session() if joining == "session" else transactional(db, joining)  # type: ignore[arg-type]

    async with new_db_ctx():
        own = await db_session(db)
        async for number in rows(db, block):
            async with context.session() as session:
                assert await insert(db, str(number)) is session is own
    assert await database.names() == ["0", "1", "2"]


async def test_blocks_inside_of_a_generators_block_must_say_that_they_are_nested(db: DBConnect) -> None:
    context = TransactionContext(db)

    async def numbers() -> AsyncGenerator[int]:
        async with context.session():
            for number in range(2):
                with pytest.raises(SessionAlreadyActiveError):
                    async with context.session():
                        pytest.fail("the block was entered")
                yield number

    async with new_db_ctx():
        assert [number async for number in numbers()] == [0, 1]


# --- generators that are context managers -----------------------------------------------------------------------------


@own_units
async def test_a_context_manager_function_hands_its_unit_to_its_block(db: DBConnect, block: Block) -> None:
    @asynccontextmanager
    async def unit(*, second: bool) -> AsyncIterator[AsyncSession]:
        async with block(db):
            # There are two yields, and both in a loop, as in a context manager that tries something again.
            for _ in range(1):
                if second:
                    yield await db_session(db)
                else:
                    yield await db_session(db)

    async with new_db_ctx():
        outer = await db_session(db)
        async with unit(second=False) as own:
            assert await db_session(db) is own is not outer
        async with AsyncExitStack() as stack:
            assert await stack.enter_async_context(unit(second=True)) is await db_session(db) is not outer
        assert await db_session(db) is outer
    async with unit(second=False) as own:
        assert await db_session(db) is own


@all_blocks
async def test_a_generator_that_is_stepped_through_to_its_only_yield_hands_its_unit_on(
    db: DBConnect, block: Block
) -> None:
    """Frameworks step in this way through the dependencies of handlers, test frameworks through fixtures."""

    async def dependency() -> AsyncGenerator[AsyncSession]:
        async with block(db):
            yield await db_session(db)

    async with new_db_ctx():
        outer = await db_session(db)
        generator = dependency()
        session = await anext(generator)
        assert await db_session(db) is session
        assert await anext(generator, None) is None
        assert await db_session(db) is outer


async def test_loops_and_errors_around_the_only_yield_do_not_make_a_generator_one_of_rows(db: DBConnect) -> None:
    async def dependency() -> AsyncGenerator[AsyncSession]:
        async with new_db_ctx():
            for _ in range(2):
                await asyncio.sleep(0)
            try:
                async with asyncio.timeout(60):
                    try:
                        yield await db_session(db)
                    except LookupError:
                        for _ in range(2):
                            await asyncio.sleep(0)
                    finally:
                        await asyncio.sleep(0)
            finally:
                while [None async for _ in rows(db, OWN_UNITS["new_db_ctx"])] == []:
                    await asyncio.sleep(0)

    for error in (None, LookupError()):
        generator = dependency()
        session = await anext(generator)
        assert await db_session(db) is session
        with pytest.raises(StopAsyncIteration):
            await (generator.asend(None) if error is None else generator.athrow(error))
        with pytest.raises(ContextNotInitiatedError):
            await db_session(db)


async def test_a_generator_that_uses_a_context_manager_function_has_its_unit_to_itself(db: DBConnect) -> None:
    @asynccontextmanager
    async def unit() -> AsyncIterator[None]:
        async with new_db_ctx():
            yield

    async def numbers() -> AsyncGenerator[int]:
        async with unit():
            own = await db_session(db)
            for number in range(2):
                yield number
                assert await db_session(db) is own

    async with new_db_ctx():
        outer = await db_session(db)
        async for _ in numbers():
            assert await db_session(db) is outer


FIXTURES = """
import pytest
from ctxdb_core import DBConnect, db_session, new_db_ctx

@pytest.fixture
def db():
    return DBConnect.from_url("sqlite+aiosqlite://")

@pytest.fixture(params=[1, 2])
async def session(request, db):
    async with new_db_ctx():
        if request.param == 1:
            yield await db_session(db)
            return
        yield await db_session(db)

@pytest.fixture
def anyio_backend():
    return "asyncio"

{mark}
async def test_the_session_is_the_fixtures(db, session):
    assert await db_session(db) is session
"""


@pytest.mark.parametrize(
    ("mark", "mode"), [("", "auto"), ("@pytest.mark.anyio", "strict")], ids=["pytest-asyncio", "anyio"]
)
def test_a_fixture_hands_its_unit_to_its_test(pytester: pytest.Pytester, mark: str, mode: str) -> None:
    pytester.makepyfile(FIXTURES.replace("{mark}", mark))
    options = ["-o", f"asyncio_mode={mode}", "-o", "asyncio_default_fixture_loop_scope=function"]
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-Werror", *options)
    result.assert_outcomes(passed=2)
