from __future__ import annotations

import uuid
from decimal import Decimal

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession
from tests.conftest import FakeProvider

from ctxdb_core import run_in_new_ctx
from shop import payments
from shop.database import db
from shop.models import Order, OrderStatus, Payment, PaymentStatus, Product
from shop.worker import LEFT_FOR, while_there_is_any


@pytest.fixture
async def order_id(customer: httpx.AsyncClient, tea: Product) -> int:
    order_id: int = (await customer.post("/orders", json={"quantities": {tea.id: 2}})).json()["id"]
    return order_id


async def test_an_order_is_paid_once(customer: httpx.AsyncClient, order_id: int, provider: FakeProvider) -> None:
    assert (await customer.post(f"/orders/{order_id}/payment")).status_code == 201
    assert (await customer.post(f"/orders/{order_id}/payment")).status_code == 409
    assert list(provider.charged.values()) == [Decimal("9.00")]
    assert (await customer.get(f"/orders/{order_id}")).json()["status"] == "paid"


async def test_a_declined_payment_is_kept_on_record(
    customer: httpx.AsyncClient, order_id: int, provider: FakeProvider, ctxdb_session: AsyncSession
) -> None:
    provider.grants = False
    assert (await customer.post(f"/orders/{order_id}/payment")).status_code == 402
    assert (await ctxdb_session.scalars(select(Payment.status))).all() == [PaymentStatus.DECLINED]
    assert (await customer.get(f"/orders/{order_id}")).json()["status"] == "placed"


async def test_no_connection_is_held_while_the_provider_thinks(
    customer: httpx.AsyncClient, order_id: int, provider: FakeProvider, app: FastAPI
) -> None:
    held = []

    class Looking(FakeProvider):
        async def charge(self, payment_id: uuid.UUID, amount: Decimal) -> bool:
            held.append(sum(unit.in_transaction for unit in db.status().units))
            return True

    app.dependency_overrides[payments.get_provider] = Looking
    assert (await customer.post(f"/orders/{order_id}/payment")).status_code == 201
    assert held == [0]


async def test_a_payment_that_was_left_pending_is_settled_by_the_worker(
    customer: httpx.AsyncClient, order_id: int, provider: FakeProvider, ctxdb_session: AsyncSession, app: FastAPI
) -> None:
    class Broken(FakeProvider):
        async def charge(self, payment_id: uuid.UUID, amount: Decimal) -> bool:
            raise httpx.ConnectError("the provider is down")

    app.dependency_overrides[payments.get_provider] = Broken
    with pytest.raises(httpx.ConnectError):
        await customer.post(f"/orders/{order_id}/payment")
    assert (await ctxdb_session.get_one(Order, order_id)).status is OrderStatus.PAYING
    await ctxdb_session.execute(update(Payment).values(begun=Payment.begun - LEFT_FOR * 2))
    await ctxdb_session.commit()

    await while_there_is_any(payments.settle_next_left, LEFT_FOR, provider)
    assert (await customer.get(f"/orders/{order_id}")).json()["status"] == "paid"
    assert not await run_in_new_ctx(payments.settle_next_left, LEFT_FOR, provider)
