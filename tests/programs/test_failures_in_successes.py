"""Protocols that answer a failed operation by a 200, such as JSON-RPC and GraphQL."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from litestar import Litestar
from tests.support.application import Reply, current_request
from tests.support.database import Database, insert
from tests.support.server import http_client, serve
from tests.support.world import World

from ctxdb_core import DBConnect, db_session, on_rollback, run_in_new_ctx, set_rollback_only, transactional
from ctxdb_litestar import CtxDBPlugin
from ctxdb_starlette import DBSessionMiddleware


async def transfer(db: DBConnect, amount: int) -> str:
    await insert(db, f"withdrawn {amount}")
    if amount > 50:
        raise ValueError("over the limit")
    await insert(db, f"deposited {amount}")
    return "done"


async def test_a_failed_call_of_json_rpc_is_rolled_back_behind_its_200(world: World) -> None:
    async def rpc() -> Reply:
        async def complain() -> None:
            await insert(world.db, "complaint")

        await db_session(world.db)
        on_rollback(world.db, lambda: run_in_new_ctx(complain))
        try:
            return Reply(json.dumps({"result": await transfer(world.db, int(current_request.get().query))}))
        except ValueError as error:
            set_rollback_only()
            return Reply(json.dumps({"error": str(error)}))

    client = await world.start(("/", rpc))
    answers = [(await client.get(f"/?{amount}")).json() for amount in (60, 40)]
    assert answers == [{"error": "over the limit"}, {"result": "done"}]
    assert await world.names() == ["complaint", "deposited 40", "withdrawn 40"]


async def test_calls_of_a_batch_stand_or_fall_each_by_itself(world: World) -> None:
    async def rpc() -> Reply:
        results = []
        for amount in (60, 40, 70, 30):
            try:
                async with transactional(world.db, "nested"):
                    results.append(await transfer(world.db, amount))
            except ValueError:
                results.append("error")
        return Reply(json.dumps(results))

    assert (await world.get(rpc)).json() == ["error", "done", "error", "done"]
    assert await world.names() == ["deposited 30", "deposited 40", "withdrawn 30", "withdrawn 40"]


@pytest.mark.parametrize("framework", ["fastapi", "litestar"])
@pytest.mark.filterwarnings("ignore:.*Inferred dependency field")  # strawberry's own, in Litestar
async def test_a_failed_mutation_of_strawberry_is_rolled_back_behind_its_200(
    framework: str, db: DBConnect, database: Database
) -> None:
    strawberry: Any = pytest.importorskip("strawberry")
    extensions: Any = pytest.importorskip("strawberry.extensions")

    class RollBackFailures(extensions.SchemaExtension):  # type: ignore[misc]  # not everywhere installed
        def on_operation(self) -> Iterator[None]:
            yield
            if self.execution_context.result is not None and self.execution_context.result.errors:
                set_rollback_only()

    @strawberry.type
    class Query:
        hello: str = "hello"

    @strawberry.type
    class Mutation:
        @strawberry.mutation  # type: ignore[untyped-decorator]  # not everywhere installed
        async def transfer(self, amount: int) -> str:
            return await transfer(db, amount)

    schema = strawberry.Schema(Query, Mutation, extensions=[RollBackFailures])
    app: FastAPI | Litestar
    if framework == "fastapi":
        app = FastAPI()
        router: Any = importlib.import_module("strawberry.fastapi").GraphQLRouter(schema)
        app.include_router(router, prefix="/graphql")
        app.add_middleware(DBSessionMiddleware)
    else:
        controller: Any = importlib.import_module("strawberry.litestar").make_graphql_controller(schema, "/graphql")
        app = Litestar([controller], plugins=[CtxDBPlugin(db)], logging_config=None)
    async with serve(app) as url, http_client(url) as client:
        for amount in (60, 40):
            query = f"mutation {{ transfer(amount: {amount}) }}"
            response = await client.post("/graphql", json={"query": query})
            assert response.is_success
            assert ("errors" in response.json()) == (amount == 60)
    assert await database.names() == ["deposited 40", "withdrawn 40"]
