-- What a revert asks about the tables it touches. A parameter is a list of oids, unless said otherwise.

-- name: roots
select n.nspname, c.relname, r.oid::bigint, r.relkind::text, r.relpersistence::text, rn.nspname, r.relname,
       pg_catalog.format('%%I.%%I', rn.nspname, r.relname)
from unnest(%s::text[], %s::text[]) w (schema, name)
join pg_catalog.pg_namespace n on n.nspname = w.schema
join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.name
join pg_catalog.pg_class r on r.oid = coalesce(pg_catalog.pg_partition_root(c.oid), c.oid)
join pg_catalog.pg_namespace rn on rn.oid = r.relnamespace

-- name: columns
select a.attrelid::bigint, a.attname, pg_catalog.quote_ident(a.attname), a.attgenerated <> '', a.attnotnull,
       pg_catalog.format_type(a.atttypid, a.atttypmod),
       case when t.typarray <> 0 then pg_catalog.format_type(t.typarray, a.atttypmod) end,
       t.typdelim::text,
       case when a.attcollation = 0 then ''
            else pg_catalog.format(' collate %%I.%%I', cn.nspname, co.collname) end,
       a.atttypid::bigint
from pg_catalog.pg_attribute a
join pg_catalog.pg_type t on t.oid = a.atttypid
left join pg_catalog.pg_collation co on co.oid = a.attcollation
left join pg_catalog.pg_namespace cn on cn.oid = co.collnamespace
where a.attrelid = any(%s) and a.attnum > 0 and not a.attisdropped
order by a.attrelid, a.attnum

-- The primary key, else the replica identity's index. Only B-trees have a strategy 3; a key WITHOUT OVERLAPS
-- (GiST) compares with the plain =.
-- name: keys
select distinct on (i.indrelid) i.indrelid::bigint,
       x.names, x.operators
from pg_catalog.pg_index i
join lateral (
    select pg_catalog.array_agg(a.attname::text order by k.n) as names,
           pg_catalog.array_agg(
               coalesce((select pg_catalog.format('operator(%%I.%%s)', opn.nspname, op.oprname)
                         from pg_catalog.pg_opclass oc
                         join pg_catalog.pg_am am on am.oid = oc.opcmethod and am.amname = 'btree'
                         join pg_catalog.pg_amop ao on ao.amopfamily = oc.opcfamily
                              and ao.amoplefttype = oc.opcintype and ao.amoprighttype = oc.opcintype
                              and ao.amopstrategy = 3
                         join pg_catalog.pg_operator op on op.oid = ao.amopopr
                         join pg_catalog.pg_namespace opn on opn.oid = op.oprnamespace
                         where oc.oid = k.class), 'operator(pg_catalog.=)') order by k.n) as operators
    from unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality k (attnum, class, n)
    join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where k.n <= i.indnkeyatts) x on true
where i.indrelid = any(%s) and (i.indisprimary or i.indisreplident) and i.indisvalid
order by i.indrelid, not i.indisprimary

-- What acts on a write beside the server's own constraints: triggers of the user's on rows or statements
-- (TRUNCATE's alone are none), and rules. Those of any partition count.
-- name: writers
with recursive tree (root, oid) as (
    select o, o from unnest(%s::oid[]) o
    union all select tree.root, h.inhrelid from tree
    join pg_catalog.pg_inherits h on h.inhparent = tree.oid
    join pg_catalog.pg_class c on c.oid = h.inhrelid and c.relispartition)
select distinct tree.root::bigint, 'trigger ' || t.tgname, t.tgenabled::text
from tree join pg_catalog.pg_trigger t on t.tgrelid = tree.oid
where not t.tgisinternal and t.tgenabled <> 'D' and t.tgtype & 28 <> 0
union
select distinct tree.root::bigint, 'rule ' || r.rulename, r.ev_enabled::text
from tree join pg_catalog.pg_rewrite r on r.ev_class = tree.oid
where r.ev_type in ('2', '3', '4') and r.ev_enabled <> 'D'
union
-- Not seen from the root, so nobody but its own triggers would check it.
select distinct tree.root::bigint, 'foreign key ' || k.conname || ' of a partition', 'R'
from tree join pg_catalog.pg_constraint k
    on k.contype = 'f' and k.conparentid = 0 and (k.conrelid = tree.oid or k.confrelid = tree.oid)
where tree.oid <> tree.root
order by 1, 2

-- Every enforced foreign key from or to the tables. One declared on a partition alone is told by its own name.
-- name: foreign
select k.conname, rn.nspname, r.relname, fn.nspname, f.relname,
       x.referencing, x.referenced, x.operators, k.confupdtype::text, k.confdeltype::text,
       k.condeferrable, k.confmatchtype = 'f',
       coalesce((pg_catalog.to_jsonb(k) ->> 'conperiod')::bool, false),
       r.relkind = 'p', f.relkind = 'p'
from (select %s::oid[] as oids) o
cross join pg_catalog.pg_constraint k
join pg_catalog.pg_class r on r.oid = k.conrelid
join pg_catalog.pg_namespace rn on rn.oid = r.relnamespace
join pg_catalog.pg_class f on f.oid = k.confrelid
join pg_catalog.pg_namespace fn on fn.oid = f.relnamespace
join lateral (
    select pg_catalog.array_agg(ra.attname::text order by u.n) as referencing,
           pg_catalog.array_agg(fa.attname::text order by u.n) as referenced,
           pg_catalog.array_agg(pg_catalog.format('operator(%%I.%%s)', opn.nspname, op.oprname) order by u.n) as operators
    from unnest(k.conkey, k.confkey, k.conpfeqop) with ordinality u (local, remote, operator, n)
    join pg_catalog.pg_attribute ra on ra.attrelid = k.conrelid and ra.attnum = u.local
    join pg_catalog.pg_attribute fa on fa.attrelid = k.confrelid and fa.attnum = u.remote
    join pg_catalog.pg_operator op on op.oid = u.operator
    join pg_catalog.pg_namespace opn on opn.oid = op.oprnamespace) x on true
where k.contype = 'f' and k.conparentid = 0
  and coalesce((pg_catalog.to_jsonb(k) ->> 'conenforced')::bool, true)
  and (k.conrelid = any(o.oids) or k.confrelid = any(o.oids))
order by 2, 3, 1

-- Unique indexes and exclusion constraints. Plain: over columns alone, for all rows, compared by =.
-- name: unique
select i.indrelid::bigint, c.relname, x.names, x.operators, i.indimmediate, i.indnullsnotdistinct,
       i.indisunique and am.amname = 'btree' and i.indpred is null and i.indexprs is null
from pg_catalog.pg_index i
join pg_catalog.pg_class c on c.oid = i.indexrelid
join pg_catalog.pg_am am on am.oid = c.relam
left join lateral (
    select pg_catalog.array_agg(a.attname::text order by k.n) as names,
           pg_catalog.array_agg(
               (select pg_catalog.format('operator(%%I.%%s)', opn.nspname, op.oprname)
                from pg_catalog.pg_opclass oc
                join pg_catalog.pg_amop ao on ao.amopfamily = oc.opcfamily
                     and ao.amoplefttype = oc.opcintype and ao.amoprighttype = oc.opcintype
                     and ao.amopstrategy = 3
                join pg_catalog.pg_operator op on op.oid = ao.amopopr
                join pg_catalog.pg_namespace opn on opn.oid = op.oprnamespace
                where oc.oid = k.class) order by k.n) as operators
    from unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality k (attnum, class, n)
    join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
    where k.n <= i.indnkeyatts) x on true
where i.indrelid = any(%s) and (i.indisunique or i.indisexclusion) and i.indisready
order by 1, 2
