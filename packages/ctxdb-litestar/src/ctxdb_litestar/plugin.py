"""`CtxDBPlugin`: the units of work, injected sessions and clean-up of a Litestar application."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from litestar.config.app import AppConfig
from litestar.handlers import BaseRouteHandler
from litestar.plugins import InitPlugin, ReceiveRoutePlugin
from litestar.routes import ASGIRoute, BaseRoute, HTTPRoute, WebSocketRoute

from ctxdb_core import ArgumentTypeError, DBConnect, commit_below_400
from ctxdb_core.adapters import (
    BeforeCommit,
    CommitPolicy,
    ReadsFrom,
    RequestPolicy,
    check_function,
    check_reads_from,
    check_statement_timeout,
    close_all,
    with_request,
)
from ctxdb_core.asgi import ASGIApp, Deadline
from ctxdb_litestar.boundary import add_middleware, mark_stream_boundary
from ctxdb_litestar.commit_errors import CommitErrorMiddleware, MountMiddleware
from ctxdb_litestar.dependency import check_name, check_still_injected, inject, session_provider
from ctxdb_litestar.enclosure import enclose
from ctxdb_litestar.errors import PluginConfigurationError
from ctxdb_litestar.middleware import LitestarDBSessionMiddleware

__all__ = ["CtxDBPlugin", "EnclosingPlugin"]


class CtxDBPlugin(InitPlugin, ReceiveRoutePlugin):
    """Gives each request and each websocket of a Litestar application a unit of work.

    ``Litestar(..., plugins=[CtxDBPlugin(db)])`` is all the wiring there is. If the commit fails, the exception handlers
    of the route and of the layers above it answer, as they would if the route handler had raised the error.

    Args:
        *dbs: closed when the application has shut down. They are optional: a unit of work takes whatever `DBConnect`
            its code asks for.
        before_commit: awaited with each session that is about to be committed.
        commit_policy: given the status of the response, and the ASGI scope if it takes a second argument: whether to
            commit.
        statement_timeout: how many seconds each statement of a request may take; see
            `ctxdb_core.set_statement_timeout`.
        deadline: given the ASGI scope of a request: when its last statement has to be done, on the event loop's clock;
            ``None`` for no deadline. Streamed bodies and background tasks are part of the request.
        reads_from: for databases, the one whose sessions requests by GET, HEAD, OPTIONS and TRACE get in their place,
            injected ones as well: ``{master: replica}``.
        **dependency_names: databases whose sessions are injected, by the names of the parameters: with
            ``CtxDBPlugin(session=db)``, ``session: NamedDependency[AsyncSession]`` is what ``await db_session(db)``
            returns. They are closed like the others.

    Raises:
        TypeError: a database is not a `DBConnect`, `reads_from` is no mapping of them, `deadline` or `before_commit` is
            no function, `statement_timeout` no number, or `commit_policy` none of a status, or of a status and a scope.
        ValueError: `statement_timeout` is not positive.
        PluginConfigurationError: Litestar reserves one of the names for itself.
    """

    def __init__(
        self,
        *dbs: DBConnect,
        before_commit: BeforeCommit | None = None,
        commit_policy: CommitPolicy | RequestPolicy = commit_below_400,
        statement_timeout: float | None = None,
        deadline: Deadline | None = None,
        reads_from: ReadsFrom | None = None,
        **dependency_names: DBConnect,
    ) -> None:
        for db in dbs:
            _check_database("", db)
        for name, db in dependency_names.items():
            check_name(name)
            _check_database(f"{name}=", db)
        self._dbs = tuple(dict.fromkeys((*dbs, *dependency_names.values())))
        self._providers = {name: session_provider(db) for name, db in dependency_names.items()}
        if before_commit is not None:
            check_function(before_commit, "`before_commit`")
        self._before_commit = before_commit
        self._commits = with_request(commit_policy)
        if deadline is not None and not callable(deadline):
            raise ArgumentTypeError(
                f"CtxDBPlugin(deadline=<{type(deadline).__name__}>): this is no function. Pass one that is given the "
                "ASGI scope; a database to be injected needs another name."
            )
        check_statement_timeout(statement_timeout)
        self._statement_timeout = statement_timeout
        self._deadline = deadline
        self._reads_from = check_reads_from(reads_from)

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Edit the configuration of an application.

        Raises:
            PluginConfigurationError: it has a dependency with the name of one of the sessions.
        """
        inject(self._providers, app_config)
        # As the last hook: those of the application may still use the database. Its lifespans are over by then.
        app_config.on_shutdown.append(self._close)
        return app_config

    def receive_route(self, route: BaseRoute) -> None:
        """Put the unit of work around the application that a route was registered on.

        Raises:
            PluginConfigurationError: another plugin has taken the name of one of the sessions.
        """
        handlers = _handlers(route)
        app = handlers[0].app
        check_still_injected(self._providers, app.dependencies)
        middleware = enclose(app, self._middleware, key=self)
        enclose(app.asgi_router, CommitErrorMiddleware, key=CommitErrorMiddleware)
        if isinstance(route, WebSocketRoute):
            return
        for handler in handlers:
            if mark_stream_boundary(handler, app):
                middleware.has_boundary = True
        if isinstance(route, ASGIRoute):
            add_middleware(route.route_handler, MountMiddleware)
            # What is mounted may have boundaries of its own, and requests of this application may lead there.
            middleware.has_boundary = True

    def _middleware(self, app: ASGIApp) -> LitestarDBSessionMiddleware:
        return LitestarDBSessionMiddleware(
            app,
            self._before_commit,
            self._commits,
            statement_timeout=self._statement_timeout,
            deadline=self._deadline,
            reads_from=self._reads_from,
        )

    async def _close(self) -> None:
        await close_all(*self._dbs)


class EnclosingPlugin(InitPlugin, ReceiveRoutePlugin):
    """Puts an ASGI middleware around the whole of a Litestar application, outside of its unit of work.

    Litestar's own middlewares are inside of it: they see a response before its transactions have been committed. The
    plugin comes after `CtxDBPlugin`: ``plugins=[CtxDBPlugin(db), EnclosingPlugin(middleware)]``.

    Args:
        middleware: called with an ASGI application, and returns another one.
    """

    def __init__(self, middleware: Callable[[ASGIApp], ASGIApp]) -> None:
        self._middleware = middleware

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Check the place among the plugins.

        Raises:
            PluginConfigurationError: `CtxDBPlugin` comes later.
        """
        later = app_config.plugins[app_config.plugins.index(self) :]
        if any(isinstance(each, CtxDBPlugin) for each in later):
            raise PluginConfigurationError(
                "EnclosingPlugin comes before CtxDBPlugin, and would be inside of the unit of work: list it after "
                "that, `plugins=[CtxDBPlugin(db), EnclosingPlugin(middleware)]`."
            )
        return app_config

    def receive_route(self, route: BaseRoute) -> None:
        """Put the middleware around the application that a route was registered on."""
        enclose(_handlers(route)[0].app, self._middleware, key=self, is_foreign=True)


def _handlers(route: BaseRoute) -> Sequence[BaseRouteHandler]:
    if isinstance(route, HTTPRoute):
        return route.route_handlers
    assert isinstance(route, ASGIRoute | WebSocketRoute)
    return [route.route_handler]


def _check_database(name: str, db: object) -> None:
    if not isinstance(db, DBConnect):
        raise ArgumentTypeError(
            f"CtxDBPlugin({name}<{type(db).__name__}>): this is no DBConnect. Pass the DBConnects of the application, "
            "those to be injected by name; its options are `before_commit`, `commit_policy`, `statement_timeout`, "
            "`deadline` and `reads_from`."
        )
