"""The database of the benchmarks: one table, one SELECT, one INSERT, and the engines that run them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from sqlalchemy import Column, Integer, MetaData, String, Table, bindparam, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

Work: TypeAlias = Callable[[AsyncSession], Awaitable[None]]
"""What a handler does with its session: the same for everyone who is compared."""

EngineOptions: TypeAlias = dict[str, Any]

_metadata = MetaData()
_items = Table("benchmark_items", _metadata, Column("id", Integer, primary_key=True), Column("name", String(50)))

_SELECT = select(_items.c.name).where(_items.c.id == bindparam("item"))
_INSERT = insert(_items)


async def read(session: AsyncSession) -> None:
    """Run one SELECT that finds one row by its primary key."""
    result = await session.execute(_SELECT, {"item": 1})
    result.scalar_one()


async def write(session: AsyncSession) -> None:
    """Run one INSERT of one row."""
    await session.execute(_INSERT, {"name": "written"})


def pool_of(size: int, timeout: float = 30.0) -> EngineOptions:
    """Return the engine options for a pool of exactly `size` connections."""
    return {"pool_size": size, "max_overflow": 0, "pool_timeout": timeout}


def create_engine(url: str, options: EngineOptions) -> AsyncEngine:
    """Return an engine with `options`, which the caller disposes of."""
    return create_async_engine(url, **options)


async def create_table(url: str) -> None:
    """Create the table, with one row, anew."""
    engine = create_engine(url, pool_of(1))
    try:
        async with engine.begin() as connection:
            await connection.run_sync(_metadata.drop_all)
            await connection.run_sync(_metadata.create_all)
            await connection.execute(_INSERT, {"name": "read"})
    finally:
        await engine.dispose()


async def drop_table(url: str) -> None:
    """Remove the table, as the database may be a user's."""
    engine = create_engine(url, pool_of(1))
    try:
        async with engine.begin() as connection:
            await connection.run_sync(_metadata.drop_all)
    finally:
        await engine.dispose()
