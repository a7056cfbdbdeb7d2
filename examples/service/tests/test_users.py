from __future__ import annotations

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from shop import mails
from shop.models import Mail, User


async def test_a_new_user_is_welcomed(customer: httpx.AsyncClient, ctxdb_session: AsyncSession) -> None:
    assert (await customer.get("/users/me")).json()["email"] == "ada@example.org"
    assert (await ctxdb_session.scalars(select(Mail.subject))).all() == ["Welcome"]


async def test_a_user_who_cannot_be_welcomed_is_not_stored(
    client: httpx.AsyncClient, ctxdb_session: AsyncSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*arguments: str) -> None:
        raise ConnectionError("the rest of the registration fails")

    # fastapi-users has committed the user by now, in the savepoint of its joining session.
    monkeypatch.setattr(mails, "write", fail)
    with pytest.raises(ConnectionError):
        await client.post("/auth/register", json={"email": "eve@example.org", "password": "a long password"})
    assert (await ctxdb_session.scalars(select(User))).all() == []


async def test_a_token_is_revoked_by_the_logout(customer: httpx.AsyncClient) -> None:
    assert (await customer.post("/auth/logout")).status_code == 204
    assert (await customer.get("/users/me")).status_code == 401
