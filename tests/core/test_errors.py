"""Errors as exceptions of Python: what programs do with exceptions of any kind."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

import ctxdb_core.errors
from ctxdb_core import CommitOutcomeUnknownError, CtxDBError


def errors() -> Iterator[CtxDBError]:
    for name in ctxdb_core.errors.__all__:
        kind: type[CtxDBError] = getattr(ctxdb_core.errors, name)
        yield kind("what happened") if kind is CommitOutcomeUnknownError else kind()
    yield CommitOutcomeUnknownError("what happened", ("shop",), {"shop": 7})


# A `ProcessPoolExecutor` is broken for good by an error that it cannot unpickle.
@pytest.mark.parametrize("error", list(errors()), ids=lambda error: type(error).__name__)
def test_an_error_arrives_from_another_process_as_it_was(error: CtxDBError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
