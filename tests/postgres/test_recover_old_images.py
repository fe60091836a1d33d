"""From `lost_writes` to a repair, where the page on disk agrees with the WAL because an old one was changed again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fix_repair import Site, flipped, site_of
from knockwood.model import Finding, Lsn, Verdict
from knockwood.model.recovery import Outcome
from knockwood.operations import recover, recoveries
from knockwood.operations.check import check
from knockwood.operations.freshness import bring_up_to_date
from knockwood.operations.page_repair import plan_pages
from knockwood.operations.protect import take
from knockwood.operations.proving import prove_cluster
from knockwood.operations.restore import restore
from knockwood.operations.restore_table import restore_table
from knockwood.recover.table_definition import TableName
from knockwood.repository.backups.listing import list_backups
from knockwood.repository.targets import Latest, RestorePlan, ToLsn, resolve

if TYPE_CHECKING:
    from fix_server import ServerFactory

ACCOUNT = (
    "create table account (id int primary key, name text, owner int references other);"
    "insert into account select i, 'n' || i, i from generate_series(1, 100) i;"
    "alter table account set (autovacuum_enabled = off)"
)
SLOWLY = "set enable_indexscan = off; set enable_bitmapscan = off; set enable_indexonlyscan = off;"
ALL = f"{SLOWLY} select string_agg(a::text, ',' order by id) from account a"


def findings(site: Site) -> tuple[Finding, ...]:
    report = check(site.cluster, ["lost_writes"])
    assert not report.not_checked, report.not_checked
    return report.findings


def lose_changes(site: Site, table: str = "account", *, freeze: bool = False) -> tuple[str, bytes]:
    """An update, a deletion and an insertion are lost on their way to the disk (with `freeze` also that VACUUM has
    frozen all, so that readers of the true page have nothing to log); the true rows, and the old page."""
    account = site.path(table)
    site.sql(f"select count(*) from {table}")
    site.settle()
    old = site.page(account, 0)
    site.sql(
        f"checkpoint; update {table} set name = 'changed' where id = 7; delete from {table} where id = 8;"
        f"insert into {table} values (201, 'inserted', 9), (202, 'another', 10)"
    )
    if freeze:
        site.sql(f"vacuum (freeze) {table}")
    expected = site.sql(ALL.replace("account", table))
    site.settle()
    assert site.page(account, 0) != old
    site.damage(account, 0, old)
    return str(expected), old


@pytest.mark.parametrize(("version", "compression"), [(15, "lz4"), (18, "off")])
def test_rows_are_brought_over_and_the_alarm_ends(
    new_server: ServerFactory, version: int, compression: str
) -> None:
    server = new_server(version, wal_keep_size="500MB", wal_compression=compression)
    with site_of(server) as site:
        site.sql(ACCOUNT)
        take(site.cluster, site.repository)
        expected, _ = lose_changes(site)
        site.sql("insert into account values (301, 'since', 11); checkpoint")
        # A younger backup has the old page too; nothing good comes from it.
        take(site.cluster, site.repository)
        site.sql("insert into account values (302, 'since', 11); checkpoint")
        [finding] = findings(site)
        assert finding.evidence["kind"] == "stale"
        assert "image" in finding.evidence
        proposal = recover.propose(site.cluster, names=["lost_writes"])
        assert [step.kind for step in proposal.plan.steps] == ["replace-rows"], proposal.plan.as_json()
        done = recover.execute(site.cluster, proposal.plan, approve=proposal.plan.id)
        assert done.recovery.verdict is Verdict.HELD, done.recovery.as_json()
        assert {claim.name for claim in done.recovery.claims} >= {"check lost_writes"}
        assert site.sql(ALL) == f"{expected},(301,since,11),(302,since,11)"
        # The old page is in the younger backup and in the WAL; so are the rows that were brought over.
        assert not done.recovery.results[0].values["new_full_backup_needed"]
        proof = prove_cluster(site.cluster, backup=None, target=Latest())
        assert proof.verdict is Verdict.HELD, proof.as_json()
        site.sql("update account set owner = 12 where id = 301; checkpoint")
        assert findings(site) == ()
        # Asked again with the same finding there is nothing left to do.
        again = recover.propose(site.cluster, findings=[finding])
        done = recover.execute(site.cluster, again.plan, approve=again.plan.id)
        assert done.recovery.results[0].outcome is Outcome.ALREADY_DONE


def test_a_page_that_was_only_read_is_replaced_and_the_alarm_ends(new_server: ServerFactory) -> None:
    server = new_server(18, wal_keep_size="500MB")
    with site_of(server) as site:
        site.sql(ACCOUNT)
        take(site.cluster, site.repository)
        account = site.path("account")
        # Of the old page no row was read yet: whoever reads it logs an image for hint bits.
        site.sql("update account set owner = 5 where id between 20 and 30")
        site.settle()
        old = site.page(account, 0)
        # Of the true page a reader has nothing to log: only the repair does.
        site.sql("update account set name = 'changed' where id = 7")
        site.sql("vacuum (freeze) account")
        expected = site.sql(ALL)
        site.settle()
        site.damage(account, 0, old)
        assert "changed" not in site.sql(ALL)
        site.settle()
        [finding] = findings(site)
        assert "image" in finding.evidence
        proposal = recover.propose(site.cluster, names=["lost_writes"])
        assert proposal.plan.steps[0].kind == "repair-pages", proposal.plan.as_json()
        done = recover.execute(site.cluster, proposal.plan, approve=proposal.plan.id)
        assert done.recovery.verdict is Verdict.HELD, done.recovery.as_json()
        assert site.sql(ALL) == expected
        # The WAL has the old page, whole, and after it the mended one: a backup from before leads there.
        assert not done.recovery.results[0].values["new_full_backup_needed"]
        proof = prove_cluster(site.cluster, backup=None, target=Latest())
        assert proof.verdict is Verdict.HELD, proof.as_json()
        site.settle()
        assert findings(site) == ()


def test_backups_that_have_the_old_page_lead_to_the_mended_one(new_server: ServerFactory) -> None:
    """Both a full backup of the old page, and an incremental one that is taken once it is mended."""
    server = new_server(18, wal_keep_size="500MB", summarize_wal="on")
    with site_of(server) as site:
        site.sql(ACCOUNT)
        take(site.cluster, site.repository)
        expected, _ = lose_changes(site, freeze=True)
        take(site.cluster, site.repository)
        before = ToLsn(Lsn.parse(site.sql("select pg_current_wal_lsn()")))
        proposal = recover.propose(site.cluster, names=["lost_writes"])
        assert proposal.plan.steps[0].kind == "repair-pages", proposal.plan.refused
        done = recover.execute(site.cluster, proposal.plan, approve=proposal.plan.id)
        assert done.recovery.verdict is Verdict.HELD, done.recovery.as_json()
        assert not done.recovery.results[0].values["new_full_backup_needed"]
        assert site.sql(ALL) == expected
        old = list_backups(site.repository)[-1]
        younger = take(site.cluster, site.repository, incremental=True)
        for backup in (old, younger):
            proof = prove_cluster(site.cluster, backup=backup.id, target=Latest())
            assert proof.verdict is Verdict.HELD, proof.as_json()
        # Between the damage and the repair the page is the old one: who goes back there is told.
        there = restore(site.repository, before, site.folder / "there")
        assert "mended pages of postgres.public.account only later" in " ".join(there.warnings)
        wish = recover.Wish(in_place=True, target=before, target_text=str(before.lsn))
        lost = recover.propose(site.cluster, wish=wish).plan.expected_loss.detail
        assert "mended pages of postgres.public.account only later" in lost
        after = resolve(site.repository, Latest())
        assert recoveries.aware(site.repository, after).warnings == after.warnings
        other = TableName("postgres", "public", "other")
        elsewhere = restore_table(site.repository, before, other, file=site.folder / "other.sql")
        assert elsewhere.plan.warnings == ()


def latest(site: Site, table: TableName) -> RestorePlan:
    site.sql("select pg_switch_wal()")
    bring_up_to_date(site.cluster, site.repository)
    return recoveries.aware(site.repository, resolve(site.repository, Latest()), table)


def test_a_page_without_a_row_to_lock_asks_for_a_backup(new_server: ServerFactory) -> None:
    server = new_server(18)
    with site_of(server) as site:
        toast = site.path(site.toast())
        site.damage(toast, 2, flipped(site.page(toast, 2)))
        plan = site.plan((toast, 2))
        recovery = site.execute(plan)
        assert recovery.verdict is Verdict.HELD, recovery.as_json()
        assert recovery.results[0].values["not_in_wal"] == [2]
        assert recovery.results[0].values["new_full_backup_needed"]
        recoveries.keep(site.repository, "one", plan, recovery)
        table = TableName("postgres", "public", "orders")
        [told] = latest(site, table).warnings
        assert "recovery one mended pages of postgres.pg_toast.pg_toast_" in told
        assert "the WAL does not hold them: here they may be as they were before (blocks 2)" in told
        take(site.cluster, site.repository)
        assert latest(site, table).warnings == ()
        site.repository.put(f"{recoveries.FOLDER}two.json", [b"[]"])
        assert "recovery two cannot be read" in latest(site, table).warnings[0]


def test_a_page_that_is_changed_after_it_was_planned_is_planned_anew(new_server: ServerFactory) -> None:
    server = new_server(18, wal_keep_size="500MB")
    with site_of(server) as site:
        site.sql(ACCOUNT)
        site.sql("create table quiet as select i from generate_series(1, 100) i")
        take(site.cluster, site.repository)
        quiet = site.path("quiet")
        site.damage(quiet, 0, flipped(site.page(quiet, 0)))
        expected, _ = lose_changes(site)
        found = check(site.cluster, ["lost_writes", "page_checksums"]).findings
        assert {finding.location.relation for finding in found} == {"public.account", "public.quiet"}
        proposal = recover.propose(site.cluster, findings=found)
        assert [step.kind for step in proposal.plan.steps][:2] == ["repair-pages"] * 2
        site.sql("insert into account values (301, 'since', 11); checkpoint")
        done = recover.carry_out(site.cluster, proposal)
        [outrun] = done.earlier
        assert {each.outcome for each in outrun.recovery.results} == {Outcome.DONE, Outcome.REFUSED}
        assert "replace-rows" in [result.kind for result in done.recovery.results]
        assert done.verdict is Verdict.HELD, (done.left, done.recovery.as_json())
        assert site.sql(ALL) == f"{expected},(301,since,11)"
        assert site.sql("select count(*) from quiet") == 100
        assert check(site.cluster, ["lost_writes", "page_checksums"]).findings == ()


def test_without_a_backup_from_before_it_is_refused_with_the_reason(new_server: ServerFactory) -> None:
    """One from after the damage would show a page that agrees with all WAL since: it is not called sound."""
    server = new_server(18, wal_keep_size="500MB")
    with site_of(server) as site:
        site.sql(ACCOUNT)
        lose_changes(site)
        between = take(site.cluster, site.repository)
        site.sql("insert into account values (301, 'since', 11); checkpoint")
        [finding] = findings(site)
        later = take(site.cluster, site.repository)
        plan = plan_pages(site.cluster, site.repository, [finding], backup=later.id)
        assert (plan.steps, plan.heals) == ((), ())
        assert "every base backup is younger" in " ".join(plan.refused), plan.refused
        plan = plan_pages(site.cluster, site.repository, [finding], backup=between.id)
        assert (len(plan.steps), plan.heals) == (1, (finding,))


def test_a_table_without_a_primary_key_is_refused_and_said_by_hand(new_server: ServerFactory) -> None:
    server = new_server(18, wal_keep_size="500MB")
    with site_of(server) as site:
        site.sql(ACCOUNT.replace(" primary key", ""))
        take(site.cluster, site.repository)
        lose_changes(site)
        site.sql("insert into account values (301, 'since', 11); checkpoint")
        [finding] = findings(site)
        plan = recover.propose(site.cluster, findings=[finding]).plan
        assert not plan.steps
        assert "primary key" in " ".join(plan.refused), plan.refused
        site.sql(str(finding.evidence["once_mended"]))
        assert findings(site) == ()
