"""A script that pays salaries: ``python -m ctxdb_demo.jobs.payroll salaries.csv``, with ``DATABASE_URL`` set.

The file has lines such as ``ada,2500``. They are paid in batches, each in a transaction of its own, together with the
note of how far it has come. However the script ends, call it again: it goes on where it stopped, and pays nobody twice.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import String
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Mapped, mapped_column

from ctxdb_core import TransactionContext, retry_on_conflict
from ctxdb_demo import domain
from ctxdb_demo.database import db
from ctxdb_demo.jobs.shutdown import stop_on_signals

BATCH = 100

context = TransactionContext(db)


class Payroll(domain.Base):
    """How many lines of a file have been paid."""

    __tablename__ = "ctxdb_demo_payrolls"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    paid: Mapped[int]


class Salary(NamedTuple):
    """A line of the file."""

    owner: str
    amount: int


# A batch that is in the way of another transaction is paid anew. One whose connection breaks is not: during a commit,
# nobody could tell whether that has succeeded. The next call of the script finds out.
@retry_on_conflict()
async def pay_batch(name: str, salaries: Sequence[Salary]) -> int:
    """Pay the next lines of a payroll, all or none; return how many these were: 0 once all are paid.

    Raises:
        UnknownAccountError: one of the owners has no account.
    """
    # The session of the attempt, which is committed at the end of the attempt.
    async with context.session() as session:
        await context.execute(insert(Payroll).values(name=name, paid=0).on_conflict_do_nothing())
        # Locked: a second script with the same file waits here, and then goes on behind this batch.
        payroll = await session.get_one(Payroll, name, with_for_update=True)
        batch = salaries[payroll.paid : payroll.paid + BATCH]
        for number, salary in enumerate(batch, start=payroll.paid + 1):
            # The bank's functions know nothing of this script: `db_session(db)` in them is the session of this block.
            if not await domain.deposit(salary.owner, salary.amount):
                raise domain.UnknownAccountError(f"line {number}: {salary.owner} has no account.")
        payroll.paid += len(batch)
    return len(batch)


async def pay(name: str, salaries: Sequence[Salary], stop: asyncio.Event) -> bool:
    """Pay a payroll, until it is paid or `stop` is set; return whether it is paid."""
    while not stop.is_set():
        if not await pay_batch(name, salaries):
            return True
    return False


async def run(path: Path) -> int:
    """Pay the payroll in a file, and return the exit status."""
    with path.open(encoding="utf-8", newline="") as file:
        salaries = [Salary(owner, int(amount)) for owner, amount in csv.reader(file)]
    async with db:
        try:
            with stop_on_signals() as stop:
                paid = await pay(path.name, salaries, stop)
        except domain.BankError as exc:
            print(f"{path.name}: {exc} The batch with this line was not paid.", file=sys.stderr)
            return 1
        except asyncio.CancelledError:
            paid = False
    if not paid:
        print(f"{path.name}: stopped. Call this again for the rest.", file=sys.stderr)
    return 0 if paid else 3


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Pay the salaries in a file.")
    parser.add_argument("file", type=Path)
    return asyncio.run(run(parser.parse_args().file))


if __name__ == "__main__":
    sys.exit(main())
