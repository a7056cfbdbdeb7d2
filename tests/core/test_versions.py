"""The warning of a version of SQLAlchemy that is too old for one of the promises."""

from __future__ import annotations

import warnings

import pytest

from ctxdb_core._sqlalchemy.versions import warn_of_lost_promises


@pytest.mark.parametrize(("version", "needed"), [("2.0.54", "2.0.55"), ("2.1.4", "2.1.5"), ("1.4.50", "2.0.55")])
def test_an_older_sqlalchemy_draws_a_warning_that_names_the_loss(version: str, needed: str) -> None:
    with pytest.warns(RuntimeWarning, match=rf"needs SQLAlchemy {needed}, and this is {version}.*lose its connection"):
        warn_of_lost_promises(version)


@pytest.mark.parametrize("version", ["2.0.55", "2.0.100", "2.1.5", "2.1.9", "2.2.0b1", "3.0.0"])
def test_a_sqlalchemy_that_is_recent_enough_draws_no_warning(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_lost_promises(version)
