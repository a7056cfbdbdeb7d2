"""Which PostgreSQL host is the master, which replicas are in sync, and `DBConnect`s that follow them."""

from ctxdb_pgstatus.addresses import HostAddress
from ctxdb_pgstatus.client import PgStatusClient
from ctxdb_pgstatus.errors import (
    CommitUnconfirmedError,
    ConnectionLostError,
    HostListError,
    HostUnreachableError,
    MasterChangedError,
    MiddlewareOrderError,
    NoMasterError,
    NoReplicaError,
    OptionError,
    PgStatusError,
    SidecarError,
    StaleReaderError,
)
from ctxdb_pgstatus.follow import FollowHandler, follow_master, follow_replica
from ctxdb_pgstatus.monitor import HostMonitor
from ctxdb_pgstatus.read_your_writes import ReadYourWrites
from ctxdb_pgstatus.source import HostSource, KnownMaster, RemembersMaster
from ctxdb_pgstatus.status import ClusterStatus, HostStatus, Role, SyncCondition

__all__ = [
    "ClusterStatus",
    "CommitUnconfirmedError",
    "ConnectionLostError",
    "FollowHandler",
    "HostAddress",
    "HostListError",
    "HostMonitor",
    "HostSource",
    "HostStatus",
    "HostUnreachableError",
    "KnownMaster",
    "MasterChangedError",
    "MiddlewareOrderError",
    "NoMasterError",
    "NoReplicaError",
    "OptionError",
    "PgStatusClient",
    "PgStatusError",
    "ReadYourWrites",
    "RemembersMaster",
    "Role",
    "SidecarError",
    "StaleReaderError",
    "SyncCondition",
    "follow_master",
    "follow_replica",
]
