"""Health checks for an orchestrator."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select

from ctxdb_core import db_session
from shop.database import db

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> dict[str, str]:
    """Say that the process answers. It asks no database: a restart of this process would not mend that."""
    return {"status": "alive"}


@router.get("/ready")
async def ready() -> dict[str, str]:
    """Say that requests can be served: the database answers, by a connection of the pool."""
    await (await db_session(db)).execute(select(1))
    return {"status": "ready"}
