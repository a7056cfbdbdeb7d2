"""A real PostgreSQL cluster for the tests of an application that follows one."""

__all__: list[str] = []
