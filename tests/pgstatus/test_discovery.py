"""Hosts that are found by Patroni's REST API, by SRV records and in a file, all of which the tests serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.message
import dns.rrset
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tests.support.monitors import CONNECTIONS, monitor_of, until
from tests.support.server import serve

from ctxdb_pgstatus import (
    DiscoveredHost,
    FileDiscovery,
    HostAddress,
    HostDiscovery,
    HostListError,
    HostMonitor,
    OptionError,
    PatroniDiscovery,
    PgStatusError,
    SRVDiscovery,
)
from ctxdb_pgstatus.testing import PostgresCluster, PostgresNode


def names_of(hosts: Sequence[DiscoveredHost]) -> list[str]:
    return [host.address.name for host in hosts]


class FakeDiscovery:
    """A `HostDiscovery` that finds the hosts that a test sets, or raises the error that it sets."""

    def __init__(self, *hosts: DiscoveredHost) -> None:
        self.hosts: Sequence[DiscoveredHost] = hosts
        self.error: Exception | None = None
        self.finds = 0

    async def find(self) -> Sequence[DiscoveredHost]:
        self.finds += 1
        if self.error is not None:
            raise self.error
        return self.hosts


def discovered(node: PostgresNode, **tags: bool) -> DiscoveredHost:
    return DiscoveredHost(HostAddress(node.host, node.host, node.port), **tags)


# --- monitors ---------------------------------------------------------------------------------------------------------


async def test_a_monitor_watches_found_hosts_and_leaves_removed_ones(cluster: PostgresCluster) -> None:
    first, second, third = cluster.nodes
    discovery = FakeDiscovery(discovered(first), discovered(second))
    async with monitor_of(cluster, hosts=discovery, poll_interval=0.3) as monitor:
        assert [host.host for host in monitor.hosts()] == [first.host, second.host]
        assert monitor.master() == first.host
        discovery.hosts = [discovered(third), discovered(first)]
        await until(monitor, lambda: [host.host for host in monitor.hosts()] == [third.host, first.host])
        await until(monitor, lambda: monitor.replica() == third.host)
        assert monitor.master() == first.host
        discovery.hosts = [discovered(third)]
        await until(monitor, lambda: monitor.master() is None)
        assert monitor.server_of(first.host) is None
    async with asyncio.timeout(20):
        while any([await node.fetch_value(CONNECTIONS) for node in cluster.nodes]):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("error", [OSError("it is away"), None], ids=["failing", "empty"])
async def test_known_hosts_stay_while_no_hosts_can_be_found(
    cluster: PostgresCluster, error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    discovery = FakeDiscovery(*map(discovered, cluster.nodes))
    async with monitor_of(cluster, hosts=discovery, poll_interval=0.3) as monitor:
        discovery.error, discovery.hosts = error, ()
        finds = discovery.finds
        async with asyncio.timeout(20):
            while discovery.finds < finds + 2:
                await asyncio.sleep(0.01)
        await monitor.poll()
        assert monitor.master() == cluster.primary.host
        assert len(monitor.hosts()) == 3
    warnings = [record.getMessage() for record in caplog.records if "could not be found" in record.getMessage()]
    assert len(warnings) == 1
    assert ("it is away" if error else "no hosts") in warnings[0]


async def test_a_monitor_that_finds_no_hosts_at_first_finds_them_later(cluster: PostgresCluster) -> None:
    discovery = FakeDiscovery(*map(discovered, cluster.nodes))
    discovery.error = OSError("it is away")
    async with monitor_of(cluster, hosts=discovery, poll_interval=0.3) as monitor:
        assert monitor.hosts() == ()
        assert monitor.master() is monitor.replica() is None
        assert (await monitor.poll()).hosts == ()
        discovery.error = None
        await until(monitor, lambda: monitor.master() == cluster.primary.host)


async def test_the_tags_of_hosts_that_are_found_are_heeded(cluster: PostgresCluster) -> None:
    first, second, third = cluster.nodes
    discovery = FakeDiscovery(
        discovered(first), discovered(second, noloadbalance=True), discovered(third, nofailover=True)
    )
    async with monitor_of(cluster, hosts=discovery, poll_interval=0.3) as monitor:
        assert {monitor.replica() for _ in range(4)} == {third.host}
        await first.kill()
        await third.promote()
        await until(monitor, lambda: any(host.host == third.host and host.role == "master" for host in monitor.hosts()))
        assert monitor.master() is None


# --- Patroni ----------------------------------------------------------------------------------------------------------


def member(name: str, host: str, port: int, **values: Any) -> dict[str, Any]:
    """Return a member of the answer of ``/cluster``, as Patroni's documentation describes it."""
    return {
        "name": name,
        "role": "replica",
        "state": "streaming",
        "api_url": f"http://{host}:8008/patroni",
        "host": host,
        "port": port,
        "timeline": 1,
        "lag": 0,
    } | values


@asynccontextmanager
async def patroni(*members: dict[str, Any], status: int = 200) -> AsyncIterator[str]:
    async def cluster(request: Request) -> Response:
        return JSONResponse({"members": list(members), "scope": "shop"}, status_code=status)

    async with serve(Starlette(routes=[Route("/cluster", cluster)])) as url:
        yield url


async def test_the_members_of_patroni_are_found_by_their_names_with_their_tags() -> None:
    members = (
        member("n2", "10.0.0.2", 5432, tags={"nofailover": True, "noloadbalance": True}),
        member("n1", "2001:db8::1", 5433, role="leader", state="running"),
        {"name": "n3", "role": "replica", "state": "creating replica"},
    )
    async with patroni(*members) as url:
        assert await PatroniDiscovery([url]).find() == [
            DiscoveredHost(HostAddress("[2001:db8::1]:5433", "2001:db8::1", 5433)),
            DiscoveredHost(HostAddress("10.0.0.2:5432", "10.0.0.2", 5432), nofailover=True, noloadbalance=True),
        ]


async def test_next_patroni_member_is_asked_when_one_does_not_answer() -> None:
    async with patroni(status=503) as failing, patroni(member("n1", "10.0.0.1", 5432)) as answering:
        discovery = PatroniDiscovery([failing, "http://127.0.0.1:1", answering])
        assert names_of(await discovery.find()) == ["10.0.0.1:5432"]


async def test_found_patroni_members_are_asked_when_the_given_ones_are_away() -> None:
    async with patroni(member("n1", "10.0.0.1", 5432)) as other:
        async with patroni(member("n1", "10.0.0.1", 5432, api_url=f"{other}/patroni")) as given:
            discovery = PatroniDiscovery([given])
            await discovery.find()
        assert names_of(await discovery.find()) == ["10.0.0.1:5432"]
    with pytest.raises(PgStatusError, match="No member of the Patroni cluster"):
        await discovery.find()


async def test_a_monitor_follows_the_members_of_patroni(cluster: PostgresCluster) -> None:
    members = [member(node.name, node.host, node.port) for node in cluster.nodes]
    async with (
        patroni(*members) as url,
        HostMonitor(PatroniDiscovery([url]), user="postgres", poll_interval=0.5) as monitor,
    ):
        assert monitor.master() == f"{cluster.primary.host}:{cluster.port}"
        assert len(monitor.status.replicas()) == 2


@pytest.mark.parametrize("urls", [[], ["n1:8008"], ["ftp://n1"]])
def test_an_invalid_url_of_patroni_is_refused(urls: list[str]) -> None:
    with pytest.raises(OptionError):
        PatroniDiscovery(urls)


# --- SRV records ------------------------------------------------------------------------------------------------------


class NameServer(asyncio.DatagramProtocol):
    """A name server that answers each question with the same SRV records."""

    def __init__(self, *records: str) -> None:
        self.records = records

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        answer.flags |= dns.flags.RA
        if self.records:
            answer.answer.append(dns.rrset.from_text(question.question[0].name, 5, "IN", "SRV", *self.records))
        self._transport.sendto(answer.to_wire(), address)


@asynccontextmanager
async def name_server(*records: str) -> AsyncIterator[SRVDiscovery]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: NameServer(*records), local_addr=("127.0.0.1", 0))
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = ["127.0.0.1"]
    resolver.port = transport.get_extra_info("sockname")[1]
    try:
        yield SRVDiscovery("_postgresql._tcp.shop.example.org", resolver=resolver)
    finally:
        transport.close()


async def test_hosts_are_found_by_srv_records_in_the_order_of_their_priorities_and_weights() -> None:
    records = ("20 5 5432 n3.example.org.", "10 5 5433 n2.example.org.", "10 50 5432 n1.example.org.")
    async with name_server(*records) as discovery:
        assert names_of(await discovery.find()) == ["n1.example.org:5432", "n2.example.org:5433", "n3.example.org:5432"]


async def test_an_srv_name_without_a_service_has_no_hosts() -> None:
    async with name_server("0 0 0 .") as discovery:
        assert await discovery.find() == []


async def test_an_srv_name_without_records_is_an_error() -> None:
    async with name_server() as discovery:
        with pytest.raises(dns.exception.DNSException):
            await discovery.find()


# --- files ------------------------------------------------------------------------------------------------------------


async def test_hosts_are_found_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# the cluster\nn1, n2:5433\n\n[::1]  # here\n")
    hosts = await FileDiscovery(file, port=6000).find()
    assert [(host.address.name, host.address.port) for host in hosts] == [
        ("n1", 6000),
        ("n2:5433", 5433),
        ("[::1]", 6000),
    ]
    file.write_text("n 1\n")
    with pytest.raises(HostListError):
        await FileDiscovery(file).find()


async def test_a_monitor_follows_the_hosts_in_a_file(cluster: PostgresCluster, tmp_path: Path) -> None:
    first, second, _ = cluster.nodes
    file = tmp_path / "hosts"
    file.write_text(f"{first.host}\n")
    discovery = FileDiscovery(file, port=cluster.port)
    assert isinstance(discovery, HostDiscovery)
    async with monitor_of(cluster, hosts=discovery, poll_interval=0.3) as monitor:
        assert monitor.replica() == first.host
        replacement = tmp_path / "hosts.new"
        replacement.write_text(f"{first.host}\n{second.host}\n")
        replacement.replace(file)
        await until(monitor, lambda: monitor.replica() == second.host)
