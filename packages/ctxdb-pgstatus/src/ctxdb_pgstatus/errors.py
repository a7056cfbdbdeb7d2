"""The errors of ctxdb-pgstatus. Each one says what happened and what to do about it.

CtxDBError
└── PgStatusError
    ├── HostListError        hosts were given that cannot be read (a ``ValueError``, too)
    ├── OptionError          an option has a value that it cannot have (a ``ValueError``, too)
    ├── NoMasterError        a session on the master was asked for while the cluster has none
    ├── NoReplicaError       a session for reading was asked for while no host of the cluster answers
    ├── MasterChangedError   a commit returned from a host that is not the master any more
    ├── MiddlewareOrderError `ReadYourWrites` was put inside of the unit of work
    ├── StaleReaderError     a reader's transaction cannot see what the same code has committed on the master
    └── SidecarError         the sidecar could not be asked, and no answer of before is recent enough
"""

from __future__ import annotations

from ctxdb_core import CtxDBError

__all__ = [
    "HostListError",
    "MasterChangedError",
    "MiddlewareOrderError",
    "NoMasterError",
    "NoReplicaError",
    "OptionError",
    "PgStatusError",
    "SidecarError",
    "StaleReaderError",
]


class PgStatusError(CtxDBError):
    """The base of every error that ctxdb-pgstatus raises on its own behalf."""


class HostListError(PgStatusError, ValueError):
    """Hosts were given that cannot be read.

    Raised when a monitor is made, before anything is connected to. The way out is in the message.
    """


class OptionError(PgStatusError, ValueError):
    """An option has a value that it cannot have.

    Raised when an object is made, or when the sidecar starts. The way out is in the message.
    """


class NoMasterError(PgStatusError):
    """A session on the master was asked for while the cluster has none.

    Raised at once, instead of letting the request wait for a connection that cannot be had. The way out: answer 503,
    and let the client try again; the next session after the election goes to the new master.
    """


class NoReplicaError(PgStatusError):
    """A session for reading was asked for while no host of the cluster answers, the master neither.

    Raised at once, as `NoMasterError` is.
    """


class MasterChangedError(PgStatusError):
    """A commit returned from a host that is not the master any more, or cannot be shown to be it.

    Raised from the commit, so that no success is answered: what was written is on a host that the cluster has left, and
    is likely to be lost there. The way out: answer an error; what is tried again goes to the master of then. Look first
    whether the write is there, as after any commit whose outcome is unknown.
    """


class MiddlewareOrderError(PgStatusError):
    """`ReadYourWrites` was put inside of the unit of work.

    Raised at each request: from there, no commit is seen before the response starts. The way out is in the message.
    """

    def __init__(self) -> None:
        super().__init__(
            "ReadYourWrites is inside of the unit of work, where nothing has been committed yet when a response "
            "starts. On Starlette and FastAPI, call `app.add_middleware` for it after the one for DBSessionMiddleware, "
            "as what is added later is further out; on Litestar, list its plugin after CtxDBPlugin."
        )


class StaleReaderError(PgStatusError):
    """A reader's transaction cannot see what the same code has committed on the master since it began.

    Raised by a statement on a replica that has not replayed that commit, where the transaction cannot go on elsewhere:
    it has savepoints, options of its own or a streamed result. The way out: end it first, by ``commit_db_session``.
    """


class SidecarError(PgStatusError):
    """The sidecar could not be asked, and no answer of before is recent enough.

    Raised by ``PgStatusClient``. The way out: start the sidecar, or correct its address.
    """
