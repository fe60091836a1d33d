-- kind, relation, object (both quoted), more: whatever PostgreSQL was told not to enforce.
select 'not_valid', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.quote_ident(k.conname),
       k.contype::text
from pg_catalog.pg_constraint k
join pg_catalog.pg_class c on c.oid = k.conrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where not k.convalidated
  and coalesce((pg_catalog.to_jsonb(k) ->> 'conenforced')::bool, true)
  and k.conparentid = 0
  and c.relpersistence <> 't'
union all
select 'not_valid', y.oid::pg_catalog.regtype::text, pg_catalog.quote_ident(k.conname), k.contype::text
from pg_catalog.pg_constraint k
join pg_catalog.pg_type y on y.oid = k.contypid
where k.conrelid = 0 and not k.convalidated
union all
select 'not_enforced', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.quote_ident(k.conname),
       k.contype::text
from pg_catalog.pg_constraint k
join pg_catalog.pg_class c on c.oid = k.conrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where not coalesce((pg_catalog.to_jsonb(k) ->> 'conenforced')::bool, true)
  and k.conparentid = 0
  and c.relpersistence <> 't'
union all
-- 'R' fires on replicas only: somebody's choice for a trigger of their own, a hole for a constraint's.
select case when tg.tgisinternal then 'constraint_trigger' else 'trigger' end,
       pg_catalog.format('%I.%I', n.nspname, c.relname),
       coalesce(pg_catalog.quote_ident(k.conname), pg_catalog.quote_ident(tg.tgname)),
       tg.tgname || ' is ' || case tg.tgenabled when 'D' then 'disabled' else 'enabled for replicas only' end
from pg_catalog.pg_trigger tg
join pg_catalog.pg_class c on c.oid = tg.tgrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
left join pg_catalog.pg_constraint k on k.oid = tg.tgconstraint
where (tg.tgenabled = 'D' or (tg.tgenabled = 'R' and tg.tgisinternal))
  and c.relpersistence <> 't'
union all
select 'rule', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.quote_ident(w.rulename), 'disabled'
from pg_catalog.pg_rewrite w
join pg_catalog.pg_class c on c.oid = w.ev_class
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where w.ev_enabled = 'D'
union all
select 'row_security', pg_catalog.format('%I.%I', n.nspname, c.relname), pg_catalog.count(*)::text, 'policies'
from pg_catalog.pg_policy p
join pg_catalog.pg_class c on c.oid = p.polrelid
join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where not c.relrowsecurity
group by n.nspname, c.relname
order by 2, 1, 3
