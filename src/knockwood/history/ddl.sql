select label, definition from (
    select case c.relkind when 'r' then 'table' when 'p' then 'partitioned table' when 'i' then 'index'
                when 'I' then 'partitioned index' when 'S' then 'sequence' when 'v' then 'view'
                when 'm' then 'materialized view' when 'c' then 'type' when 'f' then 'foreign table'
                else 'relation' end || ' ' || pg_catalog.format('%I.%I', n.nspname, c.relname) as label,
           case when c.relkind in ('i', 'I') then pg_catalog.pg_get_indexdef(c.oid)
                when c.relkind in ('v', 'm') then pg_catalog.pg_get_viewdef(c.oid)
                else '' end
           || pg_catalog.concat_ws(', ', '',
               'owner ' || pg_catalog.pg_get_userbyid(c.relowner),
               'persistence ' || c.relpersistence::text,
               'privileges ' || c.relacl::text,
               'options ' || c.reloptions::text,
               'access method ' || (select amname from pg_catalog.pg_am where oid = c.relam),
               'tablespace ' || (select spcname from pg_catalog.pg_tablespace where oid = c.reltablespace),
               'row security ' || nullif(c.relrowsecurity, false)::text,
               'forced row security ' || nullif(c.relforcerowsecurity, false)::text,
               'replica identity ' || nullif(c.relreplident::text, 'd'),
               'partition ' || pg_catalog.pg_get_expr(c.relpartbound, c.oid),
               'partitioned by ' || pg_catalog.pg_get_partkeydef(c.oid)) as definition,
           c.relnamespace as space
    from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where c.relkind <> 't'
    union all
    select 'column ' || pg_catalog.format('%I.%I.%I', n.nspname, c.relname, a.attname),
           pg_catalog.format_type(a.atttypid, a.atttypmod) || pg_catalog.concat_ws(', ', '',
               'not null ' || nullif(a.attnotnull, false)::text,
               'default ' || pg_catalog.pg_get_expr(d.adbin, d.adrelid),
               'identity ' || nullif(a.attidentity::text, ''),
               'generated ' || nullif(a.attgenerated::text, ''),
               'collation ' || case when a.attcollation not in (0, y.typcollation) then a.attcollation::text end,
               'privileges ' || a.attacl::text,
               -- The server's own ones (pg_attver: when it was rewritten) are nobody's definition.
               'options ' || (select pg_catalog.array_agg(o order by o)::text
                              from pg_catalog.unnest(a.attoptions) o where not pg_catalog.starts_with(o, 'pg_')),
               'storage ' || nullif(a.attstorage, y.typstorage)::text),
           c.relnamespace
    from pg_catalog.pg_attribute a
    join pg_catalog.pg_class c on c.oid = a.attrelid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    join pg_catalog.pg_type y on y.oid = a.atttypid
    left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where a.attnum > 0 and not a.attisdropped and c.relkind in ('r', 'p', 'f', 'c')
    union all
    select 'constraint ' || pg_catalog.quote_ident(k.conname) || ' of '
           || coalesce(nullif(k.conrelid, 0)::pg_catalog.regclass::text, k.contypid::pg_catalog.regtype::text),
           pg_catalog.pg_get_constraintdef(k.oid) || case when k.convalidated then '' else ' (not validated)' end,
           k.connamespace
    from pg_catalog.pg_constraint k
    union all
    select 'trigger ' || pg_catalog.quote_ident(t.tgname) || ' of ' || t.tgrelid::pg_catalog.regclass::text,
           pg_catalog.pg_get_triggerdef(t.oid) || ', enabled ' || t.tgenabled::text, c.relnamespace
    from pg_catalog.pg_trigger t join pg_catalog.pg_class c on c.oid = t.tgrelid
    where not t.tgisinternal
    union all
    select 'rule ' || pg_catalog.quote_ident(r.rulename) || ' of ' || r.ev_class::pg_catalog.regclass::text,
           pg_catalog.pg_get_ruledef(r.oid), c.relnamespace
    from pg_catalog.pg_rewrite r join pg_catalog.pg_class c on c.oid = r.ev_class
    where r.rulename <> '_RETURN'
    union all
    select 'policy ' || pg_catalog.quote_ident(p.polname) || ' of ' || p.polrelid::pg_catalog.regclass::text,
           p.polcmd::text || ' ' || p.polpermissive::text || ' ' || p.polroles::text || ' '
           || coalesce(pg_catalog.pg_get_expr(p.polqual, p.polrelid), '') || ' '
           || coalesce(pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid), ''), c.relnamespace
    from pg_catalog.pg_policy p join pg_catalog.pg_class c on c.oid = p.polrelid
    union all
    select 'function ' || p.oid::pg_catalog.regprocedure::text,
           pg_catalog.md5(pg_catalog.to_jsonb(p)::text), p.pronamespace
    from pg_catalog.pg_proc p
    union all
    select 'type ' || pg_catalog.format('%I.%I', n.nspname, y.typname),
           y.typtype::text || coalesce(' labels ' || (
               select pg_catalog.string_agg(pg_catalog.quote_literal(e.enumlabel), ', ' order by e.enumsortorder)
               from pg_catalog.pg_enum e where e.enumtypid = y.oid), '')
           || coalesce(' over ' || nullif(y.typbasetype, 0)::pg_catalog.regtype::text, '')
           || coalesce(' default ' || y.typdefault, ''), y.typnamespace
    from pg_catalog.pg_type y join pg_catalog.pg_namespace n on n.oid = y.typnamespace
    where y.typtype in ('e', 'd', 'r', 'b') and y.typelem = 0
    union all
    select 'sequence settings of ' || q.seqrelid::pg_catalog.regclass::text,
           pg_catalog.concat_ws(' ', q.seqtypid::pg_catalog.regtype, q.seqstart, q.seqincrement, q.seqmax,
                                q.seqmin, q.seqcache, q.seqcycle), c.relnamespace
    from pg_catalog.pg_sequence q join pg_catalog.pg_class c on c.oid = q.seqrelid
    union all
    select 'inheritance of ' || i.inhrelid::pg_catalog.regclass::text,
           'from ' || i.inhparent::pg_catalog.regclass::text, c.relnamespace
    from pg_catalog.pg_inherits i join pg_catalog.pg_class c on c.oid = i.inhrelid
    union all
    select 'schema ' || pg_catalog.quote_ident(n.nspname),
           'owner ' || pg_catalog.pg_get_userbyid(n.nspowner) || coalesce(', privileges ' || n.nspacl::text, ''),
           n.oid
    from pg_catalog.pg_namespace n
    union all
    select 'extension ' || pg_catalog.quote_ident(e.extname), e.extversion, e.extnamespace
    from pg_catalog.pg_extension e
) object
where space not in (
    select n.oid from pg_catalog.pg_namespace n
    where n.nspname in ('pg_catalog', 'information_schema') or n.nspname ~ '^pg_(toast|temp)')
