"""The bank as a Starlette application: ``uvicorn --factory ctxdb_demo.starlette_app:create_app``.

No endpoint opens, commits, rolls back or closes anything. `DBSessionMiddleware` does, before the response leaves.
"""

from __future__ import annotations

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ctxdb_demo import domain
from ctxdb_demo.database import db
from ctxdb_demo.schemas import (
    AccountModel,
    Accounts,
    Bonus,
    Deposits,
    NewAccount,
    NewTransfer,
    Salaries,
    TransferModel,
    Withdrawal,
)
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown


async def list_accounts(request: Request) -> Response:
    accounts = Accounts.validate_python(await domain.list_accounts())
    return Response(Accounts.dump_json(accounts), media_type="application/json")


async def open_account(request: Request) -> Response:
    new = NewAccount.model_validate_json(await request.body())
    account = await domain.open_account(new.owner, new.balance)
    return JSONResponse(AccountModel.model_validate(account).model_dump(), status_code=201)


async def transfer(request: Request) -> Response:
    new = NewTransfer.model_validate_json(await request.body())
    moved = await domain.transfer(new.source, new.target, new.amount)
    return JSONResponse(TransferModel.model_validate(moved).model_dump(), status_code=201)


async def deposit_each(request: Request) -> Response:
    amounts = Deposits.validate_json(await request.body())
    await domain.deposit_each(request.path_params["owner"], amounts)
    return Response(status_code=204)


async def add_interest(request: Request) -> Response:
    await domain.add_interest(request.path_params["owner"])
    return Response(status_code=204)


async def pay_out(request: Request) -> Response:
    withdrawal = Withdrawal.model_validate_json(await request.body())
    balance = await domain.pay_out(withdrawal.owner, withdrawal.amount)
    return JSONResponse({"balance": balance}, status_code=201)


async def pay_salaries(request: Request) -> Response:
    unknown = await domain.pay_salaries(Salaries.validate_json(await request.body()))
    # All or none: a response with a status from 400 on rolls back.
    return JSONResponse({"unknown": unknown}, status_code=422 if unknown else 200)


async def pay_bonus(request: Request) -> Response:
    bonus = Bonus.model_validate_json(await request.body())
    return JSONResponse({"paid": await domain.pay_bonus(bonus.amount)})


async def download_statement(request: Request) -> Response:
    statement = await domain.read_statement(request.path_params["owner"])
    return StreamingResponse(statement.pages(), media_type="text/plain")


async def answer_refusal(request: Request, exc: Exception) -> Response:
    return JSONResponse({"detail": str(exc)}, status_code=404 if isinstance(exc, domain.UnknownAccountError) else 422)


async def answer_invalid_body(request: Request, exc: Exception) -> Response:
    return JSONResponse({"detail": str(exc)}, status_code=422)


async def answer_conflict(request: Request, exc: Exception) -> Response:
    # Whether a statement broke the constraint or the commit did: the client is told the same.
    return JSONResponse({"detail": "This contradicts what the bank has on its books."}, status_code=409)


def create_app() -> Starlette:
    """Return the application; it uses the database that `ctxdb_demo.database.db` is connected to."""
    return Starlette(
        routes=[
            Route("/accounts", list_accounts, methods=["GET"]),
            Route("/accounts", open_account, methods=["POST"]),
            Route("/transfers", transfer, methods=["POST"]),
            Route("/accounts/{owner}/deposits", deposit_each, methods=["POST"]),
            Route("/accounts/{owner}/interest", add_interest, methods=["POST"]),
            Route("/withdrawals", pay_out, methods=["POST"]),
            Route("/salaries", pay_salaries, methods=["POST"]),
            Route("/bonus", pay_bonus, methods=["POST"]),
            Route("/accounts/{owner}/statement", download_statement, methods=["GET"]),
        ],
        middleware=[Middleware(DBSessionMiddleware)],
        lifespan=close_on_shutdown(db),
        exception_handlers={
            domain.BankError: answer_refusal,
            ValidationError: answer_invalid_body,
            IntegrityError: answer_conflict,
        },
    )
