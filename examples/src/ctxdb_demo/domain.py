"""A small bank: accounts, transfers, an audit log. It knows its database and ctxdb, and no web framework.

Every function asks for the session where it needs it: `await db_session(db)`. Within one request that is one session
and one transaction, however many functions take part; the framework's adapter commits it or rolls it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, String, func, or_, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ctxdb_core import close_db_session, commit_db_session, db_session, gather_in_new_ctx, on_commit, run_in_new_ctx
from ctxdb_demo.database import POOL_SIZE, db

RATE_SERVICE_SECONDS = 0.3
CASH_MACHINE_NOTE = 10
STATEMENT_PAGES = 128
STATEMENT_PAGE_BYTES = 64 * 1024


class Base(DeclarativeBase):
    """The base of the tables, whose names begin such that they can be in a user's own database."""


class Account(Base):
    """The money of one owner."""

    __tablename__ = "ctxdb_demo_accounts"

    owner: Mapped[str] = mapped_column(String(40), primary_key=True)
    balance: Mapped[int] = mapped_column(BigInteger, CheckConstraint("balance >= 0"))


class Transfer(Base):
    """Money that went from one account to another.

    The database checks at the commit, and not before, that both accounts exist.
    """

    __tablename__ = "ctxdb_demo_transfers"

    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(ForeignKey(Account.owner, deferrable=True, initially="DEFERRED"))
    target: Mapped[str] = mapped_column(ForeignKey(Account.owner, deferrable=True, initially="DEFERRED"))
    amount: Mapped[int]


class AuditEntry(Base):
    """Something that was asked of the bank, whatever became of it."""

    __tablename__ = "ctxdb_demo_audit"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    event: Mapped[str] = mapped_column(String(200))


class BankError(Exception):
    """The bank refuses; the message may be shown to the customer."""


class UnknownAccountError(BankError):
    """There is no account of that name."""


class InsufficientFundsError(BankError):
    """The account does not hold that much."""


class InvalidAmountError(BankError):
    """An amount is zero or negative."""


class CashMachineError(Exception):
    """The cash machine is jammed. Not the customer's business: nobody handles it."""


async def list_accounts() -> Sequence[Account]:
    """Return all accounts, by owner."""
    session = await db_session(db)
    return (await session.scalars(select(Account).order_by(Account.owner))).all()


async def open_account(owner: str, balance: int) -> Account:
    """Open an account."""
    session = await db_session(db)
    account = Account(owner=owner, balance=balance)
    session.add(account)
    return account


async def withdraw(owner: str, amount: int) -> int:
    """Take `amount` from an account, and return the new balance.

    Raises:
        InsufficientFundsError: there is no account of `owner` with so much in it.
    """
    session = await db_session(db)
    balance: int | None = await session.scalar(
        update(Account)
        .where(Account.owner == owner, Account.balance >= amount)
        .values(balance=Account.balance - amount)
        .returning(Account.balance)
    )
    if balance is None:
        raise InsufficientFundsError(f"{owner} has no account with {amount} in it.")
    return balance


async def deposit(owner: str, amount: int) -> bool:
    """Add `amount` to an account; return whether there is one."""
    session = await db_session(db)
    balance: int | None = await session.scalar(
        update(Account)
        .where(Account.owner == owner)
        .values(balance=Account.balance + amount)
        .returning(Account.balance)
    )
    return balance is not None


async def transfer(source: str, target: str, amount: int) -> Transfer:
    """Move `amount` from one account to another: three statements, one transaction.

    Whether there is a `target` is left to the foreign key. Until the commit fails, all looks well.

    Raises:
        InsufficientFundsError: there is no account of `source` with so much in it.
    """
    await withdraw(source, amount)
    await deposit(target, amount)
    session = await db_session(db)
    moved = Transfer(source=source, target=target, amount=amount)
    session.add(moved)
    await session.flush()
    return moved


async def deposit_each(owner: str, amounts: Sequence[int]) -> None:
    """Make several deposits; those made before one that is refused stay.

    Raises:
        InvalidAmountError: an amount is not positive.
        UnknownAccountError: `owner` has no account.
    """
    for amount in amounts:
        if amount <= 0:
            raise InvalidAmountError(f"A deposit of {amount} is refused.")
        if not await deposit(owner, amount):
            raise UnknownAccountError(f"{owner} has no account.")
        await commit_db_session(db)


async def add_interest(owner: str) -> None:
    """Ask a slow service for the interest rate, and add the interest.

    Raises:
        UnknownAccountError: `owner` has no account.
    """
    session = await db_session(db)
    balance = await session.scalar(select(Account.balance).where(Account.owner == owner))
    if balance is None:
        raise UnknownAccountError(f"{owner} has no account.")
    # The connection goes back to the pool: others may have it while this request waits for something else.
    await close_db_session(db)
    percent = await ask_interest_rate()
    await deposit(owner, balance * percent // 100)


async def ask_interest_rate() -> int:
    """Return the rate, in percent; it takes a while."""
    await asyncio.sleep(RATE_SERVICE_SECONDS)
    return 10


async def pay_out(owner: str, amount: int) -> int:
    """Pay out cash, and return the new balance; what was asked for is kept in the audit log, whatever comes of it.

    Raises:
        InsufficientFundsError: there is no account of `owner` with so much in it.
        CashMachineError: the machine is jammed.
    """
    # A session and a transaction of its own, committed when it returns: it stays if this request is rolled back.
    await run_in_new_ctx(record, f"{owner} asks for {amount}")
    balance = await withdraw(owner, amount)
    if amount % CASH_MACHINE_NOTE:
        raise CashMachineError(f"There are no notes for {amount}.")
    # The money comes out only once the withdrawal is committed.
    on_commit(db, partial(record, f"{owner} was paid {amount}"))
    return balance


async def record(event: str) -> None:
    """Write an entry of the audit log."""
    session = await db_session(db)
    session.add(AuditEntry(event=event))


async def pay_salaries(salaries: Mapping[str, int]) -> list[str]:
    """Pay each owner a salary; return the owners that have no account and were not paid."""
    return [owner for owner, salary in salaries.items() if not await deposit(owner, salary)]


async def pay_bonus(amount: int) -> int:
    """Pay the same bonus to everyone, all at once; return to how many."""
    session = await db_session(db)
    owners = (await session.scalars(select(Account.owner))).all()
    # The bonuses below need connections, so the request that waits for them must not keep its own.
    await commit_db_session(db)
    # Each bonus has a session and a transaction of its own; not so many at once that other requests would have to wait.
    paid = await gather_in_new_ctx(*(partial(deposit, owner, amount) for owner in owners), max_concurrent=POOL_SIZE - 1)
    return paid.count(True)


@dataclass(frozen=True)
class Statement:
    """An account's statement, read from the database in full; writing it down needs the database no more."""

    owner: str
    balance: int
    transfers: Sequence[Transfer]

    async def pages(self) -> AsyncIterator[bytes]:
        """Yield the document page by page: large, so that a slow reader is slow to have it."""
        lines = [f"{each.source} -> {each.target}: {each.amount}" for each in self.transfers]
        text = "\n".join([f"Statement of {self.owner}, balance {self.balance}", *lines, ""])
        page = text.encode().ljust(STATEMENT_PAGE_BYTES)[:STATEMENT_PAGE_BYTES]
        for _ in range(STATEMENT_PAGES):
            yield page


async def read_statement(owner: str) -> Statement:
    """Return the statement of an account.

    Raises:
        UnknownAccountError: `owner` has no account.
    """
    session = await db_session(db)
    account = await session.get(Account, owner)
    if account is None:
        raise UnknownAccountError(f"{owner} has no account.")
    transfers = await session.scalars(
        select(Transfer).where(or_(Transfer.source == owner, Transfer.target == owner)).order_by(Transfer.id)
    )
    return Statement(account.owner, account.balance, transfers.all())
