-- A build in progress is in pg_stat_progress_create_index; a concurrent drop holds its lock on the index.
select pg_catalog.format('%I.%I', n.nspname, c.relname),
       pg_catalog.format('%I.%I', tn.nspname, t.relname),
       i.indisvalid, i.indisready, i.indislive, i.indisunique, c.relkind::text
from pg_catalog.pg_index i
join pg_catalog.pg_class c on c.oid = i.indexrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_class t on t.oid = i.indrelid
join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace
where not (i.indisvalid and i.indisready and i.indislive)
  and c.relpersistence <> 't'
  and not exists (
        select from pg_catalog.pg_stat_progress_create_index p
        where p.datname = pg_catalog.current_database() and p.relid = i.indrelid)
  and not exists (
        select from pg_catalog.pg_locks l
        where l.locktype = 'relation' and l.relation = i.indexrelid
          and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
          and l.mode in ('ShareUpdateExclusiveLock', 'AccessExclusiveLock'))
order by 1
