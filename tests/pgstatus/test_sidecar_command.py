"""The command `ctxdb-pgstatus`, in a process of its own, on a real server."""

from __future__ import annotations

import asyncio
import signal
import socket

import pytest
from tests.support.server import http_client
from tests.support.sidecar_process import COMMANDS, environment, fails, running, variables_of

from ctxdb_pgstatus import PgStatusClient
from ctxdb_pgstatus.testing import EmbeddedPostgres, PostgresCluster

PASSWORD = "hunter2-and-more"


@pytest.fixture
def server(postgres_server: EmbeddedPostgres) -> dict[str, str]:
    return {**variables_of(postgres_server), "sleep_ms": "100"}


@pytest.mark.parametrize("command", COMMANDS)
async def test_command_answers_for_a_real_server_until_a_signal_stops_it(server: dict[str, str], command: str) -> None:
    async with running(command, **server) as sidecar:
        url = await sidecar.url()
        async with http_client(url) as client, PgStatusClient(url) as followed:
            assert (await client.get("/live")).text == "OK"
            while (await client.get("/ready")).status_code == 503:
                await asyncio.sleep(0.01)
            assert (await client.get("/master")).text == server["hosts"]
            (host,) = (await client.get("/hosts")).json()
            assert (host["master"], host["alive"], host["error"], host["lag_ms"]) == (True, True, None, 0)
            assert host["timeline"] == 1
            assert server["hosts"] in (await client.get("/")).text
            assert "ctxdb_pgstatus_host_up" in (await client.get("/metrics")).text
            assert await followed.confirm_master(server["hosts"])
            assert await followed.replica() == server["hosts"]
        assert await sidecar.stop() == 0
    assert sidecar.logged("server stopped") is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_command_stops_gracefully_beside_an_open_connection(server: dict[str, str], number: int) -> None:
    async with running(**server) as sidecar:
        url = await sidecar.url()
        async with http_client(url) as client:
            # The client keeps its connection open. The command must not wait until it is closed.
            assert (await client.get("/live")).text == "OK"
            assert await sidecar.stop(number) == 0
    assert not any('"exception"' in line for line in sidecar.lines), sidecar.lines


async def test_the_command_goes_on_without_a_host_that_can_be_reached() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        async with running(hosts=host, sleep_ms="100", max_fails="1", pg_password=PASSWORD) as sidecar:
            async with http_client(await sidecar.url()) as client:
                while (await client.get("/ready")).status_code == 503:
                    await asyncio.sleep(0.01)
                assert (await client.get("/master")).status_code == 404
                (described,) = (await client.get("/hosts")).json()
                assert (described["alive"], described["master"]) == (False, False)
                assert described["error"]
                assert (await client.get("/health")).json()["status"] == "down"
            assert await sidecar.stop() == 0


async def test_a_password_is_never_shown() -> None:
    async with PostgresCluster(standbys=0, password="another") as cluster:
        host = f"{cluster.primary.host}:{cluster.primary.port}"
        async with running(hosts=host, pg_password=PASSWORD, log_level="debug", max_fails="1") as sidecar:
            async with http_client(await sidecar.url()) as client:
                while (await client.get("/ready")).status_code == 503:
                    await asyncio.sleep(0.01)
                shown = [(await client.get(path)).text for path in ("/", "/hosts", "/metrics", "/health")]
                (described,) = (await client.get("/hosts")).json()
            assert await sidecar.stop() == 0
    # The sidecar has really sent the password, which the server does not accept.
    assert "password" in described["error"].lower()
    assert PASSWORD not in "\n".join([*shown, *sidecar.lines])


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "pg_status__hosts"),
        ({"hosts": "n1", "sleep_ms": "0"}, "pg_status__sleep_ms"),
        ({"hosts": "me:hunter2@n1:x"}, "pg_status__hosts"),
        ({"hosts": "n1", "http_listen_address": "localhost"}, "pg_status__http_listen_address"),
    ],
)
async def test_a_wrong_setting_ends_the_command_with_2_and_one_line(variables: dict[str, str], named: str) -> None:
    code, error = await fails(**variables)
    assert code == 2
    assert error.startswith(f"ctxdb-pgstatus: {named}")
    assert error.count("\n") == 1
    assert "hunter2" not in error


async def test_a_port_in_use_ends_the_command_with_1_and_its_variable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = await fails(hosts="n1", http_port=str(taken.getsockname()[1]))
    assert code == 1
    assert "pg_status__http_port" in error
    assert "Traceback" not in error


async def test_help_of_the_command_explains_its_variables() -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMANDS["script"], "--help", env=environment(), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    assert b"sync_max_lag_ms" in output


@pytest.mark.parametrize(
    ("address", "reached"), [("127.0.0.1", "127.0.0.1"), ("*", "127.0.0.1"), ("::1", "[::1]"), ("*", "[::1]")]
)
async def test_command_listens_on_the_given_address(server: dict[str, str], address: str, reached: str) -> None:
    if ":" in reached and not _has_ipv6():
        pytest.skip("there is no IPv6 here")
    async with running(**server | {"http_listen_address": address}) as sidecar:
        await sidecar.url()
        started = sidecar.logged("server started")
        assert started is not None
        async with http_client(f"http://{reached}:{started['port']}") as client:
            assert (await client.get("/live")).text == "OK"
        assert await sidecar.stop() == 0


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
