"""Code that was written for a session of its own: it closes the session that it is given, or commits it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Reply
from tests.support.database import Item, insert
from tests.support.world import World

from ctxdb_core import SessionOwnedError, db_session, joining_session


async def closes_the_session(session: AsyncSession) -> None:
    try:
        session.add(Item(name="note"))
    finally:
        await session.close()


async def uses_the_session_as_a_block(session: AsyncSession) -> None:
    async with session:
        await session.execute(text("INSERT INTO item VALUES ('note')"))


async def only_reads_in_the_block(session: AsyncSession) -> None:
    async with session:
        await session.scalar(text("SELECT 1"))


@pytest.mark.exception_handlers
@pytest.mark.parametrize("helper", [closes_the_session, uses_the_session_as_a_block, only_reads_in_the_block])
async def test_a_helper_that_closes_the_requests_session_loses_nothing_behind_a_success(
    world: World, helper: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    async def order() -> Reply:
        await helper(await insert(world.db, "order"))
        return Reply()

    world.application.exception_statuses[SessionOwnedError] = 501
    assert (await world.get(order)).status_code == 501
    assert await world.names() == []


async def test_a_helper_that_closes_a_session_which_has_only_read_is_left_alone(world: World) -> None:
    async def order() -> Reply:
        await only_reads_in_the_block(await db_session(world.db))
        await insert(world.db, "order")
        return Reply()

    assert (await world.get(order)).status_code == 200
    assert await world.names() == ["order"]


async def register(session: AsyncSession, name: str) -> None:
    """Do as a library does that commits the session that it is given."""
    session.add(Item(name=name))
    await session.commit()
    item = await session.get_one(Item, name)
    await session.refresh(item)


@pytest.mark.parametrize("status", [201, 409])
async def test_a_library_that_commits_is_committed_with_the_response(world: World, status: int) -> None:
    async def sign_up() -> Reply:
        await insert(world.db, "invitation")
        async with joining_session(world.db) as session:
            await register(session, "user")
        await insert(world.db, "welcome")
        return Reply(status=status)

    assert (await world.get(sign_up)).status_code == status
    assert await world.names() == (["invitation", "user", "welcome"] if status == 201 else [])
