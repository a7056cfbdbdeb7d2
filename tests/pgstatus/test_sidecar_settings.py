"""The environment variables of the sidecar."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ctxdb_pgstatus import FileDiscovery, HostAddress, OptionError, PatroniDiscovery, SRVDiscovery
from ctxdb_pgstatus.sidecar.settings import Settings


def read(**variables: str) -> Settings:
    return Settings.from_environment(
        {f"pg_status__{name}": value for name, value in ({"hosts": "n1,n2"} | variables).items()}
    )


def test_every_variable_but_hosts_has_a_default() -> None:
    settings = read()
    assert settings.hosts == (HostAddress("n1", "n1", 5432), HostAddress("n2", "n2", 5432))
    assert (settings.user, settings.password, settings.database) == ("postgres", "postgres", "postgres")
    assert (settings.poll_interval, settings.connect_timeout, settings.max_fails) == (1.0, 2.0, 3)
    assert (settings.sync_max_lag_ms, settings.sync_max_lag_bytes) == (1000, 1_000_000)
    assert (settings.listen_address, settings.listen_port) == ("127.0.0.1", 8000)
    assert (settings.log_level, settings.log_format) == (logging.INFO, "text")
    assert settings.warnings == ()


def test_each_variable_sets_its_setting() -> None:
    settings = read(
        hosts="n1; [::1] ;n3:6000",
        delimiter=";",
        pg_user="monitor",
        pg_password=" secret ",
        pg_database="shop",
        pg_port="5433;5434;5435",
        connect_timeout="0.5",
        max_fails="2",
        sleep="7",
        sync_max_lag_ms="0",
        sync_max_lag_bytes="5",
        http_listen_address="::1",
        http_port="9000",
        log_level="WARN",
        log_format="json",
    )
    assert settings.hosts == (
        HostAddress("n1", "n1", 5433),
        HostAddress("[::1]", "::1", 5434),
        HostAddress("n3:6000", "n3", 6000),
    )
    assert (settings.user, settings.password, settings.database) == ("monitor", " secret ", "shop")
    assert (settings.poll_interval, settings.connect_timeout, settings.max_fails) == (7.0, 0.5, 2)
    assert (settings.sync_max_lag_ms, settings.sync_max_lag_bytes) == (0, 5)
    assert (settings.listen_address, settings.listen_port) == ("::1", 9000)
    assert (settings.log_level, settings.log_format) == (logging.WARNING, "json")


def test_the_name_of_a_host_does_not_hold_a_port_of_pg_port() -> None:
    assert [host.name for host in read(pg_port="5433,5434").hosts] == ["n1", "n2"]


def test_hosts_with_equal_names_get_their_ports_as_a_part_of_their_names() -> None:
    settings = read(hosts="localhost,localhost,::1", pg_port="5433,5434,5435")
    assert [host.name for host in settings.hosts] == ["localhost:5433", "localhost:5434", "[::1]:5435"]
    assert [host.port for host in settings.hosts] == [5433, 5434, 5435]


def test_port_of_pg_status_1_sets_the_ports() -> None:
    assert [host.port for host in read(port="5433").hosts] == [5433, 5433]
    assert [host.port for host in read(port="5433,5434").hosts] == [5433, 5434]
    assert [host.port for host in read(hosts="n1,n2,n3,n4", port="5433,5434").hosts] == [5433, 5434, 5434, 5434]
    assert [host.port for host in read(port="5433", pg_port="5434").hosts] == [5434, 5434]
    assert read(port="5433").warnings == ()


def test_variables_in_milliseconds_take_precedence_over_older_ones_in_seconds() -> None:
    settings = read(sleep="5", sleep_ms="250", connect_timeout="5", query_timeout_ms="750")
    assert (settings.poll_interval, settings.connect_timeout) == (0.25, 0.75)


def test_an_empty_variable_counts_as_not_set() -> None:
    assert read(pg_user="", sleep_ms="", http_port=" ", hosts="n1,n2").poll_interval == 1.0
    # An empty password counts as one.
    assert read(pg_password="").password == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hosts", ""),
        ("hosts", " , "),
        ("hosts", "n1,n 2"),
        ("hosts", "n1,n1"),
        ("hosts", "n1,n1:5432"),
        ("hosts", "n1:0"),
        ("pg_port", "x"),
        ("pg_port", "0"),
        ("pg_port", "65536"),
        ("pg_port", "1,2,3"),
        ("port", "1,2,3"),
        ("port", "x"),
        ("connect_timeout", "0"),
        ("connect_timeout", "soon"),
        ("query_timeout_ms", "0"),
        ("query_timeout_ms", "1.5"),
        ("max_fails", "0"),
        ("max_fails", "-1"),
        ("sleep", "nan"),
        ("sleep", "inf"),
        ("sleep_ms", "0"),
        ("sleep_ms", "1e3"),
        ("sync_max_lag_ms", "-1"),
        ("conn_max_age_ms", "-1"),
        ("nofailover", "n9"),
        ("noloadbalance", "n9"),
        ("sync_max_lag_bytes", "1MB"),
        ("http_listen_address", "everywhere"),
        ("http_port", "65536"),
        ("http_port", "²"),
        ("log_level", "loud"),
        ("log_format", "xml"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"^pg_status__{name}\\b"):
        read(**{name: value})


def test_a_password_is_never_shown() -> None:
    assert "hunter2" not in repr(read(pg_password="hunter2"))
    with pytest.raises(OptionError) as info:
        read(hosts="postgresql://me:hunter2@n1/x")
    assert "hunter2" not in str(info.value)


def test_the_password_is_read_from_a_file() -> None:
    settings = read(pg_password_file="/run/secrets/password")
    assert (settings.password, settings.password_file) == (None, "/run/secrets/password")
    with pytest.raises(OptionError, match="pg_status__pg_password_file"):
        read(pg_password_file="/run/secrets/password", pg_password="another")


@pytest.mark.parametrize("name", ["PGPASSWORD", "PGPASSFILE"])
def test_no_password_is_set_if_a_variable_of_libpq_gives_one(name: str) -> None:
    assert Settings.from_environment({"pg_status__hosts": "n1", name: "x"}).password is None


def test_no_password_is_set_if_libpqs_password_file_is_in_the_home_directory(tmp_path: Path) -> None:
    environment = {"pg_status__hosts": "n1", "HOME": str(tmp_path)}
    assert Settings.from_environment(environment).password == "postgres"
    (tmp_path / ".pgpass").touch()
    assert Settings.from_environment(environment).password is None


def test_hosts_file_sets_a_file_discovery(tmp_path: Path) -> None:
    settings = read(hosts="", hosts_file=str(tmp_path / "hosts"), nofailover="n2")
    assert settings.hosts == ()
    assert isinstance(settings.discovery, FileDiscovery)
    # The names cannot be checked, as the hosts are found later.
    assert settings.nofailover == ("n2",)


def test_hosts_patroni_and_hosts_srv_set_their_discoveries() -> None:
    found = read(hosts="", hosts_patroni="http://n1:8008,http://n2:8008").discovery
    assert isinstance(found, PatroniDiscovery)
    assert isinstance(read(hosts="", hosts_srv="_postgresql._tcp.example.org").discovery, SRVDiscovery)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"hosts_file": "/etc/hosts"}, "hosts_file"),
        ({"hosts": "", "hosts_patroni": "n1"}, "hosts_patroni"),
        ({"hosts": "", "hosts_patroni": "http://n1", "hosts_srv": "x"}, "hosts_srv"),
    ],
)
def test_invalid_or_second_source_of_hosts_is_refused(variables: dict[str, str], named: str) -> None:
    with pytest.raises(OptionError, match=f"pg_status__{named}\\b"):
        read(**variables)


def test_nofailover_and_noloadbalance_name_hosts_of_the_list() -> None:
    settings = read(hosts="n1,n2,n3", nofailover="n2,n3", noloadbalance="n3", conn_max_age_ms="500")
    assert (settings.nofailover, settings.noloadbalance) == (("n2", "n3"), ("n3",))
    assert settings.conn_max_age == 0.5


def test_an_unknown_variable_gives_a_warning() -> None:
    settings = read(host="n1", conn_max_age_ms="5")
    assert settings.warnings == ("pg_status__host is not known, and has no effect",)


def test_the_distance_of_hosts_follows_from_their_data_centres_and_regions() -> None:
    settings = Settings.from_environment(
        {
            "pg_status__hosts": "n1,n2,n3",
            "pg_status__hosts_dc": "a,b,c",
            "pg_status__hosts_geo": "e,e,w",
            "pg_status__current_dc": "a",
            "pg_status__current_geo_env": "REGION",
            "REGION": "e",
        }
    )
    assert [settings.locality.distance(name) for name in ("n1", "n2", "n3")] == [0, 1, 2]
    assert settings.warnings == ()


@pytest.mark.parametrize(
    "variables", [{"hosts_dc": "a,b"}, {"current_dc": "a"}, {"hosts_dc": "a", "current_dc": "a"}, {"hosts_dc": "a,"}]
)
def test_incomplete_locations_of_hosts_are_ignored_with_a_warning(variables: dict[str, str]) -> None:
    settings = read(**variables)
    assert len(settings.warnings) == 1
    assert "by their dc" in settings.warnings[0]
    assert {settings.locality.distance(name) for name in ("n1", "n2")} == {2}


@pytest.mark.parametrize("name", ["PGSSLROOTCERT", "PGSSLCRL", "PGSSLCERT", "PGSSLKEY"])
def test_an_unreadable_file_for_tls_gives_a_warning_that_names_its_variable(name: str, tmp_path: Path) -> None:
    for path in ("system", str(tmp_path), str(tmp_path / "missing.pem")):
        (warning,) = Settings.from_environment({"pg_status__hosts": "n1", name: path}).warnings
        assert warning.startswith(f"{name} is {path!r}")
    (tmp_path / "there.pem").touch()
    assert Settings.from_environment({"pg_status__hosts": "n1", name: str(tmp_path / "there.pem")}).warnings == ()
