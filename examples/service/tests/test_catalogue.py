from __future__ import annotations

import httpx
from sqlalchemy.ext.asyncio import AsyncSession

from shop.models import Product

COCOA = {"name": "cocoa", "price": "3.20", "category": "drinks", "quantity": 7}


async def test_an_employee_adds_a_product(employee: httpx.AsyncClient, ctxdb_session: AsyncSession) -> None:
    added = await employee.post("/products", json=COCOA)
    assert added.status_code == 201
    assert (await ctxdb_session.get_one(Product, added.json()["id"])).name == "cocoa"


async def test_a_customer_adds_no_product(customer: httpx.AsyncClient) -> None:
    assert (await customer.post("/products", json=COCOA)).status_code == 403


async def test_a_product_has_a_name_of_its_own(employee: httpx.AsyncClient, tea: Product) -> None:
    assert (await employee.post("/products", json=COCOA | {"name": tea.name})).status_code == 409


async def test_the_catalogue_is_read_by_pages(employee: httpx.AsyncClient, tea: Product) -> None:
    await employee.post("/products", json=COCOA)
    first = (await employee.get("/products", params={"limit": 1})).json()
    second = (await employee.get("/products", params={"limit": 1, "after": first[0]["id"]})).json()
    assert [product["name"] for product in first + second] == ["tea", "cocoa"]


async def test_an_unknown_product_is_not_found(client: httpx.AsyncClient) -> None:
    assert (await client.get("/products/0")).status_code == 404


async def test_only_a_product_that_was_bought_can_be_reviewed(customer: httpx.AsyncClient, tea: Product) -> None:
    reviews = f"/products/{tea.id}/reviews"
    assert (await customer.post(reviews, json={"stars": 5})).status_code == 403
    order = (await customer.post("/orders", json={"quantities": {tea.id: 1}})).json()
    await customer.post(f"/orders/{order['id']}/payment")
    assert (await customer.post(reviews, json={"stars": 5, "words": "green"})).status_code == 201
    assert (await customer.post(reviews, json={"stars": 1})).status_code == 409
    assert [review["words"] for review in (await customer.get(reviews)).json()] == ["green"]
