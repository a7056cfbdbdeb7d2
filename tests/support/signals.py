"""Signals as processes that tests start shall find them."""

from __future__ import annotations

import signal


def let_children_be_interrupted() -> None:
    """Give processes that are started from now on the default for SIGINT, also where this process ignores it.

    A shell without job control starts background jobs with SIGINT ignored (POSIX, "Shell Command Language", 2.11), and
    `nohup` is mostly used with those. A program inherits that, so that a test which interrupts one would wait for ever.
    `exec` puts a signal that has a handler back to its default, and leaves an ignored one ignored. A handler that does
    nothing therefore ignores the signal here, as before, and not in the children.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)


def end_by_sigterm_as_by_ctrl_c() -> None:
    """Have SIGTERM, which `timeout` and CI send, interrupt the running test, so that fixtures end what they started.

    Python would end at once otherwise: the processes of sidecars, servers and poolers would be left, and directories.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
