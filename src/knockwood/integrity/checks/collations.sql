-- Only collations that a column, index, type or constraint uses: those of initdb that nobody uses cannot hurt.
select pg_catalog.format('%I.%I', n.nspname, c.collname),
       c.collversion,
       pg_catalog.pg_collation_actual_version(c.oid),
       u.dependents
from pg_catalog.pg_collation c
join pg_catalog.pg_namespace n on n.oid = c.collnamespace
join lateral (
    select pg_catalog.count(*) as dependents
    from pg_catalog.pg_depend d
    where d.refclassid = 'pg_catalog.pg_collation'::pg_catalog.regclass and d.refobjid = c.oid
      and d.deptype in ('n', 'a', 'i')) u on u.dependents > 0
where c.collversion is not null
  and c.collversion is distinct from pg_catalog.pg_collation_actual_version(c.oid)
order by 1
