"""The rows of the configuration audit: what is asked, how bad it is, why, and what mends it.

A setting's row also looks at ALTER ROLE/DATABASE ... SET: a dangerous value may hide there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from knockwood.model import Severity

CRITICAL, HIGH, MEDIUM = Severity.CRITICAL, Severity.HIGH, Severity.MEDIUM


@dataclass(frozen=True, slots=True)
class SettingRule:
    """`setting` must not be one of `bad`."""

    setting: str
    bad: tuple[str, ...]
    severity: Severity
    why: str
    remedy: str


@dataclass(frozen=True, slots=True)
class QueryRule:
    """`query` gives one text per thing that is wrong; `each` runs it in every database."""

    name: str
    query: bytes
    severity: Severity
    why: str
    remedy: str
    each: bool = False


SETTINGS: Final = (
    SettingRule(
        "fsync", ("off",), CRITICAL, "a crash of the machine can destroy the whole cluster", "fsync = on"
    ),
    SettingRule(
        "full_page_writes",
        ("off",),
        CRITICAL,
        "a crash leaves torn pages that WAL cannot mend",
        "full_page_writes = on",
    ),
    SettingRule(
        "zero_damaged_pages",
        ("on",),
        CRITICAL,
        "a damaged page is silently emptied: its rows are gone without an error",
        "RESET zero_damaged_pages",
    ),
    SettingRule(
        "ignore_checksum_failure",
        ("on",),
        CRITICAL,
        "damaged pages are read as if they were good, and the damage spreads",
        "RESET ignore_checksum_failure",
    ),
    SettingRule(
        "wal_level",
        ("minimal",),
        CRITICAL,
        "the WAL does not hold enough to restore a backup",
        "wal_level = replica",
    ),
    SettingRule(
        "ignore_system_indexes",
        ("on",),
        CRITICAL,
        "catalog indexes are not used: a sign that they are damaged",
        "REINDEX SYSTEM, then RESET ignore_system_indexes",
    ),
    SettingRule(
        "allow_system_table_mods",
        ("on",),
        CRITICAL,
        "the catalogs can be changed by hand, past every check",
        "RESET allow_system_table_mods",
    ),
    SettingRule(
        "data_checksums",
        ("off",),
        HIGH,
        "damage by disks and memory is noticed only when somebody misses a row",
        "stop the server, then pg_checksums --enable",
    ),
    SettingRule(
        "data_sync_retry",
        ("on",),
        HIGH,
        "a failed fsync is tried again although the kernel may have dropped the data",
        "data_sync_retry = off",
    ),
    SettingRule(
        "autovacuum",
        ("off",),
        HIGH,
        "tables bloat, and transaction numbers run out until the server stops taking writes",
        "autovacuum = on",
    ),
    SettingRule(
        "track_counts", ("off",), HIGH, "autovacuum does not know what to vacuum", "track_counts = on"
    ),
)

QUERIES: Final = (
    QueryRule(
        "no_archiving",
        b"""select 'archive_mode is off and nothing receives WAL'
            where pg_catalog.current_setting('archive_mode') = 'off'
              and not pg_catalog.pg_is_in_recovery()
              and not exists (select from pg_catalog.pg_replication_slots where slot_type = 'physical')
              and not exists (select from pg_catalog.pg_stat_replication)""",
        CRITICAL,
        "nothing committed after the newest backup can be restored",
        "start `knockwood wal receive`, or archive_mode = on with 'knockwood wal push %p'",
    ),
    QueryRule(
        "replication_role",
        b"""select 'session_replication_role = ' || reset_val from pg_catalog.pg_settings
            where name = 'session_replication_role' and source = 'configuration file'
              and reset_val <> 'origin'""",
        CRITICAL,
        "no ordinary trigger fires in any session: foreign keys are not checked",
        "remove session_replication_role from the configuration file",
    ),
    QueryRule(
        "checksum_failures",
        b"""select coalesce(datname, 'shared catalogs') || ': ' || checksum_failures || ', last at '
                   || checksum_last_failure
            from pg_catalog.pg_stat_database where checksum_failures > 0""",
        HIGH,
        "the server met damaged pages while it served queries",
        "knockwood check page_checksums lists every damaged page",
    ),
    QueryRule(
        "unbounded_slots",
        b"""select slot_name from pg_catalog.pg_replication_slots
            where not active and wal_status is distinct from 'lost'
              and pg_catalog.current_setting('max_slot_wal_keep_size') = '-1'""",
        HIGH,
        "its consumer is away and the WAL kept for it grows until the disk is full",
        "start the consumer, drop the slot, or set max_slot_wal_keep_size",
    ),
    QueryRule(
        "old_prepared_transactions",
        b"""select gid || ' of ' || owner || ' since ' || prepared from pg_catalog.pg_prepared_xacts
            where prepared < pg_catalog.now() - interval '1 hour'""",
        HIGH,
        "it keeps its locks and keeps VACUUM from removing dead rows, also after a restart",
        "COMMIT PREPARED or ROLLBACK PREPARED",
    ),
    QueryRule(
        "idle_in_transaction",
        b"""select 'pid ' || pid || ' of ' || coalesce(usename, '?') || ' since ' || state_change
            from pg_catalog.pg_stat_activity
            where state like 'idle in transaction%'
              and state_change < pg_catalog.now() - interval '1 hour'""",
        HIGH,
        "VACUUM cannot remove dead rows, and locks are kept",
        "end the session, and set idle_in_transaction_session_timeout",
    ),
    QueryRule(
        "corrupting_release",
        b"""select 'PostgreSQL ' || pg_catalog.current_setting('server_version')
            where pg_catalog.current_setting('server_version_num')::int between 140000 and 140003""",
        HIGH,
        "CREATE INDEX CONCURRENTLY and REINDEX CONCURRENTLY leave rows out of the index",
        "install the newest minor release, then REINDEX",
    ),
    QueryRule(
        "leftover_recovery_target",
        b"""select name || ' = ' || setting from pg_catalog.pg_settings
            where name in ('recovery_target', 'recovery_target_lsn', 'recovery_target_name',
                           'recovery_target_time', 'recovery_target_xid')
              and setting <> ''""",
        HIGH,
        "the next recovery stops there and loses everything after",
        "remove it from postgresql.auto.conf",
    ),
    QueryRule(
        "delayed_standby",
        b"""select 'recovery_min_apply_delay = ' || setting || ' ms' from pg_catalog.pg_settings
            where name = 'recovery_min_apply_delay' and setting <> '0' and pg_catalog.pg_is_in_recovery()""",
        HIGH,
        "if it takes over, it serves the past until the delay is replayed",
        "never fail over to it; RESET recovery_min_apply_delay otherwise",
    ),
    QueryRule(
        "no_wal_kept_for_a_promotion",
        b"""select 'wal_keep_size is 0, and WAL is streamed to standby ' || application_name
            from pg_catalog.pg_stat_replication
            where pg_catalog.current_setting('wal_keep_size') in ('0', '0MB')
              and pg_catalog.current_setting('archive_mode') = 'off'
              and replay_lsn is not null -- who only receives reports none
            order by application_name""",
        MEDIUM,
        "a standby has no slot of the receiver: right after its promotion it may remove WAL that the archive"
        " lacks, and nothing after it can be restored until there is a new base backup",
        "wal_keep_size = '1GB' on every server that may be promoted",
    ),
    QueryRule(
        "published_without_identity",
        b"""select distinct pg_catalog.format('%I.%I', n.nspname, c.relname)
            from pg_catalog.pg_publication p
            cross join lateral pg_catalog.pg_get_publication_tables(p.pubname) t
            join pg_catalog.pg_class c on c.oid = t.relid
            join pg_catalog.pg_namespace n on n.oid = c.relnamespace
            where (p.pubupdate or p.pubdelete)
              and (c.relreplident = 'n' or (c.relreplident = 'd' and not exists (
                    select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary)))""",
        HIGH,
        "updates and deletes of a published table fail, or never reach the subscribers",
        "ALTER TABLE ... REPLICA IDENTITY, or add a primary key",
        each=True,
    ),
)

ROLE_SETTINGS: Final = b"""
select coalesce(r.rolname, ''), coalesce(d.datname, ''), pg_catalog.split_part(c.setting, '=', 1),
       pg_catalog.substr(c.setting, pg_catalog.strpos(c.setting, '=') + 1)
from pg_catalog.pg_db_role_setting s
left join pg_catalog.pg_roles r on r.oid = s.setrole
left join pg_catalog.pg_database d on d.oid = s.setdatabase
cross join lateral pg_catalog.unnest(s.setconfig) c (setting)
order by 1, 2, 3
"""
