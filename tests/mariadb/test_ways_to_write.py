"""Each way to write, with a connection that is lost at each point of the protocol: what is told is what is stored."""

from __future__ import annotations

import pytest
from tests.support.faulty_network import Fault, FaultyMariaDBNetwork, Point
from tests.support.mariadb import MariaDatabase
from tests.support.ways import WAYS_TO_WRITE, WayToWrite

from ctxdb_core import CommitOutcomeUnknownError, DBConnect


@pytest.mark.parametrize("write", WAYS_TO_WRITE)
async def test_what_is_told_is_what_is_stored(
    far: DBConnect, network: FaultyMariaDBNetwork, database: MariaDatabase, write: WayToWrite
) -> None:
    for point in (Point.STATEMENT, Point.COMMIT, Point.COMMITTED):
        await database.query("DELETE FROM item")
        network.fail(point, Fault.DROP)
        told = "success"
        try:
            await write(far)
        except CommitOutcomeUnknownError:
            told = "unknown"
            assert point in (Point.COMMIT, Point.COMMITTED)
        except Exception:  # noqa: BLE001 - any of a driver's
            told = "failure"
            assert network.failed.is_set()
        network.heal()
        if told != "unknown":
            assert await database.names() == (["a"] if told == "success" else []), point
        await database.assert_quiet()
