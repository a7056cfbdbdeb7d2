"""`EmbeddedPostgres`: settings, failing starts and stops."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import psycopg
import pytest

import ctxdb_pgstatus.testing
from ctxdb_core import CtxDBError
from ctxdb_core.testing import EmbeddedPostgres, EmbeddedPostgresError
from ctxdb_core.testing.postgres import Launcher, find_free_port


def test_a_server_takes_settings_and_a_password() -> None:
    with EmbeddedPostgres({"work_mem": "1234kB"}, password="secret") as server:
        url = server.url("psycopg").replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            assert connection.execute("SHOW work_mem").fetchone() == ("1234kB",)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(url.replace("secret", "wrong"))


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(EmbeddedPostgresError, match=r"(?s)did not start: .*no_such_setting"):
        EmbeddedPostgres({"no_such_setting": "1"}).start()


def test_servers_of_workers_that_seed_alike_get_ports_of_their_own() -> None:
    # As pytest-randomly does in each worker of pytest-xdist.
    random.seed(1)
    before = random.getstate()
    find_free_port(["127.0.0.1"])
    assert random.getstate() == before


def test_a_start_is_ended_by_a_stop_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    server = EmbeddedPostgres()
    started = threading.Event()
    directories = []
    order = Launcher.order

    def note(launcher: Launcher, name: str, **arguments: object) -> object:
        directories.append(Path(launcher.started().result()))
        started.set()
        return order(launcher, name, **arguments)

    monkeypatch.setattr(Launcher, "order", note)

    def stop() -> None:
        started.wait()
        server.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(EmbeddedPostgresError, match="has ended"):
        server.start()
    stopping.join()
    assert not directories[0].exists()
    server.stop()


def test_a_supervisor_that_ends_during_a_copy_leaves_no_directory() -> None:
    launcher = Launcher()
    directory = Path(launcher.started().result())
    source, target = directory / "source", directory / "target"
    for number in range(20):
        folder = source / str(number)
        folder.mkdir(parents=True)
        for file in range(100):
            (folder / str(file)).touch()
    launcher.order("copy", source="source", target="target")
    while not target.exists():
        pass
    launcher.close()
    assert not directory.exists()


def test_the_server_is_the_same_under_the_name_of_ctxdb_pgstatus() -> None:
    assert ctxdb_pgstatus.testing.EmbeddedPostgres is EmbeddedPostgres
    assert issubclass(EmbeddedPostgresError, CtxDBError)
