"""The one `DBConnect` of the service. A function that needs a session asks `await db_session(db)`."""

from __future__ import annotations

from ctxdb_core import DBConnect
from shop import settings

# Nothing is connected here: an engine is made at its first use, a connection taken at the first statement.
db = DBConnect.from_url(settings.DATABASE_URL, pool_size=settings.POOL_SIZE, max_overflow=0)
