"""Authentication, by fastapi-users."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request
from fastapi_users import BaseUserManager, FastAPIUsers, UUIDIDMixin, schemas
from fastapi_users.authentication import AuthenticationBackend, BearerTransport
from fastapi_users.authentication.strategy.db import AccessTokenDatabase, DatabaseStrategy
from fastapi_users.password import PasswordHelper
from fastapi_users_db_sqlalchemy import SQLAlchemyUserDatabase
from fastapi_users_db_sqlalchemy.access_token import SQLAlchemyAccessTokenDatabase
from sqlalchemy.ext.asyncio import AsyncSession

from ctxdb_core import joining_session
from shop import mails, settings
from shop.database import db
from shop.models import AccessToken, User


class UserRead(schemas.BaseUser[uuid.UUID]):
    """A user, as clients see it."""


class UserCreate(schemas.BaseUserCreate):
    """The data of a new user."""


class UserUpdate(schemas.BaseUserUpdate):
    """The data that a user may change."""


async def get_session() -> AsyncIterator[AsyncSession]:
    """Give fastapi-users a session that it may commit: the request's transaction is committed with the response."""
    async with joining_session(db) as session:
        yield session


# One session for users and tokens. It ends with the handler, before the response: so it needs the scope.
JoiningSession = Annotated[AsyncSession, Depends(get_session, scope="function")]


def get_user_db(session: JoiningSession) -> SQLAlchemyUserDatabase[User, uuid.UUID]:
    """Return where fastapi-users finds users."""
    return SQLAlchemyUserDatabase(session, User)


def get_access_token_db(session: JoiningSession) -> SQLAlchemyAccessTokenDatabase[AccessToken]:
    """Return where fastapi-users finds access tokens."""
    return SQLAlchemyAccessTokenDatabase(session, AccessToken)


password_helper = PasswordHelper()


class UserManager(UUIDIDMixin, BaseUserManager[User, uuid.UUID]):
    """The rules of fastapi-users, with the shop's own hook for new users."""

    reset_password_token_secret = settings.SECRET
    verification_token_secret = settings.SECRET

    async def on_after_register(self, user: User, request: Request | None = None) -> None:
        """Welcome a new user: if it is stored, and not otherwise."""
        await mails.write(user.email, "Welcome")


def get_user_manager(
    user_db: Annotated[SQLAlchemyUserDatabase[User, uuid.UUID], Depends(get_user_db)],
) -> UserManager:
    """Return the manager that fastapi-users works with."""
    return UserManager(user_db, password_helper)


def get_strategy(
    tokens: Annotated[AccessTokenDatabase[AccessToken], Depends(get_access_token_db)],
) -> DatabaseStrategy[User, uuid.UUID, AccessToken]:
    """Keep tokens in the database, so that they can be revoked."""
    return DatabaseStrategy(tokens, lifetime_seconds=24 * 60 * 60)


backend = AuthenticationBackend("token", BearerTransport("auth/login"), get_strategy)
fastapi_users = FastAPIUsers[User, uuid.UUID](get_user_manager, [backend])

CurrentUser = Annotated[User, Depends(fastapi_users.current_user(active=True))]
OptionalUser = Annotated[User | None, Depends(fastapi_users.current_user(optional=True, active=True))]
Employee = Annotated[User, Depends(fastapi_users.current_user(active=True, superuser=True))]
