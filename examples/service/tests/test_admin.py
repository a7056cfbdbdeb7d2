from __future__ import annotations

import httpx
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from shop.admin import VIEWS
from shop.models import Category

LOGIN = {"username": "ada@example.org", "password": "a long password"}


async def test_every_page_of_the_admin_is_shown_to_an_employee(employee: httpx.AsyncClient) -> None:
    assert (await employee.post("/admin/login", data=LOGIN)).status_code == 302
    for view in VIEWS:
        page = await employee.get(f"/admin/{view.identity}/list")
        assert page.status_code == 200, view


async def test_an_employee_adds_a_category(employee: httpx.AsyncClient, ctxdb_session: AsyncSession) -> None:
    await employee.post("/admin/login", data=LOGIN)
    assert (await employee.post("/admin/category/create", data={"name": "toys"})).status_code == 302
    assert (await ctxdb_session.scalars(select(Category.name))).all() == ["toys"]


async def test_the_admin_is_closed_to_customers(customer: httpx.AsyncClient) -> None:
    assert (await customer.post("/admin/login", data=LOGIN)).status_code == 400
    assert (await customer.get("/admin/category/list")).headers["location"].endswith("/admin/login")


async def test_the_service_is_alive_and_ready(client: httpx.AsyncClient) -> None:
    assert [(await client.get(f"/health/{path}")).status_code for path in ("live", "ready")] == [200, 200]
