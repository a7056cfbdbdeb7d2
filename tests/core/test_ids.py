"""The ids of units of work."""

from __future__ import annotations

import os
import warnings

import pytest

from ctxdb_core.adapters import new_unit_id


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
def test_ids_that_a_forked_process_gives_differ_from_those_of_its_parent() -> None:
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Threads of other tests may be at work (Python 3.12 warns of them): the new process only writes.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os.write(writing, new_unit_id().encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        given = pipe.read()
    os.waitpid(child, 0)
    assert "-" in given
    assert given.partition("-")[0] != new_unit_id().partition("-")[0]
