"""The marks by which a database is known to be one of tests, so that no other one is ever emptied or dropped."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from pathlib import Path

MARK = "ctxdb: test database"
"""A comment on a PostgreSQL database that begins so says that tests may empty its tables."""

MARK_OF_MADE = f"{MARK}, made by create_database()"
"""The comment of a PostgreSQL database that `create_database` has made, and may drop."""

SQLITE_MARK = 0x63747864
"""The application ID of a SQLite file that `create_database` has made, and may remove: "ctxd" in ASCII."""

# "test" begins a word, or a capitalised part of one: shop_test, test1, testdb, ShopTests. Not "latest" or "contest".
_TEST_WORD = re.compile(r"(?:^|[^A-Za-z])(?:test|Test|TEST)|[a-z](?:Test|TEST)")

_SQLITE_MAGIC = b"SQLite format 3\x00"
# SQLite, "Database File Format", 1.3: "The Database Header".
_SQLITE_APPLICATION_ID = slice(68, 72)


def names_a_test(name: str) -> bool:
    """Return whether "test" begins one of the words of a database's name."""
    return _TEST_WORD.search(name) is not None


def is_sqlite_made_by_tests(file: Path) -> bool:
    """Return whether `create_database` has left its mark in a file."""
    header = b""
    if file.is_file():
        with file.open("rb") as stream:
            header = stream.read(_SQLITE_APPLICATION_ID.stop)
    return header.startswith(_SQLITE_MAGIC) and header[_SQLITE_APPLICATION_ID] == SQLITE_MARK.to_bytes(4, "big")


def is_sqlite_of_tests(file: Path, named: Collection[str]) -> bool:
    """Return whether a SQLite file is known to be one of tests.

    Args:
        file: the file.
        named: names of files, or their paths, that the user has called tests'.
    """
    path = file.resolve()
    return (
        not {file.name, str(file), str(path)}.isdisjoint(named)
        or names_a_test(file.name)
        # Nothing is put there to be kept.
        or path.is_relative_to(Path(tempfile.gettempdir()).resolve())
        or is_sqlite_made_by_tests(file)
    )
