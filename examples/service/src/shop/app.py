"""The application: ``uvicorn --factory shop.app:create_app``."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import IntegrityError, NoResultFound

from ctxdb_starlette import DBSessionMiddleware, close_on_shutdown
from shop import graphql
from shop.admin import add_admin
from shop.api import catalogue, health, orders
from shop.database import db
from shop.errors import ShopError
from shop.users import UserCreate, UserRead, UserUpdate, backend, fastapi_users


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Answer an error of the shop's functions."""
    assert isinstance(error, ShopError)
    return JSONResponse({"detail": str(error)}, error.status)


async def not_found(request: Request, error: Exception) -> JSONResponse:
    """Answer a `get_one` or `one` that has found nothing."""
    return JSONResponse({"detail": "Not found"}, 404)


async def conflict(request: Request, error: Exception) -> JSONResponse:
    """Answer a constraint that does not hold, be it found by a statement or by the commit."""
    return JSONResponse({"detail": "This contradicts what is stored."}, 409)


def create_app() -> FastAPI:
    """Make the application."""
    app = FastAPI(
        title="Shop",
        lifespan=close_on_shutdown(db),
        exception_handlers={ShopError: refused, NoResultFound: not_found, IntegrityError: conflict},
    )
    app.add_middleware(DBSessionMiddleware)
    app.include_router(fastapi_users.get_auth_router(backend), prefix="/auth", tags=["auth"])
    app.include_router(fastapi_users.get_register_router(UserRead, UserCreate), prefix="/auth", tags=["auth"])
    app.include_router(fastapi_users.get_users_router(UserRead, UserUpdate), prefix="/users", tags=["users"])
    app.include_router(catalogue.router)
    app.include_router(orders.router)
    app.include_router(health.router)
    app.include_router(graphql.router, prefix="/graphql")
    add_admin(app)
    return app
