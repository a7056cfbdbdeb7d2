"""The table of promises is what `python -m benchmarks.promises` finds, as far as the contenders are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.contenders import Contender, load
from benchmarks.database import create_engine, pool_of
from benchmarks.promises import FunctionScope, Observer
from fastapi import Depends

from ctxdb_pgstatus.testing import EmbeddedPostgres

PAGE = Path(__file__).parents[2] / "docs" / "how-others-answer.md"


@pytest.mark.parametrize("name", ["ctxdb", "FastAPI yield dependency", FunctionScope, "hand-written"])
async def test_a_contender_answers_as_the_page_says(
    postgres_server: EmbeddedPostgres, name: str | type[Contender]
) -> None:
    if name is FunctionScope and "scope" not in Depends.__annotations__:
        pytest.skip("this FastAPI's dependencies have no scope")
    url = postgres_server.url()
    contender = (load(name) if isinstance(name, str) else name)(url, pool_of(5))
    engine = create_engine(url, pool_of(2))
    try:
        row = await Observer(engine).row(contender)
    finally:
        await contender.close()
        await engine.dispose()
    assert "| " + " | ".join(row) + " |" in PAGE.read_text(encoding="utf-8").splitlines()
