"""The bank as a Litestar application: ``uvicorn --factory ctxdb_demo.litestar_app:create_app``.

No handler opens, commits, rolls back or closes anything. `CtxDBPlugin` does, before the response leaves.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from litestar import Litestar, MediaType, Request, Response, get, post
from litestar.exceptions import ValidationException
from litestar.openapi.config import OpenAPIConfig
from litestar.params import Body
from litestar.response import Stream
from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError

from ctxdb_demo import domain
from ctxdb_demo.database import db
from ctxdb_demo.schemas import (
    AccountModel,
    Bonus,
    Deposits,
    NewAccount,
    NewTransfer,
    Salaries,
    TransferModel,
    Withdrawal,
)
from ctxdb_litestar import CtxDBPlugin

AnyRequest: TypeAlias = Request[Any, Any, Any]


@get("/accounts")
async def list_accounts() -> list[AccountModel]:
    return [AccountModel.model_validate(account) for account in await domain.list_accounts()]


@post("/accounts")
async def open_account(data: Annotated[NewAccount, Body()]) -> AccountModel:
    return AccountModel.model_validate(await domain.open_account(data.owner, data.balance))


@post("/transfers")
async def transfer(data: Annotated[NewTransfer, Body()]) -> TransferModel:
    return TransferModel.model_validate(await domain.transfer(data.source, data.target, data.amount))


@post("/accounts/{owner:str}/deposits", status_code=204)
async def deposit_each(request: AnyRequest) -> None:
    amounts = Deposits.validate_json(await request.body())
    await domain.deposit_each(request.path_params["owner"], amounts)


@post("/accounts/{owner:str}/interest", status_code=204)
async def add_interest(request: AnyRequest) -> None:
    await domain.add_interest(request.path_params["owner"])


@post("/withdrawals")
async def pay_out(data: Annotated[Withdrawal, Body()]) -> dict[str, int]:
    return {"balance": await domain.pay_out(data.owner, data.amount)}


@post("/salaries")
async def pay_salaries(request: AnyRequest) -> Response[dict[str, list[str]]]:
    unknown = await domain.pay_salaries(Salaries.validate_json(await request.body()))
    # All or none: a response with a status from 400 on rolls back.
    return Response({"unknown": unknown}, status_code=422 if unknown else 200)


@post("/bonus", status_code=200)
async def pay_bonus(data: Annotated[Bonus, Body()]) -> dict[str, int]:
    return {"paid": await domain.pay_bonus(data.amount)}


@get("/accounts/{owner:str}/statement")
async def download_statement(request: AnyRequest) -> Stream:
    statement = await domain.read_statement(request.path_params["owner"])
    return Stream(statement.pages(), media_type=MediaType.TEXT)


def answer_refusal(request: AnyRequest, exc: domain.BankError) -> Response[dict[str, str]]:
    status = 404 if isinstance(exc, domain.UnknownAccountError) else 422
    return Response({"detail": str(exc)}, status_code=status)


def answer_invalid_body(request: AnyRequest, exc: Exception) -> Response[dict[str, str]]:
    return Response({"detail": str(exc)}, status_code=422)


def answer_conflict(request: AnyRequest, exc: IntegrityError) -> Response[dict[str, str]]:
    # Whether a statement broke the constraint or the commit did: the client is told the same.
    return Response({"detail": "This contradicts what the bank has on its books."}, status_code=409)


def create_app() -> Litestar:
    """Return the application; it uses the database that `ctxdb_demo.database.db` is connected to."""
    return Litestar(
        [
            list_accounts,
            open_account,
            transfer,
            deposit_each,
            add_interest,
            pay_out,
            pay_salaries,
            pay_bonus,
            download_statement,
        ],
        plugins=[CtxDBPlugin(db)],
        exception_handlers={
            domain.BankError: answer_refusal,
            ValidationException: answer_invalid_body,
            ValidationError: answer_invalid_body,
            IntegrityError: answer_conflict,
        },
        openapi_config=OpenAPIConfig(title="A small bank", version="1.0.0"),
        # The operator of the application decides what is logged, and where.
        logging_config=None,
    )
