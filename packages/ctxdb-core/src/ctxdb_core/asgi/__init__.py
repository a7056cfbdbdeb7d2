"""The unit of work of an ASGI request: a middleware for any ASGI application, which imports no framework."""

from ctxdb_core.asgi.boundary import ASGIStreamBoundary
from ctxdb_core.asgi.commit_errors import answer_commit_error, commit_error, has_unit_of_work
from ctxdb_core.asgi.middleware import ASGIHTTPDBSessionMiddleware
from ctxdb_core.asgi.request_settings import Deadline
from ctxdb_core.asgi.types import ASGIApp, Message, Receive, Scope, Send

__all__ = [
    "ASGIApp",
    "ASGIHTTPDBSessionMiddleware",
    "ASGIStreamBoundary",
    "Deadline",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "answer_commit_error",
    "commit_error",
    "has_unit_of_work",
]
