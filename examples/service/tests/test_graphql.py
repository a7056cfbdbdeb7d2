from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from shop.models import Coupon, Product, Stock

PLACE = """
mutation Place($product: ID!, $quantity: Int!, $coupon: String) {
    placeOrder(items: [{product: $product, quantity: $quantity}], coupon: $coupon) { status total }
}
"""


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "strawberry.execution")


async def ask(client: httpx.AsyncClient, query: str, **variables: Any) -> Any:
    answer = await client.post("/graphql", json={"query": query, "variables": variables})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_products_come_with_their_reviews(client: httpx.AsyncClient, tea: Product) -> None:
    answer = await ask(client, "{ products { name price reviews { stars } } orders: products { reviews { words } } }")
    assert answer["data"]["products"] == [{"name": "tea", "price": "4.50", "reviews": []}]


async def test_an_order_is_placed(customer: httpx.AsyncClient, tea: Product) -> None:
    answer = await ask(customer, PLACE, product=tea.id, quantity=2)
    assert answer["data"]["placeOrder"] == {"status": "placed", "total": "9.00"}
    assert [order["total"] for order in (await customer.get("/orders")).json()] == ["9.00"]


async def test_a_failed_mutation_is_rolled_back_behind_its_200(
    customer: httpx.AsyncClient, tea: Product, ctxdb_session: AsyncSession
) -> None:
    ctxdb_session.add(Coupon(code="GONE", percent=10, uses_left=0))
    await ctxdb_session.commit()
    answer = await ask(customer, PLACE, product=tea.id, quantity=2, coupon="GONE")
    assert answer["errors"][0]["message"] == "The coupon GONE is not valid."
    assert (await ctxdb_session.scalars(select(Stock.quantity))).one() == 3


async def test_orders_are_for_customers(client: httpx.AsyncClient) -> None:
    assert (await ask(client, "{ orders { total } }"))["errors"][0]["message"] == "You are not logged in."
