"""The sidecar of ctxdb-pgstatus in a process of its own, and what that takes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url

_START_TIMEOUT_SECONDS = 30.0
_MIB = 1024 * 1024
_WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; from ctxdb_pgstatus.sidecar import main; sys.exit(main())"
_WITH_UVLOOP = "import sys; from ctxdb_pgstatus.sidecar import main; sys.exit(main())"


@dataclass(frozen=True)
class Sidecar:
    """A sidecar that runs.

    Args:
        port: where it listens, on the loopback interface.
        pid: its process.
    """

    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has taken, in user and in system mode."""
        # The name of the process may have spaces, and ends with the last parenthesis.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mib(self) -> float:
        """Return how much memory it holds."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def is_measurable() -> bool:
    """Return whether the system tells what another process takes."""
    return Path("/proc/self/stat").exists() and Path("/proc/self/statm").exists()


@asynccontextmanager
async def run_sidecar(url: str, *, uvloop: bool) -> AsyncIterator[Sidecar]:
    """Run a sidecar that polls the server of `url`, until the block ends.

    Raises:
        RuntimeError: it does not start.
    """
    parts = make_url(url)
    variables = {
        "hosts": str(parts.host),
        "pg_port": str(parts.port or 5432),
        "pg_user": str(parts.username),
        "pg_password": str(parts.password or ""),
        "pg_database": str(parts.database),
        "http_port": "0",
        "log_format": "json",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _WITH_UVLOOP if uvloop else _WITHOUT_UVLOOP,
        env=os.environ | {f"pg_status__{name}": value for name, value in variables.items()},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    logs = asyncio.create_task(_discard(process.stderr, started := asyncio.get_running_loop().create_future()))
    try:
        try:
            port: int = await asyncio.wait_for(started, _START_TIMEOUT_SECONDS)
        except TimeoutError:
            raise RuntimeError("The sidecar did not start.") from None
        yield Sidecar(port, process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        await logs


async def _discard(stream: asyncio.StreamReader, started: asyncio.Future[int]) -> None:
    """Read what it logs to the end, and note its port."""
    last = b""
    async for line in stream:
        last = line
        if not started.done() and b'"server started"' in line:
            started.set_result(json.loads(line)["port"])
    if not started.done():
        started.set_exception(RuntimeError(f"The sidecar has ended: {last.decode(errors='replace')}"))
