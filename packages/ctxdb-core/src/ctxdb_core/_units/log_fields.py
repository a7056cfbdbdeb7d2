"""`UnitFields`: the unit of work that the running code is in, as fields of log records."""

from __future__ import annotations

import logging

from ctxdb_core._units.unit import running_unit

__all__ = ["UnitFields"]


class UnitFields(logging.Filter):
    """Gives log records the fields ``ctxdb_unit`` and ``ctxdb_request``; lets every record pass.

    ``ctxdb_unit`` is the id of the unit of work that the running code is in, ``ctxdb_request`` the method and path of
    its request; ``None`` outside of any. A record that has the fields already keeps them.

    Records of the logger ``ctxdb`` have them anyway. Added to a handler (``handler.addFilter(UnitFields())``), it gives
    them to all records of that handler, the application's own among them.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields."""
        if not hasattr(record, "ctxdb_unit"):
            unit = running_unit()
            record.ctxdb_unit = None if unit is None else unit.id
            record.ctxdb_request = None if unit is None else unit.request
        return True


# At import: users look for ctxdb's own warnings by the unit of work that these happened in.
logging.getLogger("ctxdb").addFilter(UnitFields())
