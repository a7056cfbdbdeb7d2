"""Mails: written by requests, sent by the worker."""

from __future__ import annotations

from typing import Protocol

from sqlalchemy import func, select

from ctxdb_core import db_session
from shop.database import db
from shop.models import Mail


class Post(Protocol):
    """A service that sends mails."""

    async def send(self, to: str, subject: str) -> None:
        """Send a mail, or raise."""


async def write(to: str, subject: str) -> None:
    """Have a mail sent if the transaction is committed, and not otherwise."""
    (await db_session(db)).add(Mail(recipient=to, subject=subject))


async def send_next(post: Post) -> bool:
    """Send the oldest mail that is left, and return whether there was one.

    Its row is locked meanwhile, so that other workers take the next one. If sending fails, the mail stays as it was.
    """
    session = await db_session(db)
    mail = await session.scalar(
        select(Mail).where(Mail.sent.is_(None)).order_by(Mail.id).limit(1).with_for_update(skip_locked=True)
    )
    if mail is None:
        return False
    await post.send(mail.recipient, mail.subject)
    mail.sent = func.now()
    return True
