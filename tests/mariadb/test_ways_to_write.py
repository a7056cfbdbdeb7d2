"""Each way to write, with a connection that is lost at each point of the protocol: no result contradicts the rows."""

from __future__ import annotations

import pytest
from tests.support.faulty_network import FaultyMariaDBNetwork, Point
from tests.support.mariadb import MariaDatabase
from tests.support.ways import WAYS_TO_WRITE, WayToWrite, assert_told_is_stored

from ctxdb_core import DBConnect


@pytest.mark.parametrize("write", WAYS_TO_WRITE)
async def test_a_way_to_write_succeeds_exactly_if_its_row_is_stored(
    far: DBConnect, network: FaultyMariaDBNetwork, database: MariaDatabase, write: WayToWrite
) -> None:
    points = (Point.STATEMENT, Point.COMMIT, Point.COMMITTED)
    await assert_told_is_stored(write, points, far, network, database)
