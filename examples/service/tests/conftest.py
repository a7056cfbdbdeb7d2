"""The service under test, as a whole, on a PostgreSQL 18 that comes out of a wheel and is gone afterwards."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from alembic import command
from alembic.config import Config
from fastapi import FastAPI
from fastapi_users.password import PasswordHelper
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core import DBConnect
from ctxdb_core.testing import EmbeddedPostgres, create_database
from shop import payments, users
from shop.app import create_app
from shop.database import db
from shop.models import Category, Product, Stock, User

ALEMBIC = Config(Path(__file__).parents[1] / "alembic.ini")


@pytest.fixture(scope="session")
def ctxdb_dbs() -> Iterator[DBConnect]:
    """The database that the fixtures of ctxdb's pytest plugin work on. The migrations make its tables."""
    with EmbeddedPostgres() as server:
        url = server.url(database="shop_test")
        asyncio.run(create_database(url))
        with db.overridden(url):
            command.upgrade(ALEMBIC, "head")
            yield db


class FakeProvider:
    """A provider that grants payments as a test says, and remembers its calls."""

    def __init__(self) -> None:
        self.grants = True
        self.charged: dict[uuid.UUID, Decimal] = {}

    async def charge(self, payment_id: uuid.UUID, amount: Decimal) -> bool:
        self.charged[payment_id] = amount
        return self.grants


@pytest.fixture
def provider() -> FakeProvider:
    return FakeProvider()


@pytest.fixture(autouse=True)
def quick_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of passwords are slow by design, which tests need not be."""
    hasher = Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(users, "password_helper", PasswordHelper(PasswordHash((hasher,))))


@pytest.fixture(scope="session")
def app() -> FastAPI:
    """One application for all tests: to make one takes the most time."""
    return create_app()


@pytest.fixture
async def client(
    ctxdb_shared_transaction: object, app: FastAPI, provider: FakeProvider
) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a login. All that a test does is rolled back after it."""
    app.dependency_overrides[payments.get_provider] = lambda: provider
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        yield client


@pytest.fixture
async def customer(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """The same client, after it has registered and logged in."""
    login = {"email": "ada@example.org", "password": "a long password"}
    assert (await client.post("/auth/register", json=login)).status_code == 201
    answer = await client.post("/auth/login", data={"username": login["email"], "password": login["password"]})
    client.headers["Authorization"] = f"Bearer {answer.json()['access_token']}"
    return client


@pytest.fixture
async def employee(customer: httpx.AsyncClient, ctxdb_session: AsyncSession) -> httpx.AsyncClient:
    """The same client, after its user was made an employee."""
    user = await ctxdb_session.get_one(User, (await customer.get("/users/me")).json()["id"])
    user.is_superuser = True
    await ctxdb_session.commit()
    return customer


@pytest.fixture
async def tea(ctxdb_session: AsyncSession) -> Product:
    """A product of which there are three."""
    product = Product(name="tea", price=Decimal("4.50"), category=Category(name="drinks"), stock=Stock(quantity=3))
    ctxdb_session.add(product)
    await ctxdb_session.commit()
    return product
