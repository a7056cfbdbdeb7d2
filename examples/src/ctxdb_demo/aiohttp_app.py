"""The bank as an aiohttp application: ``python -m aiohttp.web ctxdb_demo.aiohttp_app:create_app``.

No handler opens, commits, rolls back or closes anything. `setup` sees to it, before the response leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError

from ctxdb_aiohttp import setup
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

routes = web.RouteTableDef()


@routes.get("/accounts")
async def list_accounts(request: web.Request) -> web.Response:
    accounts = Accounts.validate_python(await domain.list_accounts())
    return web.Response(body=Accounts.dump_json(accounts), content_type="application/json")


@routes.post("/accounts")
async def open_account(request: web.Request) -> web.Response:
    new = NewAccount.model_validate_json(await request.read())
    account = await domain.open_account(new.owner, new.balance)
    return web.json_response(AccountModel.model_validate(account).model_dump(), status=201)


@routes.post("/transfers")
async def transfer(request: web.Request) -> web.Response:
    new = NewTransfer.model_validate_json(await request.read())
    moved = await domain.transfer(new.source, new.target, new.amount)
    return web.json_response(TransferModel.model_validate(moved).model_dump(), status=201)


@routes.post("/accounts/{owner}/deposits")
async def deposit_each(request: web.Request) -> web.Response:
    amounts = Deposits.validate_json(await request.read())
    await domain.deposit_each(request.match_info["owner"], amounts)
    return web.Response(status=204)


@routes.post("/accounts/{owner}/interest")
async def add_interest(request: web.Request) -> web.Response:
    await domain.add_interest(request.match_info["owner"])
    return web.Response(status=204)


@routes.post("/withdrawals")
async def pay_out(request: web.Request) -> web.Response:
    withdrawal = Withdrawal.model_validate_json(await request.read())
    balance = await domain.pay_out(withdrawal.owner, withdrawal.amount)
    return web.json_response({"balance": balance}, status=201)


@routes.post("/salaries")
async def pay_salaries(request: web.Request) -> web.Response:
    unknown = await domain.pay_salaries(Salaries.validate_json(await request.read()))
    # All or none: a response with a status from 400 on rolls back.
    return web.json_response({"unknown": unknown}, status=422 if unknown else 200)


@routes.post("/bonus")
async def pay_bonus(request: web.Request) -> web.Response:
    bonus = Bonus.model_validate_json(await request.read())
    return web.json_response({"paid": await domain.pay_bonus(bonus.amount)})


@routes.get("/accounts/{owner}/statement")
async def download_statement(request: web.Request) -> web.StreamResponse:
    statement = await domain.read_statement(request.match_info["owner"])
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    await response.prepare(request)
    async for page in statement.pages():
        await response.write(page)
    return response


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except domain.BankError as exc:
        status = 404 if isinstance(exc, domain.UnknownAccountError) else 422
        return web.json_response({"detail": str(exc)}, status=status)
    except ValidationError as exc:
        return web.json_response({"detail": str(exc)}, status=422)
    except IntegrityError:
        # Whether a statement broke the constraint or the commit did: the client is told the same.
        return web.json_response({"detail": "This contradicts what the bank has on its books."}, status=409)


def create_app(arguments: Sequence[str] = ()) -> web.Application:
    """Return the application; it uses the database that `ctxdb_demo.database.db` is connected to.

    Args:
        arguments: what ``python -m aiohttp.web`` passes on of its command line; there are none.
    """
    app = web.Application(middlewares=[answer_errors])
    app.add_routes(routes)
    setup(app, db)
    return app
