"""`PgStatusClient`, asking a server that answers as pg-status documents it, and asking the sidecar."""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import logging
from base64 import b64encode
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.support.server import serve
from tests.support.sidecar import (
    START,
    OriginalSidecar,
    app_of_hosts,
    cluster,
    dead,
    master,
    replica,
    serve_sidecar,
    unused_url,
)

from ctxdb_pgstatus import HostSource, KnownMaster, OptionError, PgStatusClient, ReadRule, SidecarError
from ctxdb_pgstatus.locality import Locality

HOUR = 3600.0


@pytest.fixture
def sidecar() -> OriginalSidecar:
    return OriginalSidecar()


@pytest.fixture
async def url(sidecar: OriginalSidecar) -> AsyncIterator[str]:
    async with serve(sidecar, http="httptools") as url:
        yield url


def a_source(client: PgStatusClient) -> HostSource:
    return client


async def test_the_client_answers_with_the_hosts_that_the_sidecar_names(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.hosts = (
        sidecar.entry("n1", master=True),
        sidecar.entry("both"),
        sidecar.entry("time", sync_by_bytes=False),
        sidecar.entry("bytes", sync_by_time=False),
        sidecar.entry("gone", alive=False),
    )
    async with PgStatusClient(url) as client:
        assert await client.master() == "n1"
        for question, hosts in (
            (client.replica, {"both", "time", "bytes"}),
            (client.sync_by_time, {"both", "time"}),
            (client.sync_by_bytes, {"both", "bytes"}),
            (client.sync_by_time_or_bytes, {"both", "time", "bytes"}),
            (client.sync_by_time_and_bytes, {"both"}),
        ):
            answers = Counter([await question() for _ in range(2 * len(hosts))])
            assert answers == dict.fromkeys(hosts, 2)
        assert await a_source(client).find_master() == "n1"
        assert await a_source(client).find_replicas() == {"both", "time", "bytes"}


async def test_hosts_of_pg_status_have_the_fields_that_pg_status_sends(url: str) -> None:
    async with PgStatusClient(url, max_age=0) as client:
        first = await client.hosts()
        assert [(host.host, host.alive, host.role) for host in first] == [
            ("n1", True, "master"),
            ("n2", True, "replica"),
            ("n3", True, "replica"),
            ("n4", False, None),
        ]
        assert (first[1].position, first[1].lag_ms, first[1].in_sync_by_bytes) == (0x3000060, 0, True)
        assert (first[3].position, first[3].lag_ms, first[3].in_sync_by_bytes) == (None, None, False)
        # pg-status does not tell `since`. It stays at the time of the first answer, as nothing has changed.
        assert [host.since for host in await client.hosts()] == [host.since for host in first]


async def test_hosts_of_the_sidecar_have_all_fields() -> None:
    hosts = (master("n1"), master("n2"), replica("n3", by_time=False), dead("n4", "no route"))
    app, _ = app_of_hosts(*hosts)
    async with serve_sidecar(app) as url, PgStatusClient(url) as client:
        assert await client.hosts() == hosts
        assert (await client.hosts())[0].since == START
        # n2 says that it is a primary, and so is no replica to read from.
        assert await client.find_replicas() == {"n3"}
        assert {await client.replica() for _ in range(3)} == {"n3"}


async def test_the_nearest_replicas_are_named() -> None:
    app, _ = app_of_hosts(
        master("n1"), replica("n2"), replica("n3"), locality=Locality({"n2": "far", "n3": "here"}, current_dc="here")
    )
    async with serve_sidecar(app) as url, PgStatusClient(url) as client:
        assert {await client.replica() for _ in range(3)} == {"n3"}
        assert await client.find_replicas() == {"n2", "n3"}


async def test_a_replica_whose_last_poll_failed_is_named_only_without_others() -> None:
    app, _ = app_of_hosts(master("n1"), replica("n2", possible_dead=True), replica("n3"))
    async with serve_sidecar(app) as url, PgStatusClient(url) as client:
        assert {await client.replica() for _ in range(3)} == {"n3"}
        assert await client.find_replicas() == {"n2", "n3"}
    app, _ = app_of_hosts(master("n1"), replica("n2", possible_dead=True))
    async with serve_sidecar(app) as url, PgStatusClient(url) as client:
        assert await client.replica() == "n2"


async def test_without_a_replica_the_master_is_named(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.hosts = (sidecar.entry("n1", master=True), sidecar.entry("n2", alive=False))
    async with PgStatusClient(url) as client:
        assert await client.replica() == "n1"
        assert await client.find_replicas() == frozenset()


async def test_without_a_master_no_host_is_named(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.master, sidecar.hosts = None, (sidecar.entry("n1", alive=False),)
    async with PgStatusClient(url) as client:
        assert await client.master() is None
        assert await client.replica() is None


async def test_an_answer_is_taken_from_memory(url: str, sidecar: OriginalSidecar) -> None:
    async with PgStatusClient(url, max_age=HOUR) as client:
        for _ in range(3):
            await client.master()
            await client.replica()
            await client.sync_by_time()
            await client.hosts()
    assert sorted(sidecar.paths()) == ["/hosts", "/master"]


async def test_an_answer_that_is_too_old_is_asked_for_anew(url: str, sidecar: OriginalSidecar) -> None:
    async with PgStatusClient(url, max_age=0) as client:
        assert await client.master() == "n1"
        sidecar.master = "n2"
        assert await client.master() == "n2"


async def test_callers_at_the_same_time_share_one_request(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.tell_timelines()
    async with PgStatusClient(url, max_age=0) as client:
        assert await asyncio.gather(*(client.master() for _ in range(50))) == ["n1"] * 50
        position = [client.find_replica(min_position=5) for _ in range(50)]
        assert await asyncio.gather(*position) == ["n2"] * 50
    assert sidecar.paths() == ["/master", "/hosts", "/replica"]


async def test_cancelled_caller_leaves_the_shared_request_to_other_callers(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.open.clear()
    async with PgStatusClient(url) as client:
        first, second = asyncio.create_task(client.master()), asyncio.create_task(client.master())
        await sidecar.arrived.wait()
        first.cancel()
        await asyncio.wait([first])
        sidecar.open.set()
        assert await second == "n1"
    assert first.cancelled()
    assert sidecar.paths() == ["/master"]


async def test_pg_status_is_not_asked_for_a_position_as_it_would_name_any_replica(
    url: str, sidecar: OriginalSidecar
) -> None:
    async with PgStatusClient(url, max_age=HOUR) as client:
        assert await client.find_replica() in ("n2", "n3")
        assert await client.find_replica(min_position=1, max_wait=HOUR) == "n1"
        assert await client.find_reader(ReadRule(fallback=False), min_position=1) is None
    assert sidecar.paths() == ["/hosts", "/master"]


async def test_a_question_by_position_is_sent_each_time(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.tell_timelines()
    async with PgStatusClient(url, max_age=HOUR) as client:
        await client.hosts()
        sidecar.asked.clear()
        assert await client.find_replica(min_position=0x1_0000_0060) == "n2"
        sidecar.replayed = "n3"
        assert await client.find_replica("time", min_position=0x1_0000_0060, max_wait=0.25) == "n3"
        sidecar.replayed = None
        assert await client.find_replica("time_and_bytes", min_position=1) is None
    assert [(each.path, each.query) for each in sidecar.asked] == [
        ("/replica", {"min_lsn": ["1/60"]}),
        ("/sync_by_time", {"min_lsn": ["1/60"], "wait_ms": ["250"]}),
        ("/sync_by_time_and_bytes", {"min_lsn": ["0/1"]}),
    ]


async def test_without_a_fit_replica_a_reader_by_rule_and_position_goes_to_the_master_that_the_sidecar_names_now(
    url: str, sidecar: OriginalSidecar
) -> None:
    sidecar.tell_timelines()
    async with PgStatusClient(url, max_age=HOUR) as client:
        assert await client.find_reader(ReadRule(max_lag_ms=5)) in ("n2", "n3")
        # The host n4 was dead, and has been promoted since.
        sidecar.replayed = "n4"
        assert await client.find_reader(ReadRule(max_lag_ms=5), min_position=1) == "n4"
        assert await client.find_reader(ReadRule(max_lag_ms=5, fallback=False), min_position=1) is None


async def test_the_failure_of_a_request_that_its_caller_has_given_up_is_not_logged_as_an_error(
    url: str, sidecar: OriginalSidecar, caplog: pytest.LogCaptureFixture
) -> None:
    # pytest would keep the record of the client's own warning, with the error in it and the task that has raised that.
    caplog.set_level(logging.ERROR)
    sidecar.tell_timelines()
    async with PgStatusClient(url) as client:
        await client.hosts()
        sidecar.open.clear()
        sidecar.arrived.clear()
        before = asyncio.all_tasks()
        asking = asyncio.create_task(client.find_replica(min_position=1))
        await sidecar.arrived.wait()
        asking.cancel()
        await asyncio.wait([asking])
        sidecar.status = 500
        sidecar.open.set()
        await asyncio.wait(asyncio.all_tasks() - before)
    del asking
    gc.collect()
    assert caplog.records == []


async def test_the_sidecar_waits_for_a_replica_that_has_replayed_the_position() -> None:
    app, monitor = app_of_hosts(master("n1"), replica("n2", position=1))
    monitor.next = [cluster(master("n1"), replica("n2", position=2))]
    async with serve_sidecar(app) as url, PgStatusClient(url) as client:
        assert await client.find_replica(min_position=2) == "n1"
        assert await client.find_replica(min_position=2, max_wait=0.1) == "n2"


async def test_each_confirmation_has_the_sidecar_ask_its_hosts(url: str, sidecar: OriginalSidecar) -> None:
    async with PgStatusClient(url, max_age=HOUR) as client:
        assert await client.master() == "n1"
        assert await client.confirm_master("n1")
        sidecar.master = "n2"
        assert not await client.confirm_master("n1")
        assert [each.headers.get("cache-control") for each in sidecar.asked] == [None, "no-cache", "no-cache"]
        # The answer to the confirmation is kept for later questions.
        assert await client.master() == "n2"
    assert len(sidecar.asked) == 3


async def test_a_confirmation_comes_from_a_request_that_began_after_the_call(
    url: str, sidecar: OriginalSidecar
) -> None:
    async with PgStatusClient(url, max_age=HOUR) as client:
        sidecar.open.clear()
        first = asyncio.create_task(client.confirm_master("n1"))
        await sidecar.arrived.wait()
        later = [asyncio.create_task(client.confirm_master("n1")) for _ in range(20)]
        await asyncio.sleep(0)
        sidecar.open.set()
        assert await first
        assert all(await asyncio.gather(*later))
    # One request is for the first confirmation, and one for all that came while the first was under way.
    assert sidecar.paths() == ["/master", "/master"]


async def test_a_confirmation_raises_an_error_if_the_sidecar_is_away() -> None:
    async with unused_url() as url, PgStatusClient(url) as client:
        with pytest.raises(SidecarError, match="could not be asked for /master"):
            await client.confirm_master("n1")


async def test_confirmation_fails_at_once_while_the_sidecar_is_known_to_hang(
    url: str, sidecar: OriginalSidecar
) -> None:
    async with PgStatusClient(url, max_age=HOUR, timeout=0.05) as client:
        sidecar.open.clear()
        for _ in range(3):
            with pytest.raises(SidecarError, match="no answer within"):
                await client.confirm_master("n1")
        assert len(sidecar.asked) == 1
        sidecar.open.set()


async def test_the_last_master_is_remembered_with_its_timeline() -> None:
    app, _ = app_of_hosts(master("n1", timeline=7), replica("n2"))
    async with serve_sidecar(app) as url:
        client = PgStatusClient(url)
        assert client.known_master() is None
        await client.confirm_master("n1")
        assert client.known_master() == KnownMaster("n1", None)
        await client.hosts()
        assert client.known_master() == KnownMaster("n1", 7)
    with pytest.raises(SidecarError):
        await client.confirm_master("n1")
    assert client.known_master() == KnownMaster("n1", 7)
    await client.aclose()


async def test_the_timeline_of_a_replica_that_has_become_the_master_is_not_remembered() -> None:
    app, monitor = app_of_hosts(master("n1", timeline=7), replica("n2", timeline=7))
    async with serve_sidecar(app) as url, PgStatusClient(url) as client:
        await client.hosts()
        monitor.next = [cluster(dead("n1"), master("n2", timeline=8), master="n2")]
        assert await client.confirm_master("n2")
        assert client.known_master() == KnownMaster("n2", None)


async def test_a_master_is_forgotten_when_a_failure_of_it_is_reported(url: str, sidecar: OriginalSidecar) -> None:
    async with PgStatusClient(url, max_age=HOUR) as client:
        await client.confirm_master("n1")
        client.report_failure("n2")
        assert client.known_master() == KnownMaster("n1", None)
        client.report_failure("n1")
        assert client.known_master() is None
        await client.confirm_master("n1")
        assert client.known_master() == KnownMaster("n1", None)


async def test_a_master_is_remembered_for_the_grace_time_only(url: str) -> None:
    async with PgStatusClient(url, grace=0) as client:
        assert await client.confirm_master("n1")
        assert client.known_master() is None


async def test_after_a_reported_failure_the_next_answer_does_not_come_out_of_memory(
    url: str, sidecar: OriginalSidecar
) -> None:
    async with PgStatusClient(url, max_age=HOUR) as client:
        await client.master()
        await client.replica()
        sidecar.asked.clear()
        sidecar.master = "n2"
        client.report_failure("n1")
        assert await client.master() == "n2"
        await client.replica()
        await client.master()
        await client.replica()
    assert [(each.path, each.headers.get("cache-control")) for each in sidecar.asked] == [
        ("/master", "no-cache"),
        ("/hosts", "no-cache"),
    ]


async def test_an_answer_that_was_requested_before_a_reported_failure_is_not_used_after_it(
    url: str, sidecar: OriginalSidecar
) -> None:
    async with PgStatusClient(url, max_age=HOUR) as client:
        sidecar.open.clear()
        before = asyncio.create_task(client.master())
        await sidecar.arrived.wait()
        client.report_failure("n1")
        after = asyncio.create_task(client.master())
        await asyncio.sleep(0)
        sidecar.open.set()
        assert (await before, await after) == ("n1", "n1")
        assert len(sidecar.asked) == 2
        await client.master()
        assert len(sidecar.asked) == 2


async def test_the_last_good_answer_is_kept_while_the_sidecar_is_down(
    sidecar: OriginalSidecar, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(sidecar, http="httptools") as url:
        client = PgStatusClient(url, max_age=0)
        assert await client.master() == "n1"
        replicas = {await client.replica() for _ in range(2)}
    with caplog.at_level(logging.WARNING, "ctxdb_pgstatus.client"):
        assert [await client.master() for _ in range(5)] == ["n1"] * 5
        assert {await client.replica() for _ in range(4)} == replicas == {"n2", "n3"}
        assert await client.find_replica(min_position=5) == "n1"
    await client.aclose()
    # The failure is logged once, and not at each question.
    assert [record.levelname for record in caplog.records if record.name == "ctxdb_pgstatus.client"] == ["WARNING"]


async def test_callers_get_the_last_answer_at_once_while_the_sidecar_is_known_to_hang(
    url: str, sidecar: OriginalSidecar
) -> None:
    async with PgStatusClient(url, max_age=0, timeout=0.05) as client:
        assert await client.master() == "n1"
        sidecar.open.clear()
        assert await client.master() == "n1"  # which waited until the time was up
        client._timeout = HOUR
        assert await asyncio.gather(*(client.master() for _ in range(20))) == ["n1"] * 20
        sidecar.master = "n2"
        sidecar.open.set()

        # The sidecar is asked again in the background, and its new answer is given as soon as it comes.
        async with asyncio.timeout(10):
            while await client.master() != "n2":
                await asyncio.sleep(0.001)


async def test_an_answer_that_is_older_than_allowed_is_not_given(sidecar: OriginalSidecar) -> None:
    async with serve(sidecar, http="httptools") as url:
        client = PgStatusClient(url, max_age=0, max_stale=0)
        assert await client.master() == "n1"
    with pytest.raises(SidecarError, match="could not be asked for /master"):
        await client.master()
    await client.aclose()


async def test_a_sidecar_that_was_never_there_is_an_error_that_says_what_to_do() -> None:
    async with unused_url() as url, PgStatusClient(url) as client:
        for question in (client.master, client.replica, client.hosts, client.find_replicas):
            with pytest.raises(SidecarError, match=rf"^The sidecar at {url} could not be asked.*Start it"):
                await question()
        with pytest.raises(SidecarError, match="could not be asked"):
            await client.find_replica(min_position=1)


@pytest.mark.parametrize(
    ("status", "raw", "reason"),
    [
        (503, b'{"error_text": "pg_monitor is not ready"}', "it has not asked its hosts yet"),
        (500, b"", "it answers with status 500"),
        (302, b"", "it answers with status 302"),
        (200, b"<html>", "is none of a sidecar's"),
        (200, b'{"hosts": []}', "is none of a sidecar's"),
        (200, b'{"host": 5}', "is none of a sidecar's"),
        (404, b"Not Found", "is none of a sidecar's"),
    ],
)
async def test_malformed_answer_is_an_error(
    url: str, sidecar: OriginalSidecar, status: int, raw: bytes, reason: str
) -> None:
    sidecar.status, sidecar.raw = status, raw
    async with PgStatusClient(url) as client:
        with pytest.raises(SidecarError, match=reason):
            await client.master()
        with pytest.raises(SidecarError):
            await client.hosts()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", 5),
        ("lag_ms", "5"),
        ("lag_bytes", 1.5),
        ("timeline", True),
        ("lsn", "0/x"),
        ("since", "2026-03-01T12:00:00"),
        ("started_at", "2026-03-01T12:00:00"),
        ("system_identifier", "5"),
        ("error", []),
        ("promotion", {"timeline": "1", "lsn": "0/1"}),
        ("promotion", 5),
    ],
)
async def test_an_answer_with_an_impossible_value_is_an_error(
    url: str, sidecar: OriginalSidecar, name: str, value: object
) -> None:
    sidecar.raw = json.dumps([{"host": "n2", "alive": True, "master": False, name: value}]).encode()
    async with PgStatusClient(url) as client:
        for question in (
            client.hosts,
            client.find_replicas,
            lambda: client.find_reader(ReadRule(max_lag_ms=5, max_lag_bytes=5)),
            lambda: client.promotion_of("n2"),
        ):
            with pytest.raises(SidecarError, match="is none of a sidecar's"):
                await question()


async def test_an_unknown_fault_of_a_newer_sidecar_is_ignored(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.raw = json.dumps([{"host": "n2", "alive": True, "master": False, "fault": "new"}]).encode()
    async with PgStatusClient(url) as client:
        assert [host.fault for host in await client.hosts()] == [None]


@pytest.mark.parametrize(
    ("raw", "fields", "reason"),
    [
        (b"[" * 100_000, [], "is none of a sidecar's"),
        (b'{"host":' * 100_000, [], "is none of a sidecar's"),
        (b"9" * 100_000, [], "is none of a sidecar's"),
        (b'{"host": "' + b"n" * (1 << 20) + b'"}', [], "longer than 1048576 bytes"),
        (gzip.compress(b'{"host": "' + b"n" * (1 << 26) + b'"}'), [(b"content-encoding", b"gzip")], "compressed"),
    ],
    ids=["nested lists", "nested objects", "a long number", "a long answer", "a compressed answer"],
)
async def test_an_answer_that_would_cost_too_much_to_read_is_an_error(
    url: str, sidecar: OriginalSidecar, raw: bytes, fields: list[tuple[bytes, bytes]], reason: str
) -> None:
    async with PgStatusClient(url, max_age=0) as client:
        sidecar.raw, sidecar.fields = raw, fields
        with pytest.raises(SidecarError, match=reason):
            await client.master()
        # The next answer is read again.
        sidecar.raw, sidecar.fields = None, ()
        assert await client.master() == "n1"
    assert {each.headers["accept-encoding"] for each in sidecar.asked} == {"identity"}


async def test_secrets_of_the_address_are_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    async with unused_url() as url:
        client = PgStatusClient(url.replace("://", "://user:hunter2@") + "/?token=hunter2")
        assert "hunter2" not in repr(client)
        with caplog.at_level(logging.DEBUG, "ctxdb_pgstatus"), pytest.raises(SidecarError) as info:
            await client.master()
        await client.aclose()
    assert "hunter2" not in str(info.value) + caplog.text
    assert info.value.__context__ is None


async def test_a_password_in_the_address_is_sent_and_never_logged(
    url: str, sidecar: OriginalSidecar, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        async with PgStatusClient(url.replace("://", "://us%40er:hunt%40er2@")) as client:
            await client.master()
    authorization = "Basic " + b64encode(b"us@er:hunt@er2").decode()
    assert [request.headers["authorization"] for request in sidecar.asked] == [authorization]
    assert "hunt" not in caplog.text


@pytest.mark.parametrize("base_url", ["", "127.0.0.1:8000", "ftp://n1", "http://", "http://user:hunter2@n1:port", 3])
def test_an_invalid_address_is_refused(base_url: Any) -> None:
    with pytest.raises(OptionError, match="`base_url`") as info:
        PgStatusClient(base_url)
    assert "hunter2" not in str(info.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_age": -1},
        {"grace": -1},
        {"timeout": 0},
        {"max_stale": 0.5},
        {"max_stale": "long"},
        {"max_age": float("nan")},
        {"timeout": "3"},
    ],
    ids=str,
)
def test_invalid_options_of_the_client_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"`{next(iter(options))}`"):
        PgStatusClient("http://127.0.0.1:8000", **options)


async def test_closed_client_can_be_used_again(url: str) -> None:
    client = PgStatusClient(url, max_age=0)
    assert await client.master() == "n1"
    await client.aclose()
    assert await client.master() == "n1"
    await client.aclose()


async def test_waiting_caller_gets_an_error_when_the_client_is_closed(url: str, sidecar: OriginalSidecar) -> None:
    sidecar.open.clear()
    client = PgStatusClient(url)
    waiting = asyncio.create_task(client.master())
    await sidecar.arrived.wait()
    await client.aclose()
    with pytest.raises(SidecarError, match="closed"):
        await waiting
    sidecar.open.set()


async def test_event_loops_share_kept_answers(url: str, sidecar: OriginalSidecar) -> None:
    client = PgStatusClient(url, max_age=HOUR)

    async def ask() -> str | None:
        async with client:
            host = await client.master()
            return host if await client.confirm_master("n1") else None

    async with client:
        assert await client.confirm_master("n1")
        found = [await asyncio.to_thread(asyncio.run, ask()) for _ in range(2)]
        assert await client.master() == "n1"
    assert found == ["n1", "n1"]
    assert len(sidecar.asked) == 3
    assert client._loops == {}


async def test_the_requests_of_a_closed_event_loop_are_forgotten(url: str) -> None:
    client = PgStatusClient(url, max_age=HOUR)
    loop = asyncio.new_event_loop()
    await asyncio.to_thread(loop.run_until_complete, _open(client))
    loop.close()
    await client.master()
    assert list(client._loops) == [asyncio.get_running_loop()]
    await client.aclose()


async def _open(client: PgStatusClient) -> None:
    client._on_this_loop()
