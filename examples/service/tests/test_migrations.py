from __future__ import annotations

import pytest
from alembic import command
from tests.conftest import ALEMBIC


@pytest.mark.usefixtures("ctxdb_dbs")
def test_migrations_make_the_tables_of_the_models() -> None:
    command.check(ALEMBIC)
