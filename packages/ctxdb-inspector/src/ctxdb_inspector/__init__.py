"""A live page for ctxdb: which request holds which connection, since when, and by which line of code."""

from ctxdb_inspector._access import Authorise
from ctxdb_inspector._aiohttp import setup
from ctxdb_inspector._asgi import Inspector, inspector

__all__ = ["Authorise", "Inspector", "inspector", "setup"]
