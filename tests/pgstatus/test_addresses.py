from __future__ import annotations

import pytest

from ctxdb_pgstatus import HostAddress, HostListError
from ctxdb_pgstatus.addresses import parse_hosts


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("n1", "n1", 5432),
        (" n1.example ", "n1.example", 5432),
        ("n1:6000", "n1", 6000),
        ("127.0.0.2", "127.0.0.2", 5432),
        ("127.0.0.2:6000", "127.0.0.2", 6000),
        ("::1", "::1", 5432),
        ("[::1]", "::1", 5432),
        ("[fe80::1]:6000", "fe80::1", 6000),
        ("/run/postgresql", "/run/postgresql", 5432),
        ("/run/postgresql:6000", "/run/postgresql", 6000),
    ],
)
def test_a_host_is_read_with_its_port_and_keeps_its_name(text: str, host: str, port: int) -> None:
    assert HostAddress.parse(text, 5432) == HostAddress(text.strip(), host, port)


@pytest.mark.parametrize(
    "text", ["", "  ", "a b", "n1:", "n1:x", "n1:0", "n1:70000", "[::1", "[n1]:1", "u@n1", "n1/db", "/run:x"]
)
def test_invalid_host_is_refused_by_name(text: str) -> None:
    with pytest.raises(HostListError, match=r"is no host|port"):
        HostAddress.parse(text, 5432)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ([], "no hosts"),
        ("n1,n2", "give a list"),
        (["n1", "N1:5432"], "same host"),
        (["::1", "[::1]"], "same host"),
        (["fd00::A", "[fd00:0::a]:5432"], "same host"),
        (["/run/postgresql", "/run/postgresql/"], "same host"),
    ],
)
def test_a_list_of_hosts_that_makes_no_cluster_is_refused(hosts: list[str], message: str) -> None:
    with pytest.raises(HostListError, match=message):
        parse_hosts(hosts, 5432)


def test_directories_of_different_case_are_different_hosts() -> None:
    assert [address.host for address in parse_hosts(["/run/a", "/run/A"])] == ["/run/a", "/run/A"]


def test_two_hosts_of_one_name_are_refused() -> None:
    with pytest.raises(HostListError, match="Two hosts have the name 'db'"):
        parse_hosts([HostAddress("db", "192.0.2.1", 5432), HostAddress("db", "192.0.2.2", 5432)])
