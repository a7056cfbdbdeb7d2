"""ctxdb for Litestar: the request's SQLAlchemy transaction, ended before its response leaves."""

__all__: list[str] = []
