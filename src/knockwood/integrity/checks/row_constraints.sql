-- kind, table (quoted), relkind, name (quoted), expression, base type: what every row must fulfil.
-- Row by row is how a check binds; partitions and children carry their own copy, so each table stands alone.
select 'check', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.quote_ident(k.conname),
       pg_catalog.pg_get_expr(k.conbin, k.conrelid), ''
from pg_catalog.pg_constraint k
join pg_catalog.pg_class c on c.oid = k.conrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where k.contype = 'c' and k.convalidated and c.relkind = 'r' and c.relpersistence <> 't'
  and coalesce((pg_catalog.to_jsonb(k) ->> 'conenforced')::bool, true)
  and (c.relpersistence = 'p' or not pg_catalog.pg_is_in_recovery())
union all
select 'not_null', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.quote_ident(a.attname), '', ''
from pg_catalog.pg_attribute a
join pg_catalog.pg_class c on c.oid = a.attrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_constraint k
       on k.conrelid = c.oid and k.contype = 'n' and k.conkey = array[a.attnum]
where a.attnotnull and a.attnum > 0 and not a.attisdropped and c.relkind = 'r' and c.relpersistence <> 't'
  and coalesce(k.convalidated, true)
  and (c.relpersistence = 'p' or not pg_catalog.pg_is_in_recovery())
union all
select 'domain', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.quote_ident(a.attname),
       pg_catalog.format('%I.%I', yn.nspname, y.typname),
       pg_catalog.format_type(y.typbasetype, y.typtypmod)
from pg_catalog.pg_attribute a
join pg_catalog.pg_class c on c.oid = a.attrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_type y on y.oid = a.atttypid and y.typtype = 'd'
join pg_catalog.pg_namespace yn on yn.oid = y.typnamespace
where a.attnum > 0 and not a.attisdropped and c.relkind = 'r' and c.relpersistence <> 't'
  and yn.nspname <> 'information_schema'
  and not exists (select from pg_catalog.pg_constraint k where k.contypid = y.oid and not k.convalidated)
  and (c.relpersistence = 'p' or not pg_catalog.pg_is_in_recovery())
order by 2, 1, 3
