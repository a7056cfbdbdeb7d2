"""The frameworks: the same requests in each, bare, written by hand, and with ctxdb's adapter."""

from benchmarks.frameworks._framework import Framework
from benchmarks.frameworks.aiohttp import Aiohttp
from benchmarks.frameworks.litestar import Litestar
from benchmarks.frameworks.starlette import Starlette

FRAMEWORKS: tuple[Framework, ...] = (Starlette(), Litestar(), Aiohttp())

__all__ = ["FRAMEWORKS", "Framework"]
