"""How a `HostMonitor` asks its hosts, and what it makes of their answers.

A `Watch` decides when its host is asked, and from when on the host counts as dead. Its `Probe` asks over a `Link`, one
connection, which returns an `Answer`. A `Member` is a host with its watch and its lag. The `Cluster` has the members:
it elects the master, with the help of `Membership`, which knows the cluster and its timelines, and has the `Judge`
compare replicas with the master. `Changes` tells of a new status.
"""
