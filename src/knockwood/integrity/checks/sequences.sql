-- Sequence, table, column (all quoted) and increment, for each integer column that a sequence feeds:
-- by its identity, by ownership, or by a default that is nothing but nextval().
-- Cycling sequences start over on purpose. A partition that shares its root's sequence is read with the root.
with feeds as (
    select d.objid as sequence, d.refobjid as relation, d.refobjsubid as number
    from pg_catalog.pg_depend d
    left join pg_catalog.pg_attrdef ad on ad.adrelid = d.refobjid and ad.adnum = d.refobjsubid
    where d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
      and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
      and d.deptype in ('a', 'i')
      and d.refobjsubid > 0
      and (ad.oid is null or pg_catalog.pg_get_expr(ad.adbin, ad.adrelid) ~ '^nextval\(''[^+*|]*''::regclass\)$')
    union
    select d.refobjid, ad.adrelid, ad.adnum
    from pg_catalog.pg_depend d
    join pg_catalog.pg_attrdef ad on ad.oid = d.objid
    where d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass
      and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
      and pg_catalog.pg_get_expr(ad.adbin, ad.adrelid) ~ '^nextval\(''.*''::regclass\)$'
)
select pg_catalog.format('%I.%I', sn.nspname, s.relname),
       pg_catalog.format('%I.%I', tn.nspname, t.relname),
       pg_catalog.quote_ident(a.attname),
       q.seqincrement
from feeds f
join pg_catalog.pg_class s on s.oid = f.sequence and s.relkind = 'S'
join pg_catalog.pg_sequence q on q.seqrelid = s.oid
join pg_catalog.pg_namespace sn on sn.oid = s.relnamespace
join pg_catalog.pg_class t on t.oid = f.relation and t.relkind in ('r', 'p')
join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace
join pg_catalog.pg_attribute a on a.attrelid = t.oid and a.attnum = f.number and not a.attisdropped
join pg_catalog.pg_type y on y.oid = a.atttypid
where not q.seqcycle
  and case y.typtype when 'd' then y.typbasetype else y.oid end in (20, 21, 23, 1700)
  and s.relpersistence <> 't'
  and t.relpersistence <> 't'
  and (not pg_catalog.pg_is_in_recovery() or (s.relpersistence = 'p' and t.relpersistence = 'p'))
  and not (t.relispartition and exists (
        select from feeds r
        where r.sequence = f.sequence and r.relation = pg_catalog.pg_partition_root(t.oid)))
order by 1, 2, 3
