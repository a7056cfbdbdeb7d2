"""`SidecarApp`: what each endpoint of the sidecar answers over HTTP."""

from __future__ import annotations

import json
from collections import Counter

import httpx
import pytest
from tests.support.server import http_client
from tests.support.sidecar import START, app_of_hosts, cluster, dead, master, replica, serve_sidecar

from ctxdb_pgstatus import MasterUncertainError, PgStatusError
from ctxdb_pgstatus.locality import Locality
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History

JSON = {"accept": "application/json"}
REPLICA_PATHS = ["/replica", "/sync_by_time", "/sync_by_bytes", "/sync_by_time_or_bytes", "/sync_by_time_and_bytes"]
HOST_PATHS = ["/master", *REPLICA_PATHS, "/most_sync_by_bytes"]


async def ask(app: SidecarApp, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async with serve_sidecar(app) as url, http_client(url) as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize("path", HOST_PATHS)
async def test_a_host_is_named_as_plain_text_or_as_json(path: str) -> None:
    app, _ = app_of_hosts(master("n1"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        plain, in_json = await client.get(path), await client.get(path, headers=JSON)
    assert (plain.status_code, plain.text) == (200, "n1")
    assert plain.headers["content-type"].startswith("text/plain")
    assert (in_json.status_code, in_json.content) == (200, b'{"host":"n1","dc":null,"geo":null}')
    assert in_json.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", HOST_PATHS)
async def test_no_host_is_a_404_with_an_empty_body_or_null(path: str) -> None:
    app, _ = app_of_hosts(dead("n1"), master=None)
    async with serve_sidecar(app) as url, http_client(url) as client:
        plain, in_json = await client.get(path), await client.get(path, headers=JSON)
    assert (plain.status_code, plain.content) == (404, b"")
    assert (in_json.status_code, in_json.content) == (404, b'{"host":null,"dc":null,"geo":null}')


@pytest.mark.parametrize(
    ("path", "hosts"),
    [
        ("/replica", {"both", "time", "bytes", "none"}),
        ("/sync_by_time", {"both", "time"}),
        ("/sync_by_bytes", {"both", "bytes"}),
        ("/sync_by_time_or_bytes", {"both", "time", "bytes"}),
        ("/sync_by_time_and_bytes", {"both"}),
    ],
)
async def test_the_replicas_that_match_take_turns(path: str, hosts: set[str]) -> None:
    app, _ = app_of_hosts(
        master("n1"),
        replica("both"),
        replica("time", by_bytes=False),
        replica("bytes", by_time=False),
        replica("none", by_time=False, by_bytes=False),
        dead("n6"),
    )
    async with serve_sidecar(app) as url, http_client(url) as client:
        answers = Counter([(await client.get(path)).text for _ in range(4 * len(hosts))])
    assert answers == dict.fromkeys(hosts, 4)


async def test_a_primary_that_is_not_the_master_is_named_by_no_endpoint() -> None:
    app, _ = app_of_hosts(master("n1"), master("n2"), replica("n3"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert {(await client.get("/replica")).text for _ in range(4)} == {"n3"}
        assert (await client.get("/replicas_info")).content == b'[{"host":"n3"}]'
        described = {each["host"]: (each["master"], each["role"]) for each in (await client.get("/hosts")).json()}
    assert described == {"n1": (True, "master"), "n2": (False, "master"), "n3": (False, "replica")}


@pytest.mark.parametrize(
    ("question", "host"),
    [
        ("/replica?lag_ms=5", "n2"),
        ("/replica?lag_bytes=96", "n2"),
        ("/replica?lag_ms=4", "n1"),
        ("/sync_by_time?lag_ms=4", "n1"),
        ("/sync_by_time?lag_bytes=0", "n2"),
        ("/sync_by_bytes?lag_bytes=95", "n1"),
        ("/sync_by_time_or_bytes?lag_bytes=0", "n2"),
        ("/sync_by_time_and_bytes?lag_bytes=0", "n1"),
        ("/replica?min_lsn=0/3000000", "n2"),
        ("/replica?min_lsn=0/3000001", "n1"),
        ("/replica?min_lsn=0%2F3000000", "n2"),
        ("/replica?min_lsn=1/0", "n1"),
        # 18446744073709551615 is the highest number that pg-status takes, and some clients give it for "no limit".
        ("/replica?lag_ms=0&lag_bytes=18446744073709551615", "n1"),
        ("/sync_by_time?lag_ms=5&lag_bytes=18446744073709551615", "n2"),
        ("/most_sync_by_bytes?min_lsn=0/3000001", "n1"),
    ],
)
async def test_a_request_sets_limits_of_lag_and_position_by_parameters(question: str, host: str) -> None:
    app, _ = app_of_hosts(master("n1"), replica("n2"), replica("n3", by_time=False, by_bytes=False, position=None))
    assert (await ask(app, question)).text == host


async def test_most_sync_by_bytes_names_the_replica_with_the_least_lag() -> None:
    app, _ = app_of_hosts(
        master("n1"), replica("n2", lag_bytes=90), replica("n3", lag_bytes=10), replica("n4", lag_bytes=10)
    )
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert {(await client.get("/most_sync_by_bytes")).text for _ in range(3)} == {"n3"}
        assert (await client.get("/most_sync_by_bytes?lag_bytes=9")).text == "n1"


@pytest.mark.parametrize("path", [*REPLICA_PATHS, "/most_sync_by_bytes"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lag_ms", "-1"),
        ("lag_ms", ""),
        ("lag_ms", "1.5"),
        ("lag_bytes", "many"),
        ("lag_bytes", "²"),
        ("lag_ms", "18446744073709551616"),
        ("lag_ms", "9" * 5000),
        ("min_lsn", "3000060"),
        ("min_lsn", "0/XYZ"),
        ("min_lsn", ""),
    ],
)
async def test_a_wrong_parameter_is_a_400_that_names_it(path: str, name: str, value: str) -> None:
    app, _ = app_of_hosts(master("n1"), replica("n2"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        response = await client.get(path, params={name: value})
    assert (response.status_code, response.json()) == (400, {"error_text": f"Invalid {name}"})


async def test_a_request_waits_for_a_replica_that_has_replayed_its_position() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2", position=1))
    monitor.next = [cluster(master("n1"), replica("n2", position=2))]
    assert (await ask(app, "/sync_by_time?min_lsn=0/2&wait_ms=250")).text == "n2"
    assert monitor.waited_for == [("time", 2, 0.25)]


async def test_the_json_of_one_host_tells_its_data_centre_and_region() -> None:
    locality = Locality({"n1": "frankfurt", "n2": "amsterdam"}, {"n1": "europe", "n2": "europe"})
    app, _ = app_of_hosts(master("n1"), replica("n2"), locality=locality)
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert (await client.get("/master", headers=JSON)).json() == {"host": "n1", "dc": "frankfurt", "geo": "europe"}
        assert (await client.get("/replica", headers=JSON)).json() == {"host": "n2", "dc": "amsterdam", "geo": "europe"}


# --- checks of load balancers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "status", "body"),
    [
        ("/primary", 200, "n1"),
        ("/primary?host=n1", 200, "n1"),
        ("/primary?host=n2", 503, ""),
        ("/primary?host=n4", 503, ""),
        ("/primary?host=n9", 404, '{"error_text":"This host is not monitored"}'),
        ("/replica?host=n1", 503, ""),
        ("/replica?host=n2", 200, "n2"),
        ("/replica?host=n4", 503, ""),
        ("/replica?host=n9", 404, '{"error_text":"This host is not monitored"}'),
        ("/replica?lag=96", 200, "n2"),
        ("/replica?lag=95", 503, ""),
        ("/replica?host=n3&lag=16MB", 503, ""),
        ("/replica?host=n3&lag=17MB", 200, "n3"),
        ("/replica?host=n3&lag=16385kB", 200, "n3"),
        ("/replica?host=n3&lag=1GB&lag_bytes=100", 503, ""),
        ("/replica?host=n3&lag_ms=6193", 200, "n3"),
        ("/replica?host=n3&lag_ms=6192", 503, ""),
        ("/replica?lag=much", 400, '{"error_text":"Invalid lag"}'),
        ("/replica?lag=1EB", 400, '{"error_text":"Invalid lag"}'),
        ("/replica?lag=-1", 400, '{"error_text":"Invalid lag"}'),
    ],
)
async def test_primary_and_replica_answer_load_balancers_by_the_status_code(
    question: str, status: int, body: str
) -> None:
    app, _ = app_of_hosts(master("n1"), replica("n2"), replica("n3", by_time=False, by_bytes=False), dead("n4"))
    response = await ask(app, question)
    assert (response.status_code, response.text) == (status, body)


async def test_without_a_master_no_host_is_the_primary_and_replicas_stay_replicas() -> None:
    app, _ = app_of_hosts(dead("n1"), replica("n2"), master=None)
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert (await client.get("/primary")).status_code == 503
        assert (await client.get("/primary?host=n1")).status_code == 503
        assert (await client.get("/replica?host=n2")).status_code == 200


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
async def test_load_balancers_may_check_by_options_and_head(method: str) -> None:
    app, _ = app_of_hosts(master("n1"), replica("n2"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert (await client.request(method, "/primary?host=n1")).status_code == 200
        assert (await client.request(method, "/primary?host=n2")).status_code == 503
        assert (await client.request(method, "/replica?host=n2&lag=1MB")).status_code == 200


async def test_primary_is_confirmed_before_the_answer_with_no_cache() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2"))
    monitor.next = [cluster(dead("n1"), master("n2"), master="n2")]
    response = await ask(app, "/primary?host=n1", {"cache-control": "no-cache"})
    assert (response.status_code, monitor.confirmations) == (503, 1)


# --- hosts that may be about to die -----------------------------------------------------------------------------------


async def test_a_replica_whose_last_poll_failed_is_named_only_if_that_holds_for_all() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2", possible_dead=True), replica("n3"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert {(await client.get("/replica")).text for _ in range(4)} == {"n3"}
        assert {(await client.get("/replica?lag_ms=5")).text for _ in range(4)} == {"n3"}
        assert (await client.get("/most_sync_by_bytes")).text == "n3"
        assert [each["possible_dead"] for each in (await client.get("/hosts")).json()] == [False, True, False]
        monitor.status = cluster(master("n1"), replica("n2", possible_dead=True), dead("n3"))
        assert (await client.get("/replica")).text == "n2"
        assert (await client.get("/most_sync_by_bytes")).text == "n2"


async def test_hosts_answers_all_fields_of_every_host() -> None:
    app, _ = app_of_hosts(
        master("n1"), replica("n2", by_time=False), dead("n3", "no answer"), locality=Locality({"n1": "a"}, {"n1": "b"})
    )
    response = await ask(app, "/hosts")
    first, second, third = response.json()
    assert first == {
        "host": "n1",
        "dc": "a",
        "geo": "b",
        "distance": 2,
        "master": True,
        "alive": True,
        "possible_dead": False,
        "role": "master",
        "lag_ms": 0,
        "sync_by_time": True,
        "lag_bytes": 0,
        "sync_by_bytes": True,
        "lsn": "0/3000060",
        "timeline": 1,
        "since": "2026-03-01T12:00:00+00:00",
        "error": None,
        "takes_reads": True,
        "fault": None,
        "system_identifier": None,
        "started_at": None,
        "promotion": None,
    }
    assert (second["lag_ms"], second["sync_by_time"], second["sync_by_bytes"]) == (6193, False, True)
    assert (third["alive"], third["lag_ms"], third["lag_bytes"], third["lsn"]) == (False, None, None, None)
    assert third["error"] == "no answer"


async def test_an_unknown_lag_is_null_and_counts_as_above_every_limit() -> None:
    # pg-status answers a lag of 0 for a replica that has replayed no transaction, which then counts as in sync.
    unknown = replica("n2", position=None, lag_ms=None, lag_bytes=None, in_sync_by_time=False, in_sync_by_bytes=False)
    app, _ = app_of_hosts(master("n1"), unknown, replica("n3", lag_ms=None, in_sync_by_time=False))
    async with serve_sidecar(app) as url, http_client(url) as client:
        _, second, third = (await client.get("/hosts")).json()
        assert (second["lag_ms"], second["lag_bytes"], second["lsn"], second["alive"]) == (None, None, None, True)
        assert (third["lag_ms"], third["lag_bytes"], third["sync_by_time"]) == (None, 0x60, False)
        assert {(await client.get("/replica")).text for _ in range(2)} == {"n2", "n3"}
        # 0/0 is before all WAL.
        assert {(await client.get("/replica?min_lsn=0/0")).text for _ in range(2)} == {"n2", "n3"}
        for path in ("/sync_by_time", "/sync_by_time_and_bytes", "/replica?lag_ms=5000", "/replica?min_lsn=0/3000060"):
            assert (await client.get(path)).text == "n1", path
        for path in ("/sync_by_bytes", "/sync_by_time_or_bytes", "/most_sync_by_bytes", "/replica?lag_bytes=1000"):
            assert (await client.get(path)).text == "n3", path


async def test_hosts_answers_the_newest_status() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        before = (await client.get("/hosts")).json()
        monitor.status = cluster(dead("n1"), master("n2"), master="n2")
        after = (await client.get("/hosts")).json()
    assert [each["master"] for each in before] == [True, False]
    assert [each["master"] for each in after] == [False, True]


async def test_status_answers_the_fields_of_one_host() -> None:
    app, _ = app_of_hosts(master("n1"), replica("n2"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        found = await client.get("/status", params={"host": "n2"})
        unknown = await client.get("/status", params={"host": "n9"})
        unnamed = await client.get("/status")
    assert (found.status_code, found.json()["master"], found.json()["lag_ms"]) == (200, False, 5)
    assert unknown.status_code == 404
    assert (unnamed.status_code, unnamed.json()) == (400, {"error_text": "Get parameter 'host' wasn't passed"})


async def test_endpoints_about_hosts_answer_503_until_each_host_was_asked() -> None:
    app = SidecarApp(History())
    async with serve_sidecar(app) as url, http_client(url) as client:
        for path in [*HOST_PATHS, "/hosts", "/status", "/replicas_info", "/health", "/ready", "/replica?lag_ms=x"]:
            response = await client.get(path)
            assert (response.status_code, response.json()) == (503, {"error_text": "pg_monitor is not ready"}), path
        for path in ["/live", "/version", "/metrics", "/"]:
            assert (await client.get(path)).status_code == 200, path


async def test_sidecar_is_ready_without_a_master() -> None:
    app, _ = app_of_hosts(dead("n1"), master=None)
    response = await ask(app, "/ready")
    assert (response.status_code, response.text) == (200, "OK")


@pytest.mark.parametrize(
    ("hosts", "the_master", "code", "state"),
    [
        ([master("n1"), replica("n2")], "n1", 200, "ok"),
        ([master("n1"), dead("n2")], "n1", 200, "degraded"),
        ([dead("n1"), replica("n2")], None, 503, "down"),
    ],
)
async def test_health_answers_whether_the_cluster_takes_writes(
    hosts: list[object], the_master: str | None, code: int, state: str
) -> None:
    app, _ = app_of_hosts(*hosts, master=the_master)  # type: ignore[arg-type]  # pytest's parameters are of any type
    response = await ask(app, "/health")
    assert (response.status_code, response.json()["status"]) == (code, state)


async def test_master_is_confirmed_before_the_answer_with_no_cache() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert (await client.get("/master")).text == "n1"
        assert (monitor.confirmations, monitor.polls) == (0, 0)
        assert (await client.get("/master", headers={"cache-control": "no-cache"})).text == "n1"
        assert (monitor.confirmations, monitor.polls) == (1, 0)
        monitor.next = [cluster(dead("n1"), master("n2"), master="n2")]
        assert (await client.get("/master", headers={"cache-control": "no-cache"})).text == "n2"


async def test_status_with_no_cache_asks_the_host_over_a_new_connection() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2"))
    await ask(app, "/status?host=n2")
    assert monitor.servers_asked == []
    await ask(app, "/status?host=n2", {"cache-control": "no-cache"})
    assert (monitor.servers_asked, monitor.polls) == (["n2"], 1)


async def test_master_with_no_cache_answers_503_if_the_master_refuses_the_monitor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2"))
    monitor.error = PgStatusError("'n1' refuses the monitor")
    async with serve_sidecar(app) as url, http_client(url) as client:
        response = await client.get("/master", headers={"cache-control": "no-cache"})
        assert response.status_code == 503
        assert "refuses the monitor" in response.text
        assert (await client.get("/master")).text == "n1"
    # A refusal is no warning of the monitor's. Loggers of HTTP clients are left out.
    assert [record for record in caplog.records if record.name == "ctxdb_pgstatus"] == []


async def test_a_confirmed_master_is_answered_with_the_start_of_its_server() -> None:
    app, monitor = app_of_hosts(master("n1", started_at=START), replica("n2"))
    fields = {"cache-control": "no-cache", "accept": "application/json"}
    assert (await ask(app, "/master", fields)).json()["started_at"] == START.isoformat()
    # A host that may be dead may be another server when it answers again.
    monitor.status = cluster(master("n1", started_at=START, possible_dead=True), replica("n2"))
    assert (await ask(app, "/master", fields)).json()["started_at"] is None
    monitor.status = cluster(replica("n2"), master=None)
    response = await ask(app, "/master", fields)
    assert (response.status_code, response.json()["host"]) == (404, None)


async def test_master_with_no_cache_answers_503_if_the_master_is_uncertain() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2"))
    monitor.error = MasterUncertainError("No new connection to 'n1' could be opened")
    response = await ask(app, "/master", {"cache-control": "no-cache"})
    assert (response.status_code, response.json()) == (
        503,
        {"error_text": "No new connection to 'n1' could be opened", "uncertain": True},
    )


async def test_hosts_with_no_cache_asks_all_hosts() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2"))
    monitor.next = [cluster(dead("n1"), master("n2"), master="n2")]
    response = await ask(app, "/hosts", {"cache-control": "no-cache"})
    assert [each["master"] for each in response.json()] == [False, True]


async def test_head_answers_as_get_does_without_the_body() -> None:
    app, _ = app_of_hosts(master("n1"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        for path in ["/master", "/hosts", "/", "/metrics", "/live"]:
            response = await client.head(path)
            assert (response.status_code, response.content) == (200, b""), path
            # The figures of the process differ at each request.
            if path != "/metrics":
                assert int(response.headers["content-length"]) == len((await client.get(path)).content), path


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_other_methods_are_not_allowed(method: str) -> None:
    app, _ = app_of_hosts(master("n1"))
    async with serve_sidecar(app) as url, http_client(url) as client:
        response = await client.request(method, "/master")
        elsewhere = await client.request(method, "/nowhere")
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    assert elsewhere.status_code == 404


@pytest.mark.parametrize("path", ["/nowhere", "/master/", "/favicon.ico", "/%00"])
async def test_an_unknown_path_is_not_found(path: str) -> None:
    app, _ = app_of_hosts(master("n1"))
    assert (await ask(app, path)).status_code == 404


async def test_the_nearest_replicas_are_named() -> None:
    locality = Locality(
        {"n1": "x", "n2": "x", "n3": "y", "n4": "z"}, {"n1": "e", "n2": "e", "n3": "e", "n4": "w"}, "x", "e"
    )
    app, monitor = app_of_hosts(master("n1"), replica("n2"), replica("n3"), replica("n4"), locality=locality)
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert {(await client.get("/replica")).text for _ in range(4)} == {"n2"}
        monitor.status = cluster(master("n1"), dead("n2"), replica("n3"), replica("n4"))
        assert {(await client.get("/replica")).text for _ in range(4)} == {"n3"}
        monitor.status = cluster(master("n1"), dead("n2"), dead("n3"), replica("n4"))
        assert {(await client.get("/replica")).text for _ in range(4)} == {"n4"}


async def test_control_characters_in_errors_of_hosts_are_escaped() -> None:
    error = "\x1b[2K\x9b2K\x7f\r\n größe"
    app, _ = app_of_hosts(master("n1"), dead("n2", error))
    response = await ask(app, "/hosts")
    assert response.text.isprintable()
    assert response.json()[1]["error"] == error


async def test_names_that_are_not_ascii_arrive_whole() -> None:
    app, _ = app_of_hosts(master("größe"), master="größe")
    async with serve_sidecar(app) as url, http_client(url) as client:
        assert (await client.get("/master")).text == "größe"
        assert json.loads((await client.get("/master", headers=JSON)).content) == {
            "host": "größe",
            "dc": None,
            "geo": None,
        }
        assert (await client.get("/status", params={"host": "größe"})).status_code == 200
