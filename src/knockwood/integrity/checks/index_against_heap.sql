-- Usable indexes of methods without a checker, on their first column: how to compare a key with itself.
select x.oid::int8 as index,
       t.oid::int8 as table_oid,
       a.amname,
       pg_catalog.format('%I.%I', n.nspname, t.relname),
       x.relname,
       pg_catalog.pg_get_indexdef(x.oid, 1, true),
       coalesce(pg_catalog.pg_get_expr(i.indpred, i.indrelid), 'true'),
       (select pg_catalog.format('operator(%I.%s)', sn.nspname, o.oprname)
        from pg_catalog.pg_amop p
        join pg_catalog.pg_operator o on o.oid = p.amopopr
        join pg_catalog.pg_namespace sn on sn.oid = o.oprnamespace
        where p.amopfamily = c.opcfamily
          and p.amopmethod = x.relam
          and p.amoppurpose = 's'
          and p.amoplefttype = p.amoprighttype
          and o.oprresult = 'bool'::pg_catalog.regtype
          and o.oprname in ('=', '~=', '@>')
          and (p.amoplefttype = c.opcintype or c.opcintype = 'anyarray'::pg_catalog.regtype)
        order by o.oprname = '=' desc, o.oprname = '~=' desc
        limit 1),
       coalesce((select option_value::int8 from pg_catalog.pg_options_to_table(x.reloptions)
                 where option_name = 'pages_per_range'), 128),
       c.opcname like '%minmax_ops',
       y.typcategory = 'A'
from pg_catalog.pg_index i
join pg_catalog.pg_class x on x.oid = i.indexrelid
join pg_catalog.pg_class t on t.oid = i.indrelid
join pg_catalog.pg_namespace n on n.oid = t.relnamespace
join pg_catalog.pg_am a on a.oid = x.relam
join pg_catalog.pg_opclass c on c.oid = i.indclass[0]
join pg_catalog.pg_attribute k on k.attrelid = x.oid and k.attnum = 1
join pg_catalog.pg_type y on y.oid = k.atttypid
where a.amname <> 'btree'
  and x.relkind = 'i'
  and t.relkind in ('r', 'm')
  and t.relpersistence <> 't'
  and i.indisvalid and i.indisready
order by x.oid
