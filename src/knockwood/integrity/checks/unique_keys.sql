-- Every valid unique or exclusion index of a table with rows of its own, system catalogs and TOAST included:
-- index, table, unique?, nulls distinct?, predicate, key expressions, their collations, operator classes that
-- may disagree with the type's own equality, exclusion operators, shared catalog?
select pg_catalog.format('%I.%I', n.nspname, c.relname),
       pg_catalog.format('%I.%I', tn.nspname, t.relname),
       i.indisunique and k.conexclop is null,
       not coalesce((pg_catalog.to_jsonb(i) ->> 'indnullsnotdistinct')::bool, false),
       coalesce(pg_catalog.pg_get_expr(i.indpred, i.indrelid), 'true'),
       x.expressions,
       x.collations,
       x.special,
       (select pg_catalog.array_agg(pg_catalog.format('operator(%I.%s)', opn.nspname, op.oprname) order by u.n)
        from pg_catalog.unnest(k.conexclop) with ordinality u (operator, n)
        join pg_catalog.pg_operator op on op.oid = u.operator
        join pg_catalog.pg_namespace opn on opn.oid = op.oprnamespace),
       t.relisshared,
       t.reltuples::bigint
from pg_catalog.pg_index i
join pg_catalog.pg_class c on c.oid = i.indexrelid and c.relkind = 'i'
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
join pg_catalog.pg_class t on t.oid = i.indrelid
join pg_catalog.pg_namespace tn on tn.oid = t.relnamespace
left join pg_catalog.pg_constraint k on k.conindid = c.oid and k.conrelid = t.oid and k.conexclop is not null
join lateral (
    select pg_catalog.array_agg(pg_catalog.pg_get_indexdef(i.indexrelid, g.n, false) order by g.n) as expressions,
           pg_catalog.array_agg(
               case when co.oid is null then '' else pg_catalog.format(' collate %I.%I', cn.nspname, co.collname) end
               order by g.n) as collations,
           coalesce(pg_catalog.bool_or(not oc.opcdefault and oc.opcname not in
               ('text_pattern_ops', 'varchar_pattern_ops', 'bpchar_pattern_ops')), false) as special
    from pg_catalog.generate_series(1, i.indnkeyatts::int) g (n)
    join pg_catalog.pg_opclass oc on oc.oid = (i.indclass::oid[])[g.n - 1]
    left join pg_catalog.pg_collation co on co.oid = (i.indcollation::oid[])[g.n - 1]
    left join pg_catalog.pg_namespace cn on cn.oid = co.collnamespace) x on true
where (i.indisunique or i.indisexclusion)
  and i.indisvalid and i.indisready and i.indislive
  and c.relpersistence <> 't'
  and (not pg_catalog.pg_is_in_recovery() or c.relpersistence = 'p')
order by 2, 1
