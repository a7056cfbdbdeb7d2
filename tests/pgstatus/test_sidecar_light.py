"""Which libraries the sidecar starts without, and how much CPU and memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url
from tests.support.sidecar_process import running

import ctxdb_pgstatus
from ctxdb_pgstatus.testing import EmbeddedPostgres

FOREIGN = ("sqlalchemy", "greenlet", "httpx", "ctxdb_core", "prometheus_client")
IMPORTED = "import sys; {}; print(*sorted({{name.partition('.')[0] for name in sys.modules}} & set({})))"


def imported_by(statement: str) -> list[str]:
    """Return which of the `FOREIGN` packages a statement imports in a process of its own."""
    code = IMPORTED.format(statement, FOREIGN)
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import ctxdb_pgstatus",
        "import ctxdb_pgstatus.__main__",
        "from ctxdb_pgstatus.sidecar.command import main",
        "from ctxdb_pgstatus import HostMonitor, HostAddress, HostStatus",
    ],
)
def test_the_sidecar_starts_without_the_libraries_of_applications(statement: str) -> None:
    # SQLAlchemy and httpx are for applications; prometheus_client is imported for the first scrape.
    assert imported_by(statement) == []


_CLOSED_MONITOR = """
import asyncio
from ctxdb_pgstatus import HostMonitor

async def main():
    async with HostMonitor(["127.0.0.99"], user="postgres"):
        pass
"""

_CLIENT_THAT_LEAVES = """
import asyncio
from types import SimpleNamespace
from ctxdb_pgstatus.sidecar.app import SidecarApp
from ctxdb_pgstatus.sidecar.history import History
from ctxdb_pgstatus.sidecar.server import Request

async def main():
    app = SidecarApp(History())
    app.monitor = SimpleNamespace(status=SimpleNamespace(master="n1"), confirm_master=lambda host: asyncio.sleep(3600))
    answer = asyncio.create_task(app(Request(b"GET", "/master", b"", accepts_json=True, bypasses_memory=True)))
    await asyncio.sleep(0)
    answer.cancel()
    await asyncio.wait([answer])
"""


@pytest.mark.parametrize("program", [_CLOSED_MONITOR, _CLIENT_THAT_LEAVES], ids=["close", "a client that leaves"])
def test_the_sidecar_loads_no_errors_where_it_raises_none(program: str) -> None:
    # It takes a second of CPU to load them, for which no host would be asked, and no client answered.
    assert imported_by(f"exec({program!r}); asyncio.run(main())") == []


def test_public_functions_import_only_the_libraries_that_they_need() -> None:
    assert imported_by("from ctxdb_pgstatus import follow_master") == ["ctxdb_core", "greenlet", "sqlalchemy"]
    assert "httpx" in imported_by("from ctxdb_pgstatus import PgStatusClient")


def test_metrics_are_made_by_the_client_of_prometheus_and_need_no_other_library() -> None:
    assert imported_by("import ctxdb_pgstatus.sidecar.metrics") == ["prometheus_client"]


def test_a_lazily_imported_error_is_the_exported_class() -> None:
    with pytest.raises(ctxdb_pgstatus.HostListError):
        ctxdb_pgstatus.HostAddress.parse("")


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        getattr(ctxdb_pgstatus, "nothing_of_the_kind")  # noqa: B009 - a type checker would refuse the plain form


def test_every_public_name_is_listed_before_it_is_used() -> None:
    code = "import ctxdb_pgstatus; print(set(ctxdb_pgstatus.__all__) - set(dir(ctxdb_pgstatus)))"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert listed.strip() == "set()"


_MIB = 1024 * 1024


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def cpu_seconds(pid: int) -> float:
    # The name of the process may have spaces, and ends with the last parenthesis.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="this system does not tell what another process takes"
)
async def test_the_sidecar_takes_no_more_than_0_4_s_of_cpu_and_36_mib_until_it_has_asked_its_hosts(
    postgres_server: EmbeddedPostgres,
) -> None:
    url = make_url(postgres_server.url())
    taken = []
    # CPU time is measured, as the time on the clock depends on what else the machine does. CPU time does so a little,
    # too: so one start out of five, each of which usually takes half of the limit, has to be within the limit.
    for _ in range(5):
        async with running(hosts=f"{url.host}:{url.port}", pg_user=url.username or "") as sidecar:
            await sidecar.ready()
            assert resident_mib(sidecar.process.pid) <= 36
            taken.append(cpu_seconds(sidecar.process.pid))
            assert await sidecar.stop() == 0
        if taken[-1] <= 0.4:
            return
    pytest.fail(f"its starts have taken {taken} s of CPU")
