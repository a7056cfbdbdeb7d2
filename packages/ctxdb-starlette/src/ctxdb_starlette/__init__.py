"""ctxdb for Starlette and FastAPI: the request's SQLAlchemy transaction, ended before its response leaves."""

from ctxdb_starlette.dependency import provide_session
from ctxdb_starlette.lifespan import close_on_shutdown
from ctxdb_starlette.middleware import DBSessionMiddleware

__all__ = ["DBSessionMiddleware", "close_on_shutdown", "provide_session"]
