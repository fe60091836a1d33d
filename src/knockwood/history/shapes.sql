-- relations:
select c.oid::bigint, n.nspname, c.relname, c.relkind::text, c.relpersistence::text,
       case when c.relisshared then 1664 else coalesce(nullif(c.reltablespace, 0), d.dattablespace) end::bigint,
       case when c.relisshared then 0 else d.oid end::bigint,
       pg_catalog.pg_relation_filenode(c.oid)::bigint
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_database d on d.datname = pg_catalog.current_database()
where c.relkind in ('r', 'm', 't', 'S')
  and (pg_catalog.pg_relation_filenode(c.oid)::bigint = any(%(files)s::bigint[])
       or c.oid::bigint = any(%(oids)s::bigint[]))

-- owners:
select distinct coalesce(i.indrelid, t.oid, c.oid)::bigint
from pg_catalog.pg_class c
left join pg_catalog.pg_index ti on ti.indexrelid = c.oid
left join pg_catalog.pg_class t on c.relkind in ('t', 'i') and t.reltoastrelid = coalesce(ti.indrelid, c.oid)
left join pg_catalog.pg_index i on i.indexrelid = c.oid and t.oid is null
where c.oid::bigint = any(%(oids)s::bigint[])

-- shapes:
select c.oid::bigint, n.nspname, c.relname, c.relkind::text, c.relpersistence::text,
       coalesce(nullif(c.reltablespace, 0), d.dattablespace)::bigint, d.oid::bigint,
       coalesce(pg_catalog.pg_relation_filenode(c.oid), 0)::bigint,
       root.oid::bigint, rootspace.nspname, root.relname,
       (select pg_catalog.json_agg(pg_catalog.json_build_array(
                   a.attname, a.attnum, pg_catalog.format_type(a.atttypid, a.atttypmod), a.atttypid::bigint,
                   a.attnotnull, a.attgenerated, a.attidentity) order by a.attnum)
        from pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
       (select pg_catalog.json_agg(a.attname order by u.position)
        from pg_catalog.unnest(key.indkey::int2[]) with ordinality u(number, position)
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = u.number
        where u.position <= key.indnkeyatts),
       key.source,
       pg_catalog.pg_table_size(c.oid)::bigint,
       coalesce((select pg_catalog.pg_relation_size(t.oid) > 0 from pg_catalog.pg_class t
                 where t.oid = c.reltoastrelid), false)
from pg_catalog.pg_class c
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_database d on d.datname = pg_catalog.current_database()
left join pg_catalog.pg_class root on c.relispartition and root.oid = pg_catalog.pg_partition_root(c.oid)
left join pg_catalog.pg_namespace rootspace on rootspace.oid = root.relnamespace
left join lateral (
    select i.indkey, i.indnkeyatts,
           case when i.indisprimary then 'primary key'
                when i.indisreplident then 'replica identity' else 'unique index' end as source
    from pg_catalog.pg_index i
    where i.indrelid = c.oid and i.indisunique and i.indisvalid and i.indimmediate
      and i.indpred is null and i.indexprs is null
      and not exists (
          select from pg_catalog.unnest(i.indkey::int2[]) with ordinality u(number, position)
          join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = u.number
          where u.position <= i.indnkeyatts and not a.attnotnull)
    order by i.indisprimary desc, i.indisreplident desc, i.indnkeyatts, i.indexrelid
    limit 1) key on true
where c.oid::bigint = any(%(oids)s::bigint[])

-- named:
with recursive found as (
    select c.oid from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where c.relkind in ('r', 'p') and c.relname = %(name)s
      and case when %(schema)s::text is null then n.nspname not in ('pg_catalog', 'information_schema')
               else n.nspname = %(schema)s end
    union
    select i.inhrelid from pg_catalog.pg_inherits i join found f on f.oid = i.inhparent)
select oid::bigint from found

-- unlogged:
select pg_catalog.format('%%I.%%I', n.nspname, c.relname)
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where c.relkind = 'r' and c.relpersistence = 'u'
order by 1
