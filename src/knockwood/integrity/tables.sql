-- oid, table (quoted), relation kind, persistence, access method, file node as of the snapshot,
-- may it be read, columns, key columns. Virtual generated columns hold nothing and are left out.
select c.oid::bigint,
       pg_catalog.format('%I.%I', n.nspname, c.relname),
       c.relkind::text,
       c.relpersistence::text,
       coalesce(am.amname, ''),
       c.relfilenode::bigint,
       pg_catalog.has_table_privilege(c.oid, 'select') and pg_catalog.has_schema_privilege(n.oid, 'usage'),
       coalesce((
           select pg_catalog.jsonb_agg(pg_catalog.jsonb_build_array(
                      pg_catalog.quote_ident(a.attname), a.atttypid::bigint, a.atttypmod,
                      coalesce(co.collisdeterministic, true)) order by a.attnum)
           from pg_catalog.pg_attribute a
           left join pg_catalog.pg_collation co on co.oid = a.attcollation
           where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> 'v'), '[]'),
       coalesce((
           select pg_catalog.array_agg(pg_catalog.quote_ident(a.attname) order by k.n)
           from pg_catalog.pg_index i
           cross join lateral pg_catalog.unnest(i.indkey::int2[]) with ordinality k (attnum, n)
           join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = k.attnum
           where i.indrelid = c.oid and i.indisprimary and k.n <= i.indnkeyatts), '{}')
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_am am on am.oid = c.relam
where c.relkind in ('r', 'm', 'f')
  and c.relpersistence <> 't'
  and (n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast')
       -- Few roles may read large objects, and few databases have any.
       or (c.oid in ('pg_catalog.pg_largeobject'::pg_catalog.regclass,
                     'pg_catalog.pg_largeobject_metadata'::pg_catalog.regclass)
           and (pg_catalog.has_table_privilege(c.oid, 'select') or pg_catalog.pg_relation_size(c.oid) > 0)))
order by 2
