"""The sidecar answers as pg-status does: by a table of answers in `answers_of_pg_status.txt`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.server import http_client
from tests.support.sidecar import cluster, dead, master, replica, serve_sidecar, told_app

from ctxdb_pgstatus import HostStatus
from ctxdb_pgstatus.lsn import parse_lsn
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.choice import Locality
from ctxdb_pgstatus.sidecar.history import History

TABLE = Path(__file__).with_name("answers_of_pg_status.txt")
# The default limits of pg-status.
MAX_LAG_MS, MAX_LAG_BYTES = 1000, 1_000_000


@dataclass(frozen=True)
class State:
    """A state of a cluster, and the answers in it."""

    title: str
    lines: tuple[str, ...]
    answers: dict[str, str]


def read_table() -> list[State]:
    states = []
    for block in TABLE.read_text(encoding="utf-8").split("\n== ")[1:]:
        described, _, answered = block.strip().partition("\n--\n")
        title, *lines = described.split("\n")
        answers = dict(_split(line) for line in answered.split("\n"))
        states.append(State(title, tuple(lines), answers))
    return states


def _split(line: str) -> tuple[str, str]:
    question, _, answer = line.partition("  ")
    return question, answer.strip()


STATES = read_table()
CASES = [
    pytest.param(state, question, id=f"{state.title}: {question}") for state in STATES for question in state.answers
]


def an_app(state: State) -> SidecarApp:
    """Return a sidecar that knows a state."""
    current_dc = current_geo = None
    hosts: list[HostStatus] = []
    places: dict[str, dict[str, str | None]] = {"dc": {}, "geo": {}}
    for line in state.lines:
        first, *rest = line.split()
        if first == "not":
            return SidecarApp(History())
        if first == "in":
            current_dc, current_geo = rest
            continue
        values = dict(each.split("=", 1) for each in rest if "=" in each)
        for kind, place in places.items():
            place[first] = values.get(kind)
        hosts.append(_host(first, rest, values))
    locality = Locality(places["dc"], places["geo"], current_dc, current_geo)
    the_master = next((host.host for host in hosts if host.role == "master"), None)
    app, monitor = told_app(locality=locality)
    monitor.status = cluster(*hosts, master=the_master)
    return app


def _host(name: str, words: list[str], values: dict[str, str]) -> HostStatus:
    if "dead" in words:
        return dead(name)
    position = None if values["lsn"] == "?" else parse_lsn(values["lsn"])
    if "master" in words:
        return master(name, position=position, possible_dead="possible_dead" in words)
    lag_ms = None if values["ms"] == "?" else int(values["ms"])
    lag_bytes = None if values["bytes"] == "?" else int(values["bytes"])
    return replica(
        name,
        position=position,
        lag_ms=lag_ms,
        lag_bytes=lag_bytes,
        in_sync_by_time=lag_ms is not None and lag_ms <= MAX_LAG_MS,
        in_sync_by_bytes=lag_bytes is not None and lag_bytes <= MAX_LAG_BYTES,
        possible_dead="possible_dead" in words,
    )


@pytest.fixture
async def client(state: State) -> AsyncIterator[httpx.AsyncClient]:
    async with serve_sidecar(an_app(state)) as url, http_client(url) as client:
        yield client


def test_the_table_has_20_states_and_14_questions() -> None:
    assert len(STATES) == 20
    assert {len(state.answers) for state in STATES} == {14}
    assert len({tuple(state.answers) for state in STATES}) == 1


@pytest.mark.parametrize(("state", "question"), CASES)
async def test_the_sidecar_answers_as_pg_status_does(state: State, question: str, client: httpx.AsyncClient) -> None:
    path, _, as_json = question.partition(" as ")
    headers = {"accept": "application/json"} if as_json else {}
    status, _, expected = state.answers[question].partition(" ")
    response = await client.get(path, headers=headers)
    assert response.status_code == int(status)
    if not expected:
        return
    if expected.startswith(("{", "[")):
        assert_has(response.json(), json.loads(expected))
        return
    # Hosts that stand side by side take turns.
    hosts = expected.split()
    answers = Counter([response.text, *[(await client.get(path)).text for _ in range(2 * len(hosts) - 1)]])
    assert answers == dict.fromkeys(hosts, 2)


def assert_has(content: Any, expected: Any) -> None:
    """Assert that what is expected is there; an object may have more members."""
    if isinstance(expected, list):
        assert len(content) == len(expected)
        for each, wanted in zip(content, expected, strict=True):
            assert_has(each, wanted)
    else:
        assert {name: content.get(name, "missing") for name in expected} == expected
