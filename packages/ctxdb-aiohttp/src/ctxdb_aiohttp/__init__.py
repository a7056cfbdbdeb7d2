"""ctxdb for aiohttp.web: the request's SQLAlchemy transaction, ended before its response leaves."""

__all__: list[str] = []
