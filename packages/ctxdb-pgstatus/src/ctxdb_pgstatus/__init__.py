"""Which PostgreSQL host is the master, which replicas are in sync, and `DBConnect`s that follow them."""

from __future__ import annotations

import importlib
import typing

if typing.TYPE_CHECKING:
    from ctxdb_pgstatus.addresses import HostAddress
    from ctxdb_pgstatus.client import PgStatusClient
    from ctxdb_pgstatus.discovery import (
        DiscoveredHost,
        FileDiscovery,
        HostDiscovery,
        PatroniDiscovery,
        SRVDiscovery,
    )
    from ctxdb_pgstatus.errors import (
        CommitUnconfirmedError,
        ConnectionLostError,
        HostListError,
        HostUnreachableError,
        MasterChangedError,
        MasterUncertainError,
        MiddlewareOrderError,
        NoMasterError,
        NoReplicaError,
        OptionError,
        PgStatusError,
        SidecarError,
        StaleReaderError,
    )
    from ctxdb_pgstatus.follow import FollowHandler, follow_master, follow_replica
    from ctxdb_pgstatus.locality import Locality
    from ctxdb_pgstatus.monitor import HostMonitor
    from ctxdb_pgstatus.read_your_writes import ReadYourWrites
    from ctxdb_pgstatus.reading import ReadRule
    from ctxdb_pgstatus.source import (
        HostSource,
        KnownMaster,
        KnowsPromotions,
        KnowsServers,
        ReadsByRule,
        RemembersMaster,
    )
    from ctxdb_pgstatus.status import ClusterStatus, Fault, HostStatus, Promotion, Role, SyncCondition

__all__ = [
    "ClusterStatus",
    "CommitUnconfirmedError",
    "ConnectionLostError",
    "DiscoveredHost",
    "Fault",
    "FileDiscovery",
    "FollowHandler",
    "HostAddress",
    "HostDiscovery",
    "HostListError",
    "HostMonitor",
    "HostSource",
    "HostStatus",
    "HostUnreachableError",
    "KnownMaster",
    "KnowsPromotions",
    "KnowsServers",
    "Locality",
    "MasterChangedError",
    "MasterUncertainError",
    "MiddlewareOrderError",
    "NoMasterError",
    "NoReplicaError",
    "OptionError",
    "PatroniDiscovery",
    "PgStatusClient",
    "PgStatusError",
    "Promotion",
    "ReadRule",
    "ReadYourWrites",
    "ReadsByRule",
    "RemembersMaster",
    "Role",
    "SRVDiscovery",
    "SidecarError",
    "StaleReaderError",
    "SyncCondition",
    "follow_master",
    "follow_replica",
]

if not typing.TYPE_CHECKING:
    # Each module is imported when one of its names is first used: the sidecar must start without SQLAlchemy and httpx
    # (see `ctxdb_pgstatus._lazy`).
    _NAMES_OF_MODULES: dict[str, tuple[str, ...]] = {
        "addresses": ("HostAddress",),
        "client": ("PgStatusClient",),
        "discovery": ("DiscoveredHost", "FileDiscovery", "HostDiscovery", "PatroniDiscovery", "SRVDiscovery"),
        "errors": (
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
        ),
        "follow": ("FollowHandler", "follow_master", "follow_replica"),
        "locality": ("Locality",),
        "monitor": ("HostMonitor",),
        "read_your_writes": ("ReadYourWrites",),
        "reading": ("ReadRule",),
        "source": (
            "HostSource",
            "KnownMaster",
            "KnowsPromotions",
            "KnowsServers",
            "ReadsByRule",
            "RemembersMaster",
        ),
        "status": ("ClusterStatus", "Fault", "HostStatus", "Promotion", "Role", "SyncCondition"),
    }
    _MODULES = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
