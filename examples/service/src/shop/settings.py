"""The settings, which differ from one environment to the next."""

from __future__ import annotations

import os

DATABASE_URL = os.environ.get("DATABASE_URL", "postgresql+asyncpg://shop@127.0.0.1/shop")
POOL_SIZE = int(os.environ.get("POOL_SIZE", "10"))
SECRET = os.environ.get("SECRET", "for development only: set SECRET to 32 random bytes")
PAYMENTS_URL = os.environ.get("PAYMENTS_URL", "http://127.0.0.1:9000")
