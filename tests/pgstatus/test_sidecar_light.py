"""What the sidecar does without."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ctxdb_pgstatus

FOREIGN = ("sqlalchemy", "greenlet", "httpx", "ctxdb_core", "prometheus_client")
IMPORTED = "import sys; {}; print(*sorted({{name.partition('.')[0] for name in sys.modules}} & set({})))"


def imported_by(statement: str) -> list[str]:
    """Return which of the foreign packages a statement imports in a process of its own."""
    code = IMPORTED.format(statement, FOREIGN)
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import ctxdb_pgstatus",
        "import ctxdb_pgstatus.__main__",
        "from ctxdb_pgstatus.sidecar.command import main",
        "from ctxdb_pgstatus import HostMonitor, HostAddress, HostStatus",
    ],
)
def test_the_sidecar_starts_without_what_it_does_not_use(statement: str) -> None:
    # SQLAlchemy and httpx are for applications; prometheus_client is imported for the first scrape.
    assert imported_by(statement) == []


def test_public_functions_import_only_the_libraries_that_they_need() -> None:
    assert imported_by("from ctxdb_pgstatus import follow_master") == ["ctxdb_core", "greenlet", "sqlalchemy"]
    assert "httpx" in imported_by("from ctxdb_pgstatus import PgStatusClient")


def test_errors_that_are_raised_lazily_are_those_that_are_exported() -> None:
    with pytest.raises(ctxdb_pgstatus.HostListError):
        ctxdb_pgstatus.HostAddress.parse("")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        getattr(ctxdb_pgstatus, "nothing_of_the_kind")  # noqa: B009 - a type checker would refuse the plain form


def test_every_public_name_is_listed_before_it_is_used() -> None:
    code = "import ctxdb_pgstatus; print(set(ctxdb_pgstatus.__all__) - set(dir(ctxdb_pgstatus)))"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert listed.strip() == "set()"
