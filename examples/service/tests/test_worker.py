from __future__ import annotations

from datetime import timedelta

import httpx
import pytest
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession
from tests.conftest import FakeProvider

from shop import mails, orders, payments
from shop.models import Mail, Order, OrderStatus, Product
from shop.worker import UNPAID_FOR, create_scheduler, while_there_is_any


class Post:
    """Keeps the mails, and refuses mails to some addresses."""

    def __init__(self, *refuses: str) -> None:
        self.sent: list[str] = []
        self.refuses = refuses

    async def send(self, to: str, subject: str) -> None:
        if subject in self.refuses:
            raise ConnectionError(subject)
        self.sent.append(subject)


@pytest.mark.usefixtures("customer")
async def test_a_mail_is_sent_once() -> None:
    post = Post()
    await while_there_is_any(mails.send_next, post)
    await while_there_is_any(mails.send_next, post)
    assert post.sent == ["Welcome"]


@pytest.mark.usefixtures("customer")
async def test_a_mail_that_could_not_be_sent_is_sent_later(ctxdb_session: AsyncSession) -> None:
    with pytest.raises(ConnectionError):
        await while_there_is_any(mails.send_next, Post("Welcome"))
    assert (await ctxdb_session.scalars(select(Mail.sent))).all() == [None]
    post = Post()
    await while_there_is_any(mails.send_next, post)
    assert post.sent == ["Welcome"]


async def test_an_order_that_nobody_pays_is_cancelled(
    customer: httpx.AsyncClient, tea: Product, ctxdb_session: AsyncSession
) -> None:
    order = (await customer.post("/orders", json={"quantities": {tea.id: 1}})).json()
    await while_there_is_any(orders.cancel_next_unpaid, UNPAID_FOR)
    assert (await customer.get(f"/orders/{order['id']}")).json()["status"] == OrderStatus.PLACED
    await ctxdb_session.execute(update(Order).values(placed=Order.placed - UNPAID_FOR - timedelta(seconds=1)))
    await ctxdb_session.commit()
    await while_there_is_any(orders.cancel_next_unpaid, UNPAID_FOR)
    assert (await customer.get(f"/orders/{order['id']}")).json()["status"] == OrderStatus.CANCELLED


def test_the_scheduler_has_each_job(provider: FakeProvider) -> None:
    jobs = {job.args[0] for job in create_scheduler(Post(), provider).get_jobs()}
    assert jobs == {mails.send_next, payments.settle_next_left, orders.cancel_next_unpaid}
