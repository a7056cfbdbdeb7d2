"""Imports every contender that is installed: for processes that are to have done so before they are forked."""

from __future__ import annotations

from contextlib import suppress

from benchmarks.contenders import NAMES, MissingContenderError, load

for _name in NAMES:
    with suppress(MissingContenderError):
        load(_name)
