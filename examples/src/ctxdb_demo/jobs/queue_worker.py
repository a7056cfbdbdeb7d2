"""A worker on a queue in PostgreSQL: ``python -m ctxdb_demo.jobs.queue_worker``, with ``DATABASE_URL`` set.

A program that wants something done adds an `Order` in a transaction of its own: the order is there if and only if that
transaction was committed. Each worker takes an order, carries it out and removes it in one unit of work, so it is
carried out once, or not at all and is still there. As many workers may run as connections are left, in as many
processes.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import datetime, timedelta

from sqlalchemy import DateTime, func, select
from sqlalchemy.orm import Mapped, mapped_column

from ctxdb_core import db_session, new_db_ctx, run_in_new_ctx
from ctxdb_demo import domain
from ctxdb_demo.database import db
from ctxdb_demo.jobs.shutdown import stop_on_signals

logger = logging.getLogger(__name__)

WORKERS = 4
ATTEMPTS = 5
FIRST_PAUSE = timedelta(seconds=1)
IDLE_SECONDS = 1.0


class Order(domain.Base):
    """A transfer that a customer has ordered, and that a worker makes."""

    __tablename__ = "ctxdb_demo_orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str]
    target: Mapped[str]
    amount: Mapped[int]
    due: Mapped[datetime | None] = mapped_column(DateTime(timezone=True), server_default=func.now(), index=True)
    """When it may be tried; never again if there is no time."""
    failures: Mapped[int] = mapped_column(server_default="0")
    error: Mapped[str | None]


async def handle_next() -> bool:
    """Carry out one order; return whether there was one that is due.

    If anything goes wrong, all of it is rolled back; in another unit of work, the order is put off then.
    """
    order_id: int | None = None
    try:
        async with new_db_ctx():
            session = await db_session(db)
            # The row stays locked until the unit of work ends, and other workers pass it by. If this process dies, the
            # server rolls back, and the order is free again.
            due = select(Order).where(Order.due <= func.now()).order_by(Order.due, Order.id)
            order = await session.scalar(due.limit(1).with_for_update(skip_locked=True))
            if order is None:
                return False
            # The id is noted now, as a roll-back expires the object's attributes.
            order_id = order.id
            await domain.transfer(order.source, order.target, order.amount)
            await session.delete(order)
    except Exception as exc:
        if order_id is None:
            raise
        logger.warning("Order %d failed", order_id, exc_info=exc)
        await run_in_new_ctx(put_off, order_id, repr(exc))
    return True


async def put_off(order_id: int, error: str) -> None:
    """Note a failure: the order is tried again, after a longer pause each time, and after `ATTEMPTS` not any more."""
    session = await db_session(db)
    order = await session.get(Order, order_id, with_for_update=True)
    if order is not None:
        order.failures += 1
        order.error = error
        order.due = None if order.failures >= ATTEMPTS else func.now() + FIRST_PAUSE * 2 ** (order.failures - 1)


async def work(stop: asyncio.Event) -> None:
    """Carry out orders until `stop` is set; then the one that is under way is the last."""
    while not stop.is_set():
        try:
            idle = not await handle_next()
        except Exception:
            # Without the database, no order can be had. It may come back.
            logger.exception("No order could be taken")
            idle = True
        if idle:
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_SECONDS):
                    await stop.wait()


async def run() -> None:
    """Run the workers until a signal stops them."""
    async with db:
        with stop_on_signals() as stop:
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(WORKERS):
                        workers.create_task(work(stop))
            except asyncio.CancelledError:
                if not stop.is_set():
                    raise
                logger.warning("What was under way took too long: it was rolled back, and is done by the next worker")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(run())
