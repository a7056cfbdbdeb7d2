"""The SQL queries that hosts are asked."""

from __future__ import annotations

__all__ = [
    "APPLIED",
    "AURORA_LAG",
    "CONTROL",
    "FILES",
    "HAS_AURORA_LAG",
    "IDENTITY",
    "IS_FENCED",
    "LIMITED",
    "SLOTS",
    "STATUS",
    "SUBSCRIPTIONS",
    "SYSTEM",
]

# The sub-query reads `pg_is_in_recovery()` once, and each CASE uses what it read. A promotion may end recovery while
# the query runs; the functions for a standby still work then. The reverse cannot happen: a primary does not go back
# into recovery while it runs. The timeline of a standby is what its WAL receiver receives. The control data (`CONTROL`)
# is updated at restartpoints, and so is behind after a promotion. `pg_stat_wal_receiver` has a row while a receiver
# runs, of which the columns are NULL for a role without the privileges of `pg_read_all_stats` (PostgreSQL, "The
# Cumulative Statistics System"). The first 8 digits of a WAL file's name are its timeline.
STATUS = """
SELECT
    host.in_recovery,
    CASE WHEN host.in_recovery THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END AS position,
    CASE WHEN host.in_recovery THEN pg_last_wal_receive_lsn() END AS received,
    CASE WHEN host.in_recovery THEN (SELECT received_tli FROM pg_stat_wal_receiver)
        ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END AS timeline,
    CASE WHEN host.in_recovery
        THEN extract(epoch FROM pg_last_xact_replay_timestamp())::float8 END AS replayed_commit_at,
    extract(epoch FROM clock_timestamp())::float8 AS clock,
    pg_postmaster_start_time() AS started_at,
    current_setting('default_transaction_read_only') = 'on' AS is_read_only,
    CASE WHEN host.in_recovery THEN 0 ELSE (SELECT count(*) FROM pg_stat_replication) END AS standbys
FROM (SELECT pg_is_in_recovery() AS in_recovery) AS host
"""

LIMITED = """
SELECT
    pg_is_in_recovery() AS in_recovery,
    NULL::pg_lsn AS position,
    NULL::pg_lsn AS received,
    NULL::int AS timeline,
    NULL::float8 AS replayed_commit_at,
    extract(epoch FROM clock_timestamp())::float8 AS clock,
    pg_postmaster_start_time() AS started_at,
    current_setting('default_transaction_read_only') = 'on' AS is_read_only,
    0::bigint AS standbys
"""
"""The columns of `STATUS` without the functions about WAL, for hosts that refuse these functions.

Amazon Aurora's functions raise an error, and the owner of a database may revoke the privilege to execute them.
"""

IDENTITY = """
SELECT pg_postmaster_start_time() AS started_at, host(inet_server_addr()) AS address, inet_server_port() AS port
"""
"""Which server answers (see `Server`)."""

SYSTEM = "SELECT system_identifier FROM pg_control_system()"
"""The system identifier of the cluster.

This is a query of its own: a role without the privilege to execute the function would be refused the whole of another
query, even if the function stood in a branch of CASE that is not taken.
"""

CONTROL = """
SELECT
    greatest(checkpoint.timeline_id, recovery.min_recovery_end_timeline) AS timeline,
    has_function_privilege('pg_ls_waldir()', 'EXECUTE') AS may_list_files
FROM pg_control_checkpoint() AS checkpoint, pg_control_recovery() AS recovery
"""
"""The timeline of a standby that receives nothing: that of its last restartpoint, or the one up to which it has to
replay before it is consistent."""

FILES = """
SELECT max(('x' || left(name, 8))::bit(32)::int)
FROM pg_ls_waldir()
WHERE name ~ '^[0-9A-F]{8}[.]history$'
"""
"""The highest timeline of which a standby has the history file.

A standby receives the history file of a timeline before any WAL of that timeline. WAL segments would not tell:
pg_rewind may leave segments of a later timeline on a host that has gone back to an earlier one. A history file does:
PostgreSQL itself would go on to the latest timeline that it finds a history of (`recovery_target_timeline`).
"""

IS_FENCED = """
SELECT setting = 'on' AND source NOT IN ('user', 'database user', 'database', 'client', 'session')
FROM pg_settings WHERE name = 'default_transaction_read_only'
"""
"""Whether `default_transaction_read_only` is on for all clients, and not only for the monitor's role or database."""

HAS_AURORA_LAG = "SELECT to_regproc('aurora_replica_status') IS NOT NULL"
"""Whether the host has Amazon Aurora's function that tells the lags of replicas."""

AURORA_LAG = """
SELECT replica_lag_in_msec::float8 FROM aurora_replica_status() WHERE server_id = aurora_db_instance_identifier()
"""
"""The lag of the replica that answers (Amazon, "Aurora PostgreSQL functions reference")."""

SLOTS = """
SELECT slot_name::text, active, confirmed_flush_lsn FROM pg_replication_slots WHERE slot_type = 'logical'
"""
"""The logical replication slots of a publisher (see `Slot`)."""

SUBSCRIPTIONS = """
SELECT 'pg_' || subscription.oid AS origin, subslotname::text AS slot_name,
    (SELECT max(latest_end_lsn) FROM pg_stat_subscription AS worker
        WHERE worker.subid = subscription.oid AND worker.relid IS NULL) AS reported,
    NOT EXISTS (SELECT FROM pg_subscription_rel AS copied
        WHERE copied.srsubid = subscription.oid AND copied.srsubstate <> 'r') AS has_all_tables
FROM pg_subscription AS subscription
JOIN pg_database AS database ON database.oid = subscription.subdbid
WHERE database.datname = current_database() AND subenabled AND subslotname IS NOT NULL
"""
"""The subscriptions of a subscriber (see `Subscription`), apart from what `APPLIED` tells of them.

The apply worker (the row without `relid`) handles the publisher's messages in their order, and has applied what it
reports. A table whose initial copy is under way is written by another worker: its state is not 'r', for ready
(PostgreSQL, "pg_subscription_rel").
"""

APPLIED = "SELECT external_id, remote_lsn FROM pg_replication_origin_status"
"""The end of the last commit that was applied, by replication origin: that of a subscription is called ``pg_`` and its
oid. Only superusers may read this view, unless they have granted others the privilege."""
