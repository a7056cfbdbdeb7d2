"""The bank as a FastAPI application: ``uvicorn --factory ctxdb_demo.fastapi_app:create_app``.

No handler opens, commits, rolls back or closes anything. `DBSessionMiddleware` does, before the response leaves.
"""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy.exc import IntegrityError

from ctxdb_demo import domain
from ctxdb_demo.database import db
from ctxdb_demo.schemas import (
    AccountModel,
    Amount,
    Bonus,
    Deposit,
    NewAccount,
    NewTransfer,
    Owner,
    TransferModel,
    Withdrawal,
)
from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown

router = APIRouter()


@router.get("/accounts")
async def list_accounts() -> list[AccountModel]:
    return [AccountModel.model_validate(account) for account in await domain.list_accounts()]


@router.post("/accounts", status_code=201)
async def open_account(new: NewAccount) -> AccountModel:
    return AccountModel.model_validate(await domain.open_account(new.owner, new.balance))


@router.post("/transfers", status_code=201)
async def transfer(new: NewTransfer) -> TransferModel:
    return TransferModel.model_validate(await domain.transfer(new.source, new.target, new.amount))


@router.post("/accounts/{owner}/deposits", status_code=204)
async def deposit_each(owner: Owner, amounts: list[Deposit]) -> None:
    await domain.deposit_each(owner, amounts)


@router.post("/accounts/{owner}/interest", status_code=204)
async def add_interest(owner: Owner) -> None:
    await domain.add_interest(owner)


@router.post("/withdrawals", status_code=201)
async def pay_out(withdrawal: Withdrawal) -> dict[str, int]:
    return {"balance": await domain.pay_out(withdrawal.owner, withdrawal.amount)}


@router.post("/salaries")
async def pay_salaries(salaries: dict[Owner, Amount], response: Response) -> dict[str, list[str]]:
    unknown = await domain.pay_salaries(salaries)
    if unknown:
        # All or none: a response with a status from 400 on rolls back.
        response.status_code = 422
    return {"unknown": unknown}


@router.post("/bonus")
async def pay_bonus(bonus: Bonus) -> dict[str, int]:
    return {"paid": await domain.pay_bonus(bonus.amount)}


@router.get("/accounts/{owner}/statement")
async def download_statement(owner: Owner) -> StreamingResponse:
    statement = await domain.read_statement(owner)
    return StreamingResponse(statement.pages(), media_type="text/plain")


async def answer_refusal(request: Request, exc: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(exc)}, status_code=404 if isinstance(exc, domain.UnknownAccountError) else 422)


async def answer_conflict(request: Request, exc: Exception) -> JSONResponse:
    # Whether a statement broke the constraint or the commit did: the client is told the same.
    return JSONResponse({"detail": "This contradicts what the bank has on its books."}, status_code=409)


def create_app() -> FastAPI:
    """Return the application; it uses the database that `ctxdb_demo.database.db` is connected to."""
    app = FastAPI(
        title="A small bank",
        lifespan=close_on_shutdown(db),
        exception_handlers={domain.BankError: answer_refusal, IntegrityError: answer_conflict},
    )
    app.add_middleware(DBSessionMiddleware)
    app.include_router(router)
    return app
