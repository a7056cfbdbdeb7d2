"""`acquiring_code`: which code of the application is taking a connection, or making a statement."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import NamedTuple

from greenlet import getcurrent, greenlet

__all__ = ["CodePlace", "acquiring_code", "acquiring_instruction", "acquiring_place"]

# Between the code that makes a statement and the pool that gives it a connection.
_MACHINERY = {"asyncio", "contextlib", "ctxdb_core", "ctxdb_inspector", "greenlet", "sqlalchemy"}

# Files that are known to be of the machinery, or of the application. The frames on the way from the pool to the
# application are looked at for each connection, and the name of a file is found faster than a code object, which is
# hashed with its constants.
_machinery_files: set[str] = set()
_application_files: set[str] = set()
_MOST_FILES = 5000


class CodePlace(NamedTuple):
    """A place in the code. Its file, line and function are looked up only when they are shown, as that costs more."""

    code: CodeType | None
    instruction: int
    """The offset of the instruction in the code, in bytes."""

    def describe(self) -> tuple[str, int, str]:
        """Return its file, line and function."""
        if self.code is None:
            return "<unknown>", 0, "<unknown>"
        line = next(
            (line for start, end, line in self.code.co_lines() if start <= self.instruction < end and line is not None),
            self.code.co_firstlineno,
        )
        return self.code.co_filename, line, self.code.co_qualname


_UNKNOWN = None, 0


def acquiring_code() -> tuple[str, int, str]:
    """Return file, line and function of the code that is making a statement, or taking a connection, in this call.

    Frames of asyncio, SQLAlchemy and ctxdb are passed over.
    """
    return acquiring_place().describe()


def acquiring_place() -> CodePlace:
    """Return the place that `acquiring_code` describes."""
    return CodePlace(*acquiring_instruction())


def acquiring_instruction() -> tuple[CodeType | None, int]:
    """Return what `CodePlace` is made of; cheap enough to be called for each connection.

    Making a named tuple costs as much as going up three frames.
    """
    running = getcurrent()
    # SQLAlchemy runs the statement in a greenlet, with some thirty frames of its own in it. The coroutine that awaits
    # it is a few frames up the stack of the greenlet's parent. Only a function given to `run_sync` is in the greenlet.
    outer = running.parent
    frame = None if outer is None else outer.gr_frame
    if frame is not None:
        # The innermost frame is that of the function which has switched to the greenlet.
        frame = frame.f_back
    below: CodeType | None = None
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        if name not in _machinery_files and (name in _application_files or not _is_machinery(frame)):
            if below is not None and below.co_name == "run_sync":
                break
            return code, frame.f_lasti
        below = code
        frame = frame.f_back
    frame = sys._getframe(1)  # noqa: SLF001 - documented, and a hundredth of what `traceback` costs
    current: greenlet | None = running
    while current is not None:
        while frame is not None:
            code = frame.f_code
            name = code.co_filename
            if name not in _machinery_files and (name in _application_files or not _is_machinery(frame)):
                return code, frame.f_lasti
            frame = frame.f_back
        current = current.parent
        frame = None if current is None else current.gr_frame
    return _UNKNOWN


def _is_machinery(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    module: str = frame.f_globals.get("__name__") or ""
    is_machinery = module.partition(".")[0] in _MACHINERY
    # Names such as ``<string>`` belong to the code of many modules.
    if not name.startswith("<"):
        files = _machinery_files if is_machinery else _application_files
        if len(files) < _MOST_FILES:
            files.add(name)
    return is_machinery
