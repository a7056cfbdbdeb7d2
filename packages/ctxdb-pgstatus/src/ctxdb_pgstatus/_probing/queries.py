"""What hosts are asked, in SQL."""

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

# Recovery may end while this runs, but does not begin again: whoever is told "not in recovery" stays so.
# The control data is behind a promotion, and so serves only where nothing else is known. `pg_stat_wal_receiver` shows
# its row to everybody, and what is in it to those with pg_read_all_stats.
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
"""The same where the functions about WAL are refused: Amazon Aurora's raise, and a database's owner may revoke them."""

IDENTITY = """
SELECT pg_postmaster_start_time() AS started_at, host(inet_server_addr()) AS address, inet_server_port() AS port
"""

SYSTEM = "SELECT system_identifier FROM pg_control_system()"
"""The cluster's identifier. PostgreSQL checks a function's privileges also in a branch that is not taken: so it is
asked by itself."""

CONTROL = """
SELECT
    greatest(checkpoint.timeline_id, recovery.min_recovery_end_timeline) AS timeline,
    has_function_privilege('pg_ls_waldir()', 'EXECUTE') AS may_list_files
FROM pg_control_checkpoint() AS checkpoint, pg_control_recovery() AS recovery
"""

FILES = """
SELECT max(('x' || left(name, 8))::bit(32)::int)
FROM pg_ls_waldir()
WHERE name ~ '^[0-9A-F]{8}[.]history$'
"""
"""The history of a timeline is there before anything else of it is received. Of segments, pg_rewind leaves some on a
host that has gone back to a timeline before; with a history of a later one, PostgreSQL itself would not follow that."""

IS_FENCED = """
SELECT setting = 'on' AND source NOT IN ('user', 'database user', 'database', 'client', 'session')
FROM pg_settings WHERE name = 'default_transaction_read_only'
"""
"""Whether all clients are kept from writing, and not the monitor's role or database alone."""

HAS_AURORA_LAG = "SELECT to_regproc('aurora_replica_status') IS NOT NULL"

AURORA_LAG = """
SELECT replica_lag_in_msec::float8 FROM aurora_replica_status() WHERE server_id = aurora_db_instance_identifier()
"""
"""Documented in Amazon's "Aurora PostgreSQL functions reference"."""

SLOTS = """
SELECT slot_name::text, active, confirmed_flush_lsn FROM pg_replication_slots WHERE slot_type = 'logical'
"""

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
"""What the worker reports to the publisher, it has applied: it answers a message only after the ones before it. A table
that is being copied is written by another worker."""

APPLIED = "SELECT external_id, remote_lsn FROM pg_replication_origin_status"
"""Up to where commits of a publisher were applied. It takes privileges of its own."""
