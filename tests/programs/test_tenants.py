"""Tenants kept apart by row-level security: what a transaction needs for it is set in all transactions of a request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from tests.support.application import Reply, Stream, current_request
from tests.support.database import eventually
from tests.support.world import World

from ctxdb_core import commit_db_session, db_session, on_begin


@pytest.fixture(autouse=True)
async def notes(world: World) -> AsyncIterator[None]:
    role = f"tenant_{world.database.name}"
    for statement in (
        "CREATE TABLE note (tenant TEXT DEFAULT current_setting('app.tenant', true), body TEXT)",
        "INSERT INTO note VALUES ('ada', 'secret of ada'), ('bob', 'secret of bob')",
        "ALTER TABLE note ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY own ON note USING (tenant = current_setting('app.tenant', true))",
        f"CREATE ROLE {role}",
        f"GRANT ALL ON note TO {role}",
    ):
        await world.database.query(statement)
    yield
    await world.stop()
    await world.database.query("DROP TABLE note")
    await world.database.query(f"DROP ROLE {role}")


async def log_in(world: World) -> AsyncSession:
    """Make all transactions of the request those of its tenant, as a dependency or a middleware does."""
    tenant = current_request.get().query

    async def become(session: AsyncSession) -> None:
        await session.execute(text(f"SET LOCAL ROLE tenant_{world.database.name}"))
        await session.execute(text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant})

    on_begin(world.db, become)
    return await db_session(world.db)


async def read(world: World) -> str:
    return ", ".join(await (await db_session(world.db)).scalars(text("SELECT body FROM note")))


async def test_a_streamed_export_shows_the_rows_of_its_tenant_alone(world: World) -> None:
    async def export() -> Stream:
        await log_in(world)
        opened = await read(world)

        async def body() -> AsyncGenerator[str]:
            yield opened
            yield "; " + await read(world)
            await commit_db_session(world.db)
            yield "; " + await read(world)

        return Stream(body())

    client = await world.start(("/", export))
    for tenant in ("ada", "bob"):
        assert (await client.get(f"/?{tenant}")).text == "; ".join([f"secret of {tenant}"] * 3)


@pytest.mark.background
async def test_background_work_writes_as_its_tenant(world: World) -> None:
    seen: list[str] = []

    async def order() -> Reply:
        await log_in(world)
        tenant = await read(world)

        async def work() -> None:
            await (await db_session(world.db)).execute(text("INSERT INTO note (body) VALUES ('by mail')"))
            seen.append(await read(world))

        return Reply(tenant, background=work)

    client = await world.start(("/", order))
    assert (await client.get("/?ada")).text == "secret of ada"
    await eventually(lambda: bool(seen), "the background work does not end")
    await world.database.assert_quiet()
    assert seen == ["secret of ada, by mail"]
    assert ("ada", "by mail") in await world.database.query("SELECT tenant, body FROM note")
