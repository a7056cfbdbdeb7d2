"""The metrics of the sidecar."""

from __future__ import annotations

import re

from tests.support.sidecar import cluster, dead, master, replica

from ctxdb_pgstatus.sidecar.metrics import render

LINE = re.compile(r'(?P<name>[a-z_]+)(?:\{(?P<labels>(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (?P<value>[-+0-9.e]+)')


def read(content: bytes) -> dict[tuple[str, str], float]:
    """Return the metrics of the cluster by name and labels, from a text that is read as strictly as Prometheus does."""
    text = content.decode()
    found: dict[tuple[str, str], float] = {}
    described: dict[str, set[str]] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# "):
            _, kind, name, _ = line.split(" ", 3)
            assert kind in {"HELP", "TYPE"}
            assert kind not in described.setdefault(name, set()), f"{line!r} is there twice"
            described[name].add(kind)
            continue
        if line.startswith("process_"):
            continue
        match = LINE.fullmatch(line)
        assert match is not None, line
        assert described.get(match["name"]) == {"HELP", "TYPE"}, line
        key = (match["name"].removeprefix("ctxdb_pgstatus_"), match["labels"] or "")
        assert key not in found, line
        found[key] = float(match["value"])
    return found


def test_the_metrics_hold_the_figures_of_each_host() -> None:
    found = read(render(cluster(master("n1"), replica("n2", by_time=False), dead("n3")), changes=4))
    assert found["ready", ""] == 1
    assert found["master_known", ""] == 1
    assert found["changes_total", ""] == 4
    assert [found["host_up", f'host="n{number}"'] for number in (1, 2, 3)] == [1, 1, 0]
    assert [found["host_master", f'host="n{number}"'] for number in (1, 2, 3)] == [1, 0, 0]
    assert found["host_lag_seconds", 'host="n2"'] == 6.193
    assert found["host_lag_bytes", 'host="n2"'] == 96
    assert found["host_in_sync_by_time", 'host="n2"'] == 0
    assert found["host_in_sync_by_bytes", 'host="n2"'] == 1
    assert found["host_wal_position_bytes", 'host="n1"'] == 0x3000060


def test_the_metrics_tell_a_primary_that_is_not_the_master() -> None:
    found = read(render(cluster(master("n1"), master("n2"), replica("n3", possible_dead=True)), changes=0))
    assert [found["host_master", f'host="n{number}"'] for number in (1, 2, 3)] == [1, 0, 0]
    assert [found["host_claims_master", f'host="n{number}"'] for number in (1, 2, 3)] == [1, 1, 0]
    assert [found["host_possible_dead", f'host="n{number}"'] for number in (1, 2, 3)] == [0, 0, 1]


def test_the_metrics_tell_the_fault_of_a_host() -> None:
    found = read(render(cluster(master("n1"), master("n2", fault="stale"), replica("n3")), changes=0))
    assert found["host_fault", 'fault="stale",host="n2"'] == 1
    assert found["host_fault", 'fault="rival",host="n2"'] == 0
    assert found["host_fault", 'fault="stale",host="n1"'] == 0


def test_the_metrics_hold_the_cpu_time_of_the_process() -> None:
    assert b"process_cpu_seconds_total " in render(None, changes=0)


def test_metrics_without_a_known_value_are_left_out() -> None:
    found = read(render(cluster(dead("n1"), replica("n2", lag_ms=None), master=None), changes=0))
    assert found["master_known", ""] == 0
    assert ("host_lag_seconds", 'host="n1"') not in found
    assert ("host_lag_seconds", 'host="n2"') not in found
    assert ("host_lag_bytes", 'host="n2"') in found


def test_the_metrics_tell_not_ready_until_each_host_was_asked() -> None:
    found = read(render(None, changes=0))
    assert found["ready", ""] == 0
    assert not any(name.startswith("host_") for name, _ in found)


def test_labels_are_escaped() -> None:
    found = read(render(cluster(replica('a"b\\c\nd'), master=None), changes=0))
    assert found["host_up", 'host="a\\"b\\\\c\\nd"'] == 1
