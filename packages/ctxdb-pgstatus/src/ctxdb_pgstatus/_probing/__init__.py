"""How a `HostMonitor` asks its hosts, and what it makes of their answers.

A `Watch` decides when its host is asked, and from when on the host counts as dead. Its `Probe` asks over a `Link`, one
connection, which returns an `Answer`. A `Member` is a host with its watch and its lag; the `Judge` compares the answers
of replicas with those of the master, and `Membership` knows the cluster and its timelines.
"""
