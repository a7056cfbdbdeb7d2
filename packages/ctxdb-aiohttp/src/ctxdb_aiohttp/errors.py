"""The errors of the aiohttp adapter."""

from __future__ import annotations

from ctxdb_core import CtxDBError

__all__ = ["ApplicationFrozenError"]


class ApplicationFrozenError(CtxDBError, RuntimeError):
    """`setup` was called for an application that takes no middlewares any more.

    Raised once the application is starting, or was added to another one. The way out: call ``setup(app)`` where the
    application is made, before ``web.run_app(app)``, ``AppRunner(app).setup()`` or ``add_subapp(prefix, app)``.
    """

    def __init__(self) -> None:
        super().__init__(
            "This application takes no middlewares any more, as it has been started, or added to another one by "
            "`add_subapp()`. Call `setup(app)` where the application is made, before that."
        )
