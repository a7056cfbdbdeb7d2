"""What an application finds in the tests' table."""

from __future__ import annotations

from sqlalchemy import select
from tests.support.database import Item

from ctxdb_core import DBConnect, new_non_ctx_session


async def names(db: DBConnect) -> list[str]:
    """Return the items that a further session of the application sees."""
    async with new_non_ctx_session(db) as session:
        return list((await session.scalars(select(Item.name).order_by(Item.name))).all())
