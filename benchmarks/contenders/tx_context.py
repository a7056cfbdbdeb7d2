"""sqlalchemy-tx-context: context managers, without a middleware."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

from sqlalchemy_tx_context import SQLAlchemyTransactionContext
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.contenders._contender import Contender, Endpoint, Lookup, Respond
from benchmarks.database import EngineOptions, Work


class TxContext(Contender):
    """``async with db.transaction()`` in the handler."""

    name: ClassVar[str] = "sqlalchemy-tx-context"

    def __init__(self, url: str, options: EngineOptions) -> None:
        super().__init__(url, options)
        self.db = SQLAlchemyTransactionContext(self.engine)

    def endpoint(self, work: Work, respond: Respond) -> Endpoint:
        db = self.db

        async def handle(request: Request) -> Response:
            async with db.transaction():
                await work(db.get_session())
            return respond()

        return handle

    @asynccontextmanager
    async def lookup(self) -> AsyncIterator[Lookup]:
        db = self.db

        async def ask(times: int) -> None:
            for _ in range(times):
                db.get_session()

        async with db.session():
            yield ask
