"""`Engines`: the engines of a `DBConnect`, one for each host and event loop, and the changes of its host."""

from __future__ import annotations

import asyncio
import threading
from asyncio import _get_running_loop  # for implementers of event loops, and what costs the least
from collections.abc import Collection
from typing import Any

from ctxdb_core._databases.attempt_all import attempt_all
from ctxdb_core._databases.engine_creators import HostlessCreator
from ctxdb_core._databases.loop_engine import Lifetime, LoopEngine
from ctxdb_core._databases.target import NO_ENGINES, EngineListener, LoopEngines, Target
from ctxdb_core._databases.url import without_secrets
from ctxdb_core._wording import type_of
from ctxdb_core.errors import ArgumentTypeError, ArgumentValueError, ContextNotInitiatedError, HostNotSetError

__all__ = ["Engines", "Replacement", "check_host"]


class Replacement:
    """A change of the `Target` of a `DBConnect` that is taken back later."""

    def __init__(self, replaced: Target) -> None:
        self.replaced = replaced


class Engines:
    """Makes the engines of a `DBConnect` when they are first used, and retires them."""

    def __init__(self, target: Target, *, resolve_commits: bool) -> None:
        self.target: Target = target
        """Where the `DBConnect` leads now. It is read without the lock, and replaced as a whole while that is held."""
        self.resolve_commits = resolve_commits
        """Whether the engines ask PostgreSQL what became of a transaction whose COMMIT was lost."""
        # Guards all attributes: event loops of several threads may use the same database.
        self._lock = threading.Lock()
        self._replacements: list[Replacement] = []
        # These listeners are told of the engines of blocks of `overridden`, too.
        self._observing_listeners: tuple[EngineListener, ...] = ()

    # --- the engine of the running event loop -------------------------------------------------------------------------

    def of_running_loop(self) -> LoopEngine:
        """Return the engine of the current host for the running event loop, made now if need be.

        Raises:
            HostNotSetError: no host is known yet.
            ContextNotInitiatedError: no event loop of asyncio runs here.
        """
        loop = _get_running_loop()
        if loop is None:
            raise ContextNotInitiatedError(
                "No event loop of asyncio is running here, and asynchronous database drivers need one. Under trio, let "
                'the server or `anyio.run` use asyncio (`backend="asyncio"`; `--worker-class asyncio` for Hypercorn).'
            )
        return self.of(loop)

    def of(self, loop: asyncio.AbstractEventLoop) -> LoopEngine:
        """Return the engine of the current host for `loop`, which is running, made now if need be.

        Raises:
            HostNotSetError: no host is known yet.
        """
        engine = self.target.engines.get(loop)
        return self._open(loop) if engine is None else engine

    def check_knows_host(self) -> None:
        """Raise an error if no host is known yet.

        Raises:
            HostNotSetError: no host is known.
        """
        if not self.target.knows_host:
            if self.target.before_create_session is not None:
                raise HostNotSetError(
                    "This DBConnect has no host yet, as its `before_create_session_handler` has set none so far: have "
                    "it call `change_host`. `lazy_session_maker` does not await it: `await db.engine()` once before "
                    "its first use."
                )
            raise HostNotSetError(
                "This DBConnect has no host yet: pass `host=...`, or `await db.connect(host)` before its first use."
            )

    def _open(self, loop: asyncio.AbstractEventLoop) -> LoopEngine:
        with self._lock:
            self.check_knows_host()
            engine = self.target.engines.get(loop)
            if engine is None:
                host = self.target.host
                if host is None:
                    assert isinstance(self.target.engine_creator, HostlessCreator)
                    host = self.target.engine_creator.find_host()
                    self.target = self.target._replace(host=host)
                engine = self._make(host, self.target.engines)
                self.target = self.target._replace(engines={**_without_ended(self.target.engines), loop: engine})
            return engine

    def _make(self, host: str, others: LoopEngines) -> LoopEngine:
        """Return a new engine of `host` for the running event loop; `others` are those for other loops."""
        target = self.target
        in_memory = next((other for other in others.values() if other.lifetime is Lifetime.UNTIL_RETIRED), None)
        if in_memory is not None:
            return LoopEngine(host, target.engine_creator, target.session_maker_creator, in_memory.engine)
        engine = LoopEngine(
            host,
            target.engine_creator,
            target.session_maker_creator,
            # In a block of `overridden`, the database may be no PostgreSQL, which cannot be asked about a commit.
            resolve_commits=self.resolve_commits and not target.keeps_host,
        )
        for listener in (*target.listeners, *self._observing_listeners):
            listener(host, engine.engine)
        return engine

    def add_listener(self, listener: EngineListener, *, overridden: bool) -> None:
        """Call `listener` with each engine that there is, and with those to come: see `DBConnect.on_engine`."""
        with self._lock:
            if overridden:
                self._observing_listeners = (*self._observing_listeners, listener)
            else:
                self.target = self.target._replace(listeners=(*self.target.listeners, listener))
            for engine in self.target.all:
                listener(engine.host, engine.engine)

    # --- changes of the host ------------------------------------------------------------------------------------------

    async def change_host(self, host: str, keep: Collection[str]) -> None:
        """Make engines for `host` from now on, and retire those of hosts that are left: see `DBConnect.change_host`."""
        check_host(host)
        _check_hosts(keep)
        target = self.target
        if target.keeps_host:
            return
        if isinstance(target.engine_creator, HostlessCreator) and target.host is not None and host != target.host:
            raise ArgumentValueError(
                f"The engine_creator of this DBConnect takes no host, so it cannot be changed to {host!r}: let it "
                "take one, `def create(host): ...`."
            )
        if host == target.host and (not target.kept or target.kept.keys() <= set(keep)):
            return
        if left := self._switch(host, keep):
            await attempt_all([engine.retire for engine in left])

    def _switch(self, host: str, keep: Collection[str]) -> list[LoopEngine]:
        """Change the host, and return the engines that have to retire for it."""
        with self._lock:
            target = self.target
            engines, kept = target.engines, dict(target.kept)
            if host != target.host:
                engines = kept.pop(host, NO_ENGINES)
                loop = asyncio.get_running_loop()
                if loop not in engines:
                    engines = {**_without_ended(engines), loop: self._make(host, engines)}
                if target.host is not None:
                    kept[target.host] = target.engines
            left = [kept.pop(other) for other in [*kept] if other not in keep]
            self.target = target._replace(host=host, engines=engines, kept=kept)
        return [engine for engines in left for engine in engines.values()]

    def keep_host(self) -> None:
        """Let `change_host` do nothing from now on."""
        self.target = self.target._replace(keeps_host=True)

    async def close(self) -> None:
        """Retire each engine; the next use makes a new one."""
        with self._lock:
            old = self.target
            self.target = old._replace(engines=NO_ENGINES, kept=NO_ENGINES)
        await attempt_all([engine.retire for engine in old.all])

    def abandon(self) -> None:
        """Let go of each engine without waiting for anything: the `DBConnect` is garbage."""
        for engine in self.target.all:
            engine.abandon()

    # --- another target for a while -----------------------------------------------------------------------------------

    @property
    def is_replaced(self) -> bool:
        """Whether the `DBConnect` leads to another database, by `replace`."""
        return bool(self._replacements)

    def replace(self, **changes: Any) -> Replacement:
        """Go on with another target, which has no engine yet, until `put_back` is called."""
        with self._lock:
            replacement = Replacement(self.target)
            self.target = self.target._replace(**{"engines": NO_ENGINES, "kept": NO_ENGINES, **changes})
            self._replacements.append(replacement)
        return replacement

    def put_back(self, replacement: Replacement) -> Target:
        """Go on with what there was before `replacement`, and return the target that has ended, with its engines."""
        with self._lock:
            index = self._replacements.index(replacement)
            if replacement is self._replacements[-1]:
                ended, replaced = self.target, replacement.replaced
                added = [each for each in ended.listeners if each not in replaced.listeners]
                self.target = replaced._replace(listeners=(*replaced.listeners, *added))
            else:
                # A later replacement goes on: at its end, it puts back the target from before this one.
                later = self._replacements[index + 1]
                ended, later.replaced = later.replaced, replacement.replaced
            del self._replacements[index]
        return ended

    @property
    def own_target(self) -> Target:
        """The target from before all replacements, for what they leave as it is."""
        return self._replacements[0].replaced if self._replacements else self.target


def check_host(host: object) -> None:
    """Raise an error if `host` names no host.

    Raises:
        ArgumentTypeError: `host` is no string.
        HostNotSetError: `host` is empty.
    """
    if host is not None and not isinstance(host, str):
        raise ArgumentTypeError(f"{type_of(host)} is given as the host: give its name as a string.")
    if not host:
        raise HostNotSetError("The host is empty: name the host that the database runs on.")


def _check_hosts(keep: object) -> None:
    """Raise an error if `keep` is no collection of hosts.

    Raises:
        ArgumentTypeError: it is something else.
    """
    if isinstance(keep, str):
        name = repr(without_secrets(keep))
        raise ArgumentTypeError(f"keep={name} is one string: give a collection of hosts, as in `keep=[{name}]`.")
    if not isinstance(keep, Collection):
        raise ArgumentTypeError(f"{type_of(keep)} is given as `keep`: give a collection of hosts, a list for instance.")


def _without_ended(engines: LoopEngines) -> LoopEngines:
    """Return `engines` without those of closed event loops, as an engine ends with its loop."""
    return {loop: engine for loop, engine in engines.items() if not loop.is_closed()}
