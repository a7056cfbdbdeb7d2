"""Tasks of a broker, with taskiq: in production on RabbitMQ, Redis or NATS, here on its in-memory broker.

A worker runs them by ``taskiq worker ctxdb_demo.jobs.tasks:broker``. Each call of a task is a unit of work, and brokers
deliver at least once: so each call notes its id in the transaction that does the work, and the second one does nothing.
"""

from __future__ import annotations

from functools import partial

from sqlalchemy import String
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, mapped_column
from taskiq import Context, InMemoryBroker, SimpleRetryMiddleware, TaskiqDepends, TaskiqEvents, TaskiqState

from ctxdb_core import db_session, new_db_ctx, on_commit
from ctxdb_demo import domain
from ctxdb_demo.database import db

broker = InMemoryBroker().with_middlewares(SimpleRetryMiddleware(default_retry_count=3))


class FinishedTask(domain.Base):
    """A call of a task that was committed; the old ones can be deleted once no broker delivers them any more."""

    __tablename__ = "ctxdb_demo_finished_tasks"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)


@broker.task(retry_on_error=True)
async def transfer(
    source: str,
    target: str,
    amount: int,
    context: Context = TaskiqDepends(),  # noqa: B008 - this is how taskiq is told what to provide
) -> bool:
    """Move money between accounts; return whether this call did it, and not an earlier one.

    Whatever it raises rolls everything back, the error of a commit included, and the broker delivers it anew.
    """
    async with new_db_ctx():
        session = await db_session(db)
        call = insert(FinishedTask).values(id=context.message.task_id).on_conflict_do_nothing()
        if not (await session.execute(call.returning(FinishedTask.id))).first():
            return False
        await domain.transfer(source, target, amount)
    return True


async def order_transfer(source: str, target: str, amount: int) -> None:
    """Have a transfer made later, from wherever a session is at hand: from the handler of a request, for instance.

    The broker hears of it once what was written here has been committed, and never if it is rolled back.
    """
    await domain.record(f"{source} orders {amount} for {target}")
    on_commit(db, partial(transfer.kiq, source, target, amount))


async def close(state: TaskiqState) -> None:
    """Close the connections, when no task runs any more."""
    await db.close()


broker.add_event_handler(TaskiqEvents.WORKER_SHUTDOWN, close)
