"""Payments on a primary with replicas, as a FastAPI application: writes go to the master, reads to fresh replicas.

No handler knows a host. A session of `master` is on the host that is the master now; a session of `replica` is on a
replica that is in sync, and that has replayed what the same client wrote before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ctxdb_core import DBConnect, db_session
from ctxdb_core.adapters import close_all
from ctxdb_pgstatus import HostMonitor, PgStatusClient, PgStatusError, ReadYourWrites, follow_master, follow_replica
from ctxdb_starlette import DBSessionMiddleware


class Base(DeclarativeBase):
    """The tables."""


class Payment(Base):
    """Money that was sent."""

    __tablename__ = "ctxdb_demo_payments"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    amount: Mapped[int]


class PaymentModel(BaseModel):
    """A payment, as clients send and get it."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    amount: int


async def answer_unavailable(request: Request, exc: Exception) -> JSONResponse:
    # No master at the moment, or no longer the one that took the write: the client may try again.
    return JSONResponse({"detail": str(exc)}, status_code=503, headers={"retry-after": "1"})


def create_app(
    source: HostMonitor | PgStatusClient, create_engine: Callable[[str], AsyncEngine], secret: str
) -> FastAPI:
    """Return the application.

    Args:
        source: what knows the hosts; to be entered, and left, by the caller.
        create_engine: returns the engine for a host.
        secret: signs the cookies that say what a client has written.
    """
    master = DBConnect(create_engine, before_create_session_handler=follow_master(source))
    replica = DBConnect(create_engine, before_create_session_handler=follow_replica(source, sync="time_or_bytes"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await close_all(master, replica)

    app = FastAPI(title="Payments", lifespan=lifespan, exception_handlers={PgStatusError: answer_unavailable})
    app.state.master, app.state.replica = master, replica
    app.add_middleware(DBSessionMiddleware)
    app.add_middleware(ReadYourWrites(source, secret=secret))

    @app.post("/payments", status_code=201)
    async def send_payment(new: PaymentModel) -> None:
        session = await db_session(master)
        session.add(Payment(id=new.id, amount=new.amount))

    @app.get("/payments/{payment_id}")
    async def get_payment(payment_id: str) -> PaymentModel:
        session = await db_session(replica)
        payment = await session.get(Payment, payment_id)
        if payment is None:
            raise HTTPException(404, "There is no such payment.")
        return PaymentModel.model_validate(payment)

    return app
