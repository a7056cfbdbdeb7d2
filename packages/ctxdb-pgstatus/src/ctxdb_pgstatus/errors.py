"""The errors of ctxdb-pgstatus. Each one says what happened and what to do about it.

CtxDBError
└── PgStatusError
    ├── HostListError            hosts were given that cannot be read (a ``ValueError``, too)
    ├── OptionError              an option has a value that it cannot have (a ``ValueError``, too)
    ├── NoMasterError            a session on the master was asked for while the cluster has none
    ├── NoReplicaError           a session for reading was asked for while no host of the cluster will do
    ├── HostUnreachableError     a host that counts as alive did not accept a connection
    ├── ConnectionLostError      a connection to a host broke before its transaction was committed
    ├── MasterChangedError       a commit returned from a host that is not the master any more
    ├── MasterUncertainError     whether a name still leads to the server of the master could not be found out
    ├── CommitUnconfirmedError   the outcome of a commit, or whether its host is the master, is unknown
    │                            (a ``CommitOutcomeUnknownError`` of ctxdb-core, too)
    ├── MiddlewareOrderError     `ReadYourWrites` was put inside of the unit of work
    ├── StaleReaderError         a reader's transaction cannot see what the same code has committed on the master
    └── SidecarError             the sidecar could not be asked, and no earlier answer is recent enough
"""

from __future__ import annotations

from ctxdb_core import CommitOutcomeUnknownError, CtxDBError

__all__ = [
    "CommitUnconfirmedError",
    "ConnectionLostError",
    "HostListError",
    "HostUnreachableError",
    "MasterChangedError",
    "MasterUncertainError",
    "MiddlewareOrderError",
    "NoMasterError",
    "NoReplicaError",
    "OptionError",
    "PgStatusError",
    "SidecarError",
    "StaleReaderError",
]


class PgStatusError(CtxDBError):
    """The base of every error that ctxdb-pgstatus raises on its own behalf.

    Attributes:
        retryable: whether the same work may be done again, by a new unit of work: nothing of the transaction that
            failed is committed, and a later try may find another host. ``False`` if the work may have been committed,
            or if a later try would fail as well.
    """

    retryable: bool = False


class HostListError(PgStatusError, ValueError):
    """Hosts were given that cannot be read.

    Raised when a monitor is made, before it connects to any host. The way out is in the message.
    """


class OptionError(PgStatusError, ValueError):
    """An option has a value that it cannot have.

    Raised when an object is made, or when the sidecar starts. The way out is in the message.
    """


class NoMasterError(PgStatusError):
    """A session on the master was asked for while the cluster has none.

    Raised at once: a request that waited for a connection would wait in vain. The way out: answer 503, and let the
    client try again; the next session after the election goes to the new master.
    """

    retryable = True


class NoReplicaError(PgStatusError):
    """A session for reading was asked for while no host of the cluster will do: no replica, and not the master either.

    Raised at once, as `NoMasterError` is: if no host answers; if no host has what the code has written before; or if no
    replica will do, and the ``fallback`` to the master is switched off. The way out: answer 503, and let the client try
    again.
    """

    retryable = True


class HostUnreachableError(PgStatusError):
    """A host that counts as alive did not accept a connection.

    Raised where a session needs a connection that cannot be opened. Sessions go to a host that has failed until it
    counts as dead. The driver's error, or the operating system's, is the ``__cause__``. The way out: if the error is
    `retryable`, answer 503 and let the client try again; if not, correct the user, the password or the database's name.

    Attributes:
        host: the host, as the cluster's source calls it.
        retryable: ``False`` if the host has refused the account (SQLSTATE classes 28 and 3D): the next try will fail as
            well. psycopg does not tell the SQLSTATE of a refused connection, so with psycopg this is always ``True``.
    """

    def __init__(self, message: str, host: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.host = host
        self.retryable = retryable


class ConnectionLostError(PgStatusError):
    """A connection to a host broke, or its host was demoted, before its transaction was committed.

    Raised by the statement that was under way, or is the first one after that. Nothing of the transaction is stored: a
    server rolls back a transaction that has lost its client. The driver's error is the ``__cause__``. The way out: do
    the work again in a new unit of work, or answer 503 and let the client do it.

    Attributes:
        host: the host, as the cluster's source calls it.
    """

    retryable = True

    def __init__(self, message: str, host: str) -> None:
        super().__init__(message)
        self.host = host


class MasterChangedError(PgStatusError):
    """A commit returned from a host that is not the master any more.

    Raised from the commit, so that no success is answered: the write is on a host that the cluster has left, and is
    likely to be lost. The way out: answer an error. Look whether the write is there before it is done again, as after
    any commit whose outcome is unknown; a new session goes to the new master.
    """


class MasterUncertainError(PgStatusError):
    """Whether a name still leads to the server of the master could not be found out.

    Raised by ``confirm_master`` if only a new connection could tell, and none can be opened. A standby that has left
    the master may have been promoted, and the name may lead to that standby now. A commit that waits for the answer
    raises `CommitUnconfirmedError`.
    """


class CommitUnconfirmedError(PgStatusError, CommitOutcomeUnknownError):
    """The outcome of a commit, or whether its host is the master, is unknown.

    Raised from the commit in two cases: the connection broke while COMMIT was under way; or COMMIT has returned, and
    neither the `HostSource` nor the host itself could say in time whether the host is the master. The commit need not
    have failed: the write may be there, and is likely to be in the second case. The original error is the
    ``__cause__``. The way out: look whether the write is there before it is done again, or make writes repeatable.

    Attributes:
        host: the host that COMMIT was sent to.
    """

    def __init__(self, message: str, host: str) -> None:
        super().__init__(message, (host,))
        self.host = host


class MiddlewareOrderError(PgStatusError):
    """`ReadYourWrites` was put inside of the unit of work.

    Raised at each request: inside of the unit of work, the middleware would see no commit before the response starts.
    The way out is in the message.
    """

    def __init__(self) -> None:
        super().__init__(
            "ReadYourWrites is inside of the unit of work, where nothing has been committed yet when a response "
            "starts. On Starlette and FastAPI, call `app.add_middleware` for it after the one for DBSessionMiddleware, "
            "as what is added later is further out; on Litestar, list its plugin after CtxDBPlugin."
        )


class StaleReaderError(PgStatusError):
    """A reader's transaction cannot see what the same code has committed on the master since it began.

    Raised by a statement on a replica that has not replayed that commit, if the reader's transaction cannot go on on
    another host, as it has savepoints, options of its own or a streamed result. The way out: end the transaction before
    the statement, by ``commit_db_session``.
    """

    retryable = True


class SidecarError(PgStatusError):
    """The sidecar could not be asked, and no earlier answer is recent enough.

    Raised by ``PgStatusClient``. The way out: start the sidecar, or correct its address.
    """

    retryable = True
