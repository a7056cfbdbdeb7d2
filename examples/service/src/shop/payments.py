"""Payments, by a provider that is asked over the network: no connection and no lock is held meanwhile."""

from __future__ import annotations

import uuid
from datetime import timedelta
from decimal import Decimal
from typing import Protocol

import httpx
from sqlalchemy import func, select

from ctxdb_core import commit_db_session, db_session
from shop import mails, orders, settings
from shop.database import db
from shop.errors import OrderStatusError, PaymentDeclinedError
from shop.models import Order, OrderStatus, Payment, PaymentStatus, User


class Provider(Protocol):
    """A provider of payments, which moves the money."""

    async def charge(self, payment_id: uuid.UUID, amount: Decimal) -> bool:
        """Take the amount, once for each `payment_id` however often it is asked; return whether it was granted."""


class HTTPProvider:
    """A provider that is asked by HTTP."""

    async def charge(self, payment_id: uuid.UUID, amount: Decimal) -> bool:
        async with httpx.AsyncClient(base_url=settings.PAYMENTS_URL, timeout=10) as client:
            answer = await client.put(f"/charges/{payment_id}", json={"amount": str(amount)})
        if answer.status_code == httpx.codes.PAYMENT_REQUIRED:
            return False
        answer.raise_for_status()
        return True


def get_provider() -> Provider:
    """Return the provider; a dependency, so that tests can have another one."""
    return HTTPProvider()


async def pay(user_id: uuid.UUID, order_id: int, provider: Provider) -> Payment:
    """Pay an order.

    Raises:
        OrderStatusError: it is paid, cancelled, or being paid.
        PaymentDeclinedError: the provider refuses.
    """
    order = await orders.get_of_user(user_id, order_id, lock=True)
    if order.status is not OrderStatus.PLACED:
        raise OrderStatusError(f"Order {order.id} is {order.status}.")
    order.status = OrderStatus.PAYING
    payment = Payment(id=uuid.uuid4(), order_id=order.id, amount=order.total)
    (await db_session(db)).add(payment)
    settled = await settle(payment, provider)
    if settled.status is PaymentStatus.DECLINED:
        raise PaymentDeclinedError("The payment was declined.")
    return settled


async def settle(payment: Payment, provider: Provider) -> Payment:
    """Ask the provider for a payment that is pending, and note what it has answered. It may be repeated."""
    # From here on the payment is on record, whatever becomes of this process; and the connection is in the pool while
    # the provider thinks.
    await commit_db_session(db)
    granted = await provider.charge(payment.id, payment.amount)
    session = await db_session(db)
    order = await session.get_one(Order, payment.order_id, with_for_update=True)
    payment = await session.get_one(Payment, payment.id, populate_existing=True)
    if payment.status is PaymentStatus.PENDING:
        payment.status = PaymentStatus.PAID if granted else PaymentStatus.DECLINED
        order.status = OrderStatus.PAID if granted else OrderStatus.PLACED
        user = await session.get_one(User, order.user_id)
        await mails.write(user.email, f"Your order {order.id} is {'paid' if granted else 'not paid'}")
    # An answer of 402 rolls back the request's open work: the status, which shall stay, is committed before.
    await commit_db_session(db)
    return payment


async def settle_next_left(after: timedelta, provider: Provider) -> bool:
    """Settle the oldest payment that a process has left behind, and return whether there was one."""
    query = select(Payment).where(Payment.status == PaymentStatus.PENDING, Payment.begun < func.now() - after)
    payment = await (await db_session(db)).scalar(query.order_by(Payment.begun).limit(1))
    if payment is None:
        return False
    await settle(payment, provider)
    return True
