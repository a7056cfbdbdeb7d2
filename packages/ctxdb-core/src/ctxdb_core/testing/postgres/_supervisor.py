"""The process between a test and its PostgreSQL servers, so that nothing of them is left however the test ends.

`_launcher.py` starts this file as a program of its own, which imports nothing but the standard library. Orders come in
by standard input, answers go out by standard output, each a line of JSON; orders are carried out concurrently. Standard
input closes however the other side ends (return, Ctrl-C, SIGKILL): then every server is stopped, and the directory with
their data is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__: list[str] = []

POLL_SECONDS = 0.01
REMOVE_TIMEOUT_SECONDS = 10.0
LOG_CHARACTERS = 2000
_READY = ("ready", "standby")


class _OrderError(Exception):
    """An order could not be carried out; the message goes back to the program that gave the order."""


class _Supervisor:
    """Servers, and the directory that all their files are in."""

    def __init__(self, binaries: Path) -> None:
        self.account = _unprivileged_account()
        self.directory = Path(
            tempfile.mkdtemp(prefix="ctxdb-postgres-", dir=_public_directory() if self.account else None)
        )
        self.servers: dict[str, asyncio.subprocess.Process] = {}
        self.frozen: set[asyncio.subprocess.Process] = set()
        self.binaries = binaries
        self.orders: dict[str, Callable[..., Awaitable[object]]] = {
            "run": self.run,
            "write": self.write,
            "copy": self.copy,
            "delete": self.delete,
            "names": self.names,
            "serve": self.serve,
            "signal": self.signal,
            "freeze": self.freeze,
            "thaw": self.thaw,
            "kill": self.kill,
            "stop": self.stop,
            "is_running": self.is_running,
            "log": self.log,
        }

    def prepare(self) -> None:
        """Let the account that the servers run as reach the directory, and the programs."""
        if self.account is not None:
            os.chown(self.directory, *self.account)
            self.binaries = _make_readable(self.binaries, self.directory)

    async def run(self, program: str, args: Sequence[str], env: Mapping[str, str] | None = None) -> str:
        """Run one of PostgreSQL's programs to its end, and return what it printed."""
        process = await asyncio.create_subprocess_exec(
            self.binaries / program,
            *args,
            **self._process_options(),
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                # With what initdb has started.
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            raise
        text = output.decode(errors="replace").strip()
        if process.returncode:
            raise _OrderError(f"{program} failed: {text[-LOG_CHARACTERS:]}")
        return text

    async def write(self, path: str, text: str) -> None:
        """Write a file that only the servers' account reads."""
        file = self.directory / path
        # Replaced as a whole, as a server may be reading it.
        new = file.with_name(f"{file.name}.new")
        new.touch(mode=0o600)
        new.write_text(text, encoding="utf-8")
        if self.account is not None:
            os.chown(new, *self.account)
        new.replace(file)

    async def copy(self, source: str, target: str) -> None:
        """Copy a directory."""
        await asyncio.to_thread(self._copy, str(self.directory / source), str(self.directory / target))

    def _copy(self, source: str, target: str) -> None:
        os.mkdir(target, mode=0o700)  # noqa: PTH102 - plain paths, as there are a thousand files
        if self.account is not None:
            os.chown(target, *self.account)
        for entry in os.scandir(source):
            path = f"{target}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                self._copy(entry.path, path)
                continue
            # Faster by far than what `shutil` and `cp` do, where the file system copies by itself.
            with open(entry.path, "rb", 0) as old, open(path, "xb", 0, opener=_open_private) as new:  # noqa: PTH123
                new.write(old.read())
                if self.account is not None:
                    os.fchown(new.fileno(), *self.account)

    async def delete(self, path: str) -> None:
        """Delete a file or a directory, if it is there."""
        target = self.directory / path
        if target.is_dir():
            await asyncio.to_thread(shutil.rmtree, target)
        else:
            target.unlink(missing_ok=True)

    async def names(self, path: str) -> list[str]:
        """Return the names of what is in a directory."""
        return [entry.name for entry in (self.directory / path).iterdir()]

    async def serve(self, name: str, args: Sequence[str], timeout: float) -> str:
        """Start the server on the data directory `name`; when it lets clients in, return ``ready`` or ``standby``."""
        if self._is_running(name):
            raise _OrderError(f"{name} is running.")
        with self._log(name).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                self.binaries / "postgres",
                "-D",
                self.directory / name,
                *args,
                **self._process_options(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.servers[name] = process
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while process.returncode is None:
                    lines = self._pid_file(name)
                    # The eighth line is the status that pg_ctl reads, too. A killed server leaves its file.
                    if len(lines) >= 8 and lines[0].strip() == str(process.pid) and lines[7].strip() in _READY:
                        return lines[7].strip()
                    await asyncio.sleep(POLL_SECONDS)
                raise _OrderError(f"the server ended: {self._log_text(name)}")
        raise _OrderError(f"the server was not ready after {timeout:.0f} s: {self._log_text(name)}")

    async def signal(self, name: str, number: int) -> None:
        """Send a signal to a server's first process."""
        self._running(name).send_signal(number)

    async def freeze(self, name: str) -> None:
        """Stop every process of a server, as it is."""
        process = self._running(name)
        self.frozen.add(process)
        await self._freeze(process)

    async def thaw(self, name: str) -> None:
        """Let the processes of a frozen server go on."""
        process = self._running(name)
        # A cluster gives this order for each of its nodes after each test, and hardly ever to a frozen one.
        if process in self.frozen:
            self._thaw(process)

    async def kill(self, name: str) -> None:
        """End every process of a server at once, and return when they are gone."""
        await self._kill(name, self._running(name))

    async def stop(self, name: str, number: int, timeout: float) -> None:
        """Have a server shut down by a signal, and return when it has ended."""
        process = self._running(name)
        process.send_signal(number)
        # A frozen server sees the signal only when it is thawed.
        self._thaw(process)
        try:
            async with asyncio.timeout(timeout):
                await process.wait()
        except TimeoutError:
            raise _OrderError(f"{name} has not ended after {timeout:.0f} s: {self._log_text(name)}") from None

    async def is_running(self, name: str) -> bool:
        """Return whether a server runs; a frozen one does."""
        return self._is_running(name)

    async def log(self, name: str) -> str:
        """Return the end of a server's log."""
        return self._log_text(name)

    async def remove(self) -> None:
        """Stop all servers, and delete the directory."""
        try:
            await asyncio.gather(*(self._end(name, process) for name, process in self.servers.items()))
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    async def _end(self, name: str, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            # Immediate shutdown: the data is deleted next, and a client that hangs must not keep the server.
            self._thaw(process)
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGQUIT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REMOVE_TIMEOUT_SECONDS):
                    await process.wait()
        await self._kill(name, process)

    async def _freeze(self, process: asyncio.subprocess.Process) -> list[int]:
        _send(process.pid, signal.SIGSTOP)
        # As long as the first process may run, it may start another one.
        while process.returncode is None and _state(process.pid) not in "TtZ":  # noqa: ASYNC110 - not ours
            await asyncio.sleep(POLL_SECONDS / 10)
        # Each child is in a process group of its own, so the children have to be found one by one.
        children = _children(process.pid)
        for child in children:
            _send(child, signal.SIGSTOP)
        return children

    def _thaw(self, process: asyncio.subprocess.Process) -> None:
        self.frozen.discard(process)
        for pid in (*_children(process.pid), process.pid):
            _send(pid, signal.SIGCONT)

    async def _kill(self, name: str, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            pids = await self._freeze(process)
            for pid in (*pids, process.pid):
                _send(pid, signal.SIGKILL)
            await process.wait()
            self.frozen.discard(process)
            while any(_state(pid) != "Z" for pid in pids):  # noqa: ASYNC110 - not ours
                await asyncio.sleep(POLL_SECONDS)
        self._remove_shared_memory(name)

    def _remove_shared_memory(self, name: str) -> None:
        """Remove what the kernel keeps of a killed server; one that was stopped has no such file."""
        lines = self._pid_file(name)
        if len(lines) >= 7 and len(lines[6].split()) == 2:
            ipc_rmid = 0
            ctypes.CDLL(None).shmctl(int(lines[6].split()[1]), ipc_rmid, None)

    def _is_running(self, name: str) -> bool:
        return name in self.servers and self.servers[name].returncode is None

    def _running(self, name: str) -> asyncio.subprocess.Process:
        if not self._is_running(name):
            raise _OrderError(f"{name} is not running.")
        return self.servers[name]

    def _process_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"cwd": self.directory, "stdin": subprocess.DEVNULL, "process_group": 0}
        if self.account is not None:
            options |= {"user": self.account[0], "group": self.account[1], "extra_groups": []}
        return options

    def _pid_file(self, name: str) -> list[str]:
        try:
            return (self.directory / name / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _log_text(self, name: str) -> str:
        return self._log(name).read_text(errors="replace").strip()[-LOG_CHARACTERS:]


async def _supervise() -> None:
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[str] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, orders.put_nowait, "")
    input_ = asyncio.StreamReader(limit=2**20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(input_), sys.stdin)

    async def read() -> None:
        while line := await input_.readline():
            orders.put_nowait(line.decode())
        orders.put_nowait("")

    reader = asyncio.create_task(read())
    tasks: set[asyncio.Task[None]] = set()
    supervisor: _Supervisor | None = None
    try:
        first = await orders.get()
        if not first:
            return
        try:
            supervisor = _Supervisor(Path(json.loads(first)["binaries"]))
            supervisor.prepare()
        except (_OrderError, OSError) as exc:
            _answer(error=str(exc))
            return
        _answer(result=str(supervisor.directory))
        while order := await orders.get():
            task = asyncio.create_task(_carry_out(supervisor, **json.loads(order)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    finally:
        # From here on nothing interrupts: what is not removed now would be left for good.
        reader.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A copy goes on in its thread when its order is cancelled, and would bring back what is removed.
        await loop.shutdown_default_executor()
        if supervisor is not None:
            await supervisor.remove()


async def _carry_out(supervisor: _Supervisor, id: int, order: str, arguments: dict[str, Any]) -> None:  # noqa: A002
    try:
        _answer(id=id, result=await supervisor.orders[order](**arguments))
    except (_OrderError, OSError, shutil.Error) as exc:
        _answer(id=id, error=str(exc))


def _answer(**answer: object) -> None:
    with contextlib.suppress(BrokenPipeError):
        # No reader is left: standard input closes, too.
        print(json.dumps(answer), flush=True)  # noqa: T201 - the answers of this program


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children(pid: int) -> list[int]:
    return [child for child, (parent, _) in _processes().items() if parent == pid]


def _state(pid: int) -> str:
    """Return the letter for a process's state: ``Z`` for one that has ended, whether or not its parent knows."""
    return _processes(pid).get(pid, (0, "Z"))[1]


def _processes(*pids: int) -> dict[int, tuple[int, str]]:
    """Return the parent, and a letter for the state, of some processes, or of all: those that there are."""
    processes = {}
    if Path("/proc/self/stat").exists():
        for entry in map(str, pids) if pids else filter(str.isdecimal, os.listdir("/proc")):  # noqa: PTH208 - many
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb", 0) as file:  # noqa: PTH123 - many
                # The name is in parentheses, and may hold any character.
                state, parent = file.read().rpartition(b")")[2].split(None, 2)[:2]
                processes[int(entry)] = (int(parent), state.decode())
    else:
        which = ["-p", ",".join(map(str, pids))] if pids else ["-A"]
        # Its status is 1 if there is none of the processes.
        ps = subprocess.run(["ps", *which, "-o", "pid=,ppid=,state="], stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603, S607
        for line in ps.stdout.splitlines():
            pid_, parent_, state_ = line.split()[:3]
            processes[int(pid_)] = (int(parent_), state_[0])
    return processes


def _unprivileged_account() -> tuple[int, int] | None:
    """Return the user and group to run the servers as: PostgreSQL refuses to run as root."""
    import pwd  # noqa: PLC0415 - Windows has no such module, and imports this file

    if os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam("nobody")
    except KeyError:
        raise _OrderError("PostgreSQL refuses to run as root, and there is no account 'nobody'.") from None
    return account.pw_uid, account.pw_gid


def _public_directory() -> Path:
    """Return a temporary directory that an unprivileged account can reach."""
    for candidate in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # noqa: S108 - each directory in it has its own name
        directory = Path(candidate).resolve()
        if all(parent.stat().st_mode & 0o001 for parent in (directory, *directory.parents)):
            return directory
    raise _OrderError(
        "PostgreSQL refuses to run as root, and the account 'nobody' can enter none of the temporary directories."
    )


def _make_readable(binaries: Path, directory: Path) -> Path:
    """Return `binaries`, or a copy below `directory` where an unprivileged account cannot reach the original."""
    if all(parent.stat().st_mode & 0o005 == 0o005 for parent in binaries.parents):
        return binaries
    # The wheel keeps the server's libraries beside its package: the copy is laid out as the original.
    install = binaries.parent
    package = install.parent
    copy = directory / "postgres"
    shutil.copytree(install, copy / package.name / install.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, copy / libraries.name, symlinks=True)
    return copy / package.name / install.name / binaries.name


if __name__ == "__main__":
    asyncio.run(_supervise())
