"""A live page for ctxdb: which request holds which connection, since when, and by which line of code."""

from ctxdb_inspector._access import Authorise
from ctxdb_inspector._aiohttp import setup
from ctxdb_inspector._asgi import Inspector, inspector
from ctxdb_inspector._unit_header import UnitHeader

__all__ = ["Authorise", "Inspector", "UnitHeader", "inspector", "setup"]
