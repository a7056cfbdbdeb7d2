"""The log of a run: kept back while all goes as it should."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["KeptLog", "keep_log"]


class KeptLog(logging.Handler):
    """Keeps warnings and errors to itself: servers log the error that nobody handles at length, and it is expected."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.lines: list[str] = []
        self.keeping = True

    def emit(self, record: logging.LogRecord) -> None:
        if self.keeping:
            self.lines.append(self.format(record))
        else:
            print(self.format(record), file=sys.stderr)

    def show(self) -> None:
        """Print what was kept."""
        for line in self.lines:
            print(line, file=sys.stderr)
        self.lines.clear()

    def show_from_now_on(self) -> None:
        """Print what comes instead of keeping it."""
        self.keeping = False


@contextmanager
def keep_log() -> Iterator[KeptLog]:
    """Keep what is logged during a block."""
    log = KeptLog()
    logging.getLogger().addHandler(log)
    try:
        yield log
    finally:
        logging.getLogger().removeHandler(log)
