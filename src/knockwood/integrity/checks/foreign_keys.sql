-- Every enforced foreign key that somebody declared (not the copies PostgreSQL keeps for partitions).
-- Columns are quoted; operators and collations are those of the constraint's own checks.
select pg_catalog.quote_ident(k.conname),
       pg_catalog.format('%I.%I', rn.nspname, r.relname), r.relkind::text,
       pg_catalog.format('%I.%I', fn.nspname, f.relname), f.relkind::text,
       k.confmatchtype::text,
       k.convalidated,
       coalesce((pg_catalog.to_jsonb(k) ->> 'conperiod')::bool, false),
       x.referencing, x.referenced, x.operators, x.collations
from pg_catalog.pg_constraint k
join pg_catalog.pg_class r on r.oid = k.conrelid
join pg_catalog.pg_namespace rn on rn.oid = r.relnamespace
join pg_catalog.pg_class f on f.oid = k.confrelid
join pg_catalog.pg_namespace fn on fn.oid = f.relnamespace
join lateral (
    select pg_catalog.array_agg(pg_catalog.quote_ident(ra.attname) order by u.n) as referencing,
           pg_catalog.array_agg(pg_catalog.quote_ident(fa.attname) order by u.n) as referenced,
           pg_catalog.array_agg(pg_catalog.format('operator(%I.%s)', opn.nspname, op.oprname) order by u.n) as operators,
           pg_catalog.array_agg(
               case when c.oid is null then '' else pg_catalog.format(' collate %I.%I', cn.nspname, c.collname) end
               order by u.n) as collations
    from unnest(k.conkey, k.confkey, k.conpfeqop) with ordinality u (local, remote, operator, n)
    join pg_catalog.pg_attribute ra on ra.attrelid = k.conrelid and ra.attnum = u.local
    join pg_catalog.pg_attribute fa on fa.attrelid = k.confrelid and fa.attnum = u.remote
    join pg_catalog.pg_operator op on op.oid = u.operator
    join pg_catalog.pg_namespace opn on opn.oid = op.oprnamespace
    left join pg_catalog.pg_collation c on c.oid = fa.attcollation and fa.attcollation <> 0
    left join pg_catalog.pg_namespace cn on cn.oid = c.collnamespace) x on true
where k.contype = 'f'
  and k.conparentid = 0
  and coalesce((pg_catalog.to_jsonb(k) ->> 'conenforced')::bool, true)
  and r.relpersistence <> 't'
  and (not pg_catalog.pg_is_in_recovery() or (r.relpersistence = 'p' and f.relpersistence = 'p'))
order by 2, 1
