"""Migrations run on the engine of the service's own `DBConnect`."""

from __future__ import annotations

import asyncio

from alembic import context
from sqlalchemy import Connection

from shop.database import db
from shop.models import Base


def migrate(connection: Connection) -> None:
    """Run the scripts that the command at hand asks for."""
    context.configure(connection=connection, target_metadata=Base.metadata, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    """Run them on a connection, and close it."""
    async with (await db.engine()).begin() as connection:
        await connection.run_sync(migrate)
    await db.close()


asyncio.run(main())
