"""ctxdb for aiohttp.web: the request's SQLAlchemy transaction, ended before its response leaves."""

from ctxdb_aiohttp.application import DATABASES, setup
from ctxdb_aiohttp.errors import ApplicationFrozenError

__all__ = ["DATABASES", "ApplicationFrozenError", "setup"]
