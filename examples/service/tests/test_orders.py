from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core import db_session, gather_in_new_ctx, new_db_ctx
from shop import orders
from shop.database import db
from shop.errors import OutOfStockError
from shop.models import Category, Coupon, Mail, Order, OrderStatus, Product, Stock, User


async def stock_of(session: AsyncSession, product: Product) -> int:
    return (await session.scalars(select(Stock.quantity).where(Stock.product_id == product.id))).one()


async def test_an_order_takes_from_the_stock(
    customer: httpx.AsyncClient, tea: Product, ctxdb_session: AsyncSession
) -> None:
    placed = await customer.post("/orders", json={"quantities": {tea.id: 2}})
    assert placed.status_code == 201
    assert placed.json()["total"] == "9.00"
    assert await stock_of(ctxdb_session, tea) == 1
    assert "Your order" in (await ctxdb_session.scalars(select(Mail.subject).order_by(Mail.id.desc()))).all()[0]


async def test_an_order_for_too_many_leaves_nothing_behind(
    customer: httpx.AsyncClient, tea: Product, ctxdb_session: AsyncSession
) -> None:
    refused = await customer.post("/orders", json={"quantities": {tea.id: 4}})
    assert (refused.status_code, refused.json()["detail"]) == (409, "There are 3 of tea left.")
    assert await stock_of(ctxdb_session, tea) == 3
    assert (await customer.get("/orders")).json() == []


async def test_a_coupon_reduces_the_total_until_it_is_used_up(
    customer: httpx.AsyncClient, tea: Product, ctxdb_session: AsyncSession
) -> None:
    ctxdb_session.add(Coupon(code="HALF", percent=50, uses_left=1))
    await ctxdb_session.commit()
    order = {"quantities": {tea.id: 1}, "coupon": "HALF"}
    assert (await customer.post("/orders", json=order)).json()["total"] == "2.25"
    assert (await customer.post("/orders", json=order)).status_code == 409
    assert await stock_of(ctxdb_session, tea) == 2


async def test_a_cancelled_order_goes_back_to_the_stock(
    customer: httpx.AsyncClient, tea: Product, ctxdb_session: AsyncSession
) -> None:
    order = (await customer.post("/orders", json={"quantities": {tea.id: 3}})).json()
    assert (await customer.delete(f"/orders/{order['id']}")).status_code == 204
    assert await stock_of(ctxdb_session, tea) == 3
    assert (await customer.delete(f"/orders/{order['id']}")).status_code == 409


async def test_orders_need_a_login(client: httpx.AsyncClient, tea: Product) -> None:
    assert (await client.post("/orders", json={"quantities": {tea.id: 1}})).status_code == 401


# Functions can be called without an application, too: in a unit of work.


@pytest.fixture
async def shelf(ctxdb_clean_tables: None) -> AsyncIterator[tuple[User, Product]]:
    """A customer and a product with a stock of three, really committed: the tables are cleaned after the test."""
    async with new_db_ctx():
        user = User(email="eve@example.org", hashed_password="")
        product = Product(name="rice", price=Decimal(2), category=Category(name="food"), stock=Stock(quantity=3))
        (await db_session(db)).add_all([user, product])
    yield user, product
    await db.close()


async def test_orders_at_the_same_time_do_not_sell_more_than_there_is(shelf: tuple[User, Product]) -> None:
    user, product = shelf

    async def buy() -> Order | OutOfStockError:
        try:
            return await orders.place(user.id, {product.id: 1})
        except OutOfStockError as error:
            return error

    results = await asyncio.wait_for(gather_in_new_ctx(*[buy] * 5), 30)
    assert sorted(type(result).__name__ for result in results) == ["Order"] * 3 + ["OutOfStockError"] * 2
    async with new_db_ctx():
        assert await stock_of(await db_session(db), product) == 0
        placed = select(Order).where(Order.status == OrderStatus.PLACED)
        assert len((await (await db_session(db)).scalars(placed)).all()) == 3
