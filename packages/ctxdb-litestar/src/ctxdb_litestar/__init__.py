"""ctxdb for Litestar: the request's SQLAlchemy transaction, ended before its response leaves."""

from ctxdb_litestar.errors import PluginConfigurationError
from ctxdb_litestar.plugin import CtxDBPlugin, EnclosingPlugin

__all__ = ["CtxDBPlugin", "EnclosingPlugin", "PluginConfigurationError"]
