"""Who may look: the application says so, or clients on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from ctxdb_core import ArgumentTypeError, DBConnect
from ctxdb_inspector import Authorise, inspector


def a_database() -> DBConnect:
    return DBConnect.from_url("sqlite+aiosqlite://")


async def ask(
    client: str | None,
    host: str,
    authorise: Authorise | None = None,
    version: str = "1.1",
    more_hosts: Sequence[str] = (),
) -> int:
    app: Any = inspector(a_database(), authorise=authorise)

    async def with_client(scope: Any, receive: Any, send: Any) -> None:
        seen = None if client is None else (client, 1)
        headers = [*scope["headers"], *((b"host", each.encode()) for each in more_hosts)]
        await app({**scope, "client": seen, "http_version": version, "headers": headers}, receive, send)

    transport = httpx.ASGITransport(with_client)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as asking:
        return (await asking.get("/units.json")).status_code


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost", "app.localhost:8000", "127.0.0.1:80", "[::1]:8000"])
async def test_clients_on_this_machine_may_look(client: str, host: str) -> None:
    assert await ask(client, host) == 200


@pytest.mark.parametrize("client", ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "testclient", "", None])
async def test_clients_elsewhere_and_unknown_ones_may_not(client: str | None) -> None:
    assert await ask(client, "localhost") == 403


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "localhost.example.org"])
async def test_a_name_of_the_internet_that_leads_to_this_machine_is_refused(host: str) -> None:
    assert await ask("127.0.0.1", host) == 403


async def test_a_request_by_http_1_0_comes_from_a_proxy() -> None:
    assert await ask("127.0.0.1", "localhost", version="1.0") == 403
    assert await ask("127.0.0.1", "localhost", version="1.1") == 200


@pytest.mark.parametrize("first", ["localhost", "example.org"])
async def test_each_of_several_hosts_has_to_be_this_machine(first: str) -> None:
    hosts = ["localhost", "example.org"]
    assert await ask("127.0.0.1", first, more_hosts=[host for host in hosts if host != first]) == 403


async def test_the_application_may_let_others_look() -> None:
    seen: list[str] = []

    def by_path(scope: Any) -> bool:
        seen.append(scope["path"])
        return True

    async def later(scope: Any) -> bool:
        return True

    assert await ask("192.0.2.1", "example.org", by_path) == 200
    assert await ask("192.0.2.1", "example.org", later) == 200
    assert seen == ["/units.json"]


@pytest.mark.parametrize("answer", [False, None, 0, "yes"])
async def test_an_authorise_that_does_not_return_true_refuses_each_client(answer: Any) -> None:
    assert await ask("127.0.0.1", "localhost", lambda scope: answer) == 403


def test_wrong_arguments_are_told_at_once() -> None:
    with pytest.raises(ArgumentTypeError):
        inspector()
    with pytest.raises(ArgumentTypeError):
        inspector("sqlite+aiosqlite://")  # type: ignore[arg-type]  # what is tried
    with pytest.raises(ArgumentTypeError):
        inspector(a_database(), authorise=True)  # type: ignore[arg-type]  # what is tried


async def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await inspector(a_database())({"type": "websocket"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]
