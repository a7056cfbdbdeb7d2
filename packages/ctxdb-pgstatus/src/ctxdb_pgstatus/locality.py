"""`Locality`: which hosts are near, by data centres and regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ctxdb_pgstatus.status import HostStatus, nearest

__all__ = ["Locality"]


@dataclass(frozen=True, slots=True)
class Locality:
    """Where the hosts are, and where their readers are.

    Attributes:
        dcs: the data centre of each host, by the host's name.
        geos: the region of each host, by the host's name.
        current_dc: the data centre whose replicas are preferred; ``None`` for no preference.
        current_geo: the region whose replicas are preferred after those of `current_dc`; ``None`` for no preference.
    """

    dcs: Mapping[str, str | None] = field(default_factory=dict)
    geos: Mapping[str, str | None] = field(default_factory=dict)
    current_dc: str | None = None
    current_geo: str | None = None

    def distance(self, host: str) -> int:
        """Return 0 for a host in `current_dc`, 1 for another host in `current_geo`, and 2 for all others."""
        if self.current_dc is not None and self.dcs.get(host) == self.current_dc:
            return 0
        if self.current_geo is not None and self.geos.get(host) == self.current_geo:
            return 1
        return 2

    def nearest(self, hosts: Sequence[HostStatus]) -> Sequence[HostStatus]:
        """Return the hosts out of `hosts` that are nearest, in the order of `hosts`."""
        if self.current_dc is None and self.current_geo is None:
            return hosts
        return nearest(hosts, self.distance)
