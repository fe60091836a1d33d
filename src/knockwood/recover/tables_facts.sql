-- name: table
select c.oid::int8, c.relkind::text, c.relispartition, c.relhasrules
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where n.nspname = %(schema)s and c.relname = %(table)s

-- name: columns
select pg_catalog.quote_ident(a.attname),
       pg_catalog.format_type(a.atttypid, a.atttypmod)
         || coalesce(' collate ' || case when a.attcollation <> t.typcollation
                                         then a.attcollation::regcollation::text end, ''),
       a.attgenerated <> ''
from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
where a.attrelid = %(oid)s and a.attnum > 0 and not a.attisdropped
order by a.attnum

-- name: key
select array_agg(pg_catalog.quote_ident(a.attname) order by k.place)
from pg_catalog.pg_index i
cross join lateral unnest(i.indkey::int2[]) with ordinality k(attnum, place)
join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
where i.indrelid = %(oid)s and i.indisunique and i.indimmediate and i.indisvalid
  and i.indpred is null and i.indexprs is null and k.place <= i.indnkeyatts
group by i.indexrelid, i.indisprimary
having bool_and(a.attnotnull)
order by i.indisprimary desc, count(*), i.indexrelid
limit 1

-- name: triggers
select pg_catalog.quote_ident(tgname), tgenabled::text from pg_catalog.pg_trigger
where tgrelid = %(oid)s and not tgisinternal and tgenabled <> 'D' order by tgname

-- name: referring
select distinct conrelid::regclass::text from pg_catalog.pg_constraint
where contype = 'f' and confrelid = %(oid)s and conrelid <> confrelid order by 1

-- name: referred
select distinct confrelid::regclass::text from pg_catalog.pg_constraint
where contype = 'f' and conrelid = %(oid)s and conrelid <> confrelid order by 1

-- name: cascading
select pg_catalog.quote_ident(conname) from pg_catalog.pg_constraint
where contype = 'f' and confrelid = %(oid)s and confupdtype in ('c', 'n', 'd')
  and not (select array_agg(pg_catalog.quote_ident(attname)) from pg_catalog.pg_attribute
           where attrelid = confrelid and attnum = any(confkey)) <@ %(key)s::text[]

-- name: foreign_keys_to
select pg_catalog.quote_ident(k.conname), k.conrelid::regclass::text, pg_catalog.pg_get_constraintdef(k.oid)
from pg_catalog.pg_constraint k
where k.contype = 'f' and k.confrelid = %(oid)s and k.conrelid <> k.confrelid and k.conparentid = 0
order by 2, 1

-- name: tree
select c.oid::int8, n.nspname, c.relname, c.relkind::text
from pg_catalog.pg_partition_tree(%(oid)s::oid) p
join pg_catalog.pg_class c on c.oid = p.relid join pg_catalog.pg_namespace n on n.oid = c.relnamespace
union
select c.oid::int8, n.nspname, c.relname, c.relkind::text
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = %(oid)s
order by 1

-- name: views
with recursive v(oid) as (
    select r.ev_class from pg_catalog.pg_depend d join pg_catalog.pg_rewrite r on r.oid = d.objid
    where d.classid = 'pg_catalog.pg_rewrite'::regclass and d.refclassid = 'pg_catalog.pg_class'::regclass
      and d.refobjid = any(%(oids)s::oid[]) and r.ev_class <> all(%(oids)s::oid[])
    union
    select r.ev_class from v join pg_catalog.pg_depend d on d.refobjid = v.oid
    join pg_catalog.pg_rewrite r on r.oid = d.objid
    where d.classid = 'pg_catalog.pg_rewrite'::regclass and d.refclassid = 'pg_catalog.pg_class'::regclass
      and r.ev_class <> v.oid
)
select n.nspname, c.relname, c.relkind::text from v join pg_catalog.pg_class c on c.oid = v.oid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace order by 1, 2

-- name: sequences
select distinct n.nspname, c.relname
from pg_catalog.pg_depend d
join pg_catalog.pg_class c on c.oid = d.objid and c.relkind = 'S'
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where d.classid = 'pg_catalog.pg_class'::regclass and d.refclassid = 'pg_catalog.pg_class'::regclass
  and d.refobjid = any(%(oids)s::oid[]) and d.deptype in ('a', 'i') order by 1, 2

-- name: publications
select pg_catalog.quote_ident(p.pubname) from pg_catalog.pg_publication_rel r
join pg_catalog.pg_publication p on p.oid = r.prpubid where r.prrelid = any(%(oids)s::oid[]) order by 1

-- name: names
select pg_catalog.format('%%I.%%I', %(schema)s::text, %(table)s::text),
       pg_catalog.to_regclass(pg_catalog.format('%%I.%%I', %(schema)s::text, %(table)s::text)) is not null
