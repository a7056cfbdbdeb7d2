"""What the demo says on standard error while something takes time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


class Progress:
    """Says what is going on: in one changing line on a terminal, line by line elsewhere."""

    def __init__(self) -> None:
        # `soft_wrap` below, not a width: lines in a log are not the terminal's business.
        self._console = Console(stderr=True, highlight=False)

    def say(self, message: str) -> None:
        """Print a line that stays."""
        self._console.print(message, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, message: str) -> Iterator[Callable[[str], None]]:
        """Show `message` for the length of a block, which may replace it by calling what it is given."""
        if not self._console.is_terminal:
            self.say(message)
            yield self.say
            return
        # An ASCII spinner: whatever the terminal's encoding is.
        with self._console.status(message, spinner="line") as status:
            yield status.update
