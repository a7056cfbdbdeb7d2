"""The work outside of requests, by APScheduler: ``python -m shop.worker``. Several workers may run at once."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial

from apscheduler.schedulers.asyncio import AsyncIOScheduler

from ctxdb_core import run_in_new_ctx
from shop import mails, orders, payments
from shop.database import db

logger = logging.getLogger(__name__)

UNPAID_FOR = timedelta(days=3)
LEFT_FOR = timedelta(minutes=15)


class LoggingPost:
    """Prints mails instead of sending them: put your mail service here."""

    async def send(self, to: str, subject: str) -> None:
        """Print a mail."""
        logger.info("to %s: %s", to, subject)


async def while_there_is_any(work: Callable[..., Awaitable[bool]], *args: object) -> None:
    """Do one piece of work after the other until none is left, each in a unit of work of its own."""
    while await run_in_new_ctx(work, *args):
        pass


def create_scheduler(post: mails.Post, provider: payments.Provider) -> AsyncIOScheduler:
    """Return the scheduler with its jobs. A job that fails is logged by it, rolled back, and comes again."""
    scheduler = AsyncIOScheduler(job_defaults={"coalesce": True, "max_instances": 1})
    add = partial(scheduler.add_job, while_there_is_any, "interval")
    add(seconds=5, args=[mails.send_next, post], name="send mails")
    add(minutes=1, args=[payments.settle_next_left, LEFT_FOR, provider], name="settle payments")
    add(minutes=10, args=[orders.cancel_next_unpaid, UNPAID_FOR], name="cancel unpaid orders")
    return scheduler


async def main() -> None:
    """Run until the process is told to end."""
    logging.basicConfig(level=logging.INFO)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    scheduler = create_scheduler(LoggingPost(), payments.get_provider())
    scheduler.start()
    await told.wait()
    scheduler.shutdown(wait=False)
    await db.close()


if __name__ == "__main__":
    asyncio.run(main())
