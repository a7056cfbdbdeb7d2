"""The errors of the Litestar adapter."""

from __future__ import annotations

from litestar.exceptions import ImproperlyConfiguredException

from ctxdb_core import CtxDBError

__all__ = ["PluginConfigurationError"]


class PluginConfigurationError(CtxDBError, ImproperlyConfiguredException):
    """A plugin of ctxdb does not fit the application: the name of a session is taken, or the plugins' order is wrong.

    It is raised when the application or the plugin is made, and says which other name or order to use.
    """
