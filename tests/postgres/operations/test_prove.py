"""A proof from end to end: restored, checked, compared, written down; and broken or not checked where it must."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pyrage
import pytest

from fix_clones import Protected, protected
from fix_copy import writers
from fix_server import ServerFactory
from knockwood.errors import TargetUnreachableError, WrongKeyError
from knockwood.integrity.check import Invariant
from knockwood.model import Lsn, Proof, Verdict
from knockwood.operations.prove import Options, prove
from knockwood.repository.targets import Latest, ToLsn

CHECKS = ("sequences", "foreign_keys", "invariants", "unique_keys")


@pytest.fixture
def shop(
    request: pytest.FixtureRequest, new_server: ServerFactory, shared_folder: Path
) -> Iterator[Protected]:
    server = new_server(18, segment_megabytes=1, wal_level=getattr(request, "param", "replica"))
    folder = shared_folder / f"prove-{abs(hash(request.node.nodeid)):x}"
    with protected(server, folder, partial_every=0.5) as made:
        made.execute("insert into t select generate_series(1, 1000)")
        made.backup()
        yield made


def proved(shop: Protected, dsn: str | None = "", **more: Any) -> Proof:
    options = Options(
        checks=CHECKS,
        invariants=(Invariant("no zero", "select a from t where a = 0"),),
        archive_timeout=timedelta(seconds=more.pop("wait", 30)),
        clones=shop.folder / "state",
        **more,
    )
    return prove(
        shop.repository, shop.server.dsn() if dsn == "" else dsn, cluster="shop <1>", options=options
    )


def verdicts(proof: Proof) -> dict[str, Verdict]:
    return {claim.name: claim.verdict for claim in proof.claims}


def stored(shop: Protected, proof: Proof, ending: str) -> str:
    return b"".join(shop.repository.storage.read(f"proofs/{proof.id}.{ending}")).decode()


@pytest.mark.parametrize("shop", ["replica", "logical"], indirect=True)
def test_a_proof_under_writers_holds(shop: Protected) -> None:
    def work(connection: psycopg.Connection[tuple[object, ...]], turn: int) -> None:
        connection.execute("insert into t values (%s)", [turn + 100_000])

    with writers(shop.server.dsn(), 4, work):
        proof = proved(shop)
    assert [claim for claim in proof.claims if claim.verdict is not Verdict.HELD] == []
    assert proof.missing_commits == 0
    assert proof.last_commit is not None
    assert proof.rpo_seconds is not None
    assert proof.rto_seconds > 0
    assert proof.valid_until - proof.taken_at == timedelta(days=7)
    told = json.loads(stored(shop, proof, "json"))
    assert told["verdict"] == "held"
    assert {"public.t"} <= {table["table"] for table in told["tables"]}
    assert "shop &lt;1&gt;" in stored(shop, proof, "html")
    suite = ElementTree.fromstring(stored(shop, proof, "xml"))
    assert suite.attrib["failures"] == "0"
    assert len(suite) == len(proof.claims)
    assert shop.registry.records() == []


def test_broken_data_break_the_proof(shop: Protected) -> None:
    shop.execute("insert into t values (0)")
    proof = proved(shop)
    assert [c for c in proof.claims if c.verdict is not Verdict.HELD and c.name != "check invariants"] == []
    assert verdicts(proof)["check invariants"] is Verdict.BROKEN
    assert verdicts(proof)["tables equal to the primary"] is Verdict.HELD
    suite = ElementTree.fromstring(stored(shop, proof, "xml"))
    assert suite.attrib["failures"] == "1"


def test_with_the_primary_down_the_comparison_is_not_checked(shop: Protected) -> None:
    shop.flush()
    proof = proved(shop, "host=/nowhere")
    found = verdicts(proof)
    assert found["the backup can be restored"] is Verdict.HELD
    assert found["restored to the last commit"] is Verdict.NOT_CHECKED
    assert found["tables equal to the primary"] is Verdict.NOT_CHECKED
    assert proof.verdict is Verdict.NOT_CHECKED
    assert proof.missing_commits is None


def test_commits_that_the_archive_lacks_are_counted(new_server: ServerFactory, shared_folder: Path) -> None:
    server = new_server(18, segment_megabytes=1)
    with protected(server, shared_folder / "prove-behind") as shop:
        shop.backup()
        shop.flush()
    for number in range(5):
        shop.insert(5000 + number)
    proof = proved(shop, wait=1, data_directory=server.data_directory)
    found = verdicts(proof)
    assert found["restored to the last commit"] is Verdict.BROKEN
    # The five, and the empty transaction that marks the position.
    assert proof.missing_commits == 6
    assert found["tables equal to the primary"] is Verdict.NOT_CHECKED


def test_a_backup_that_cannot_be_restored_is_a_broken_proof(shop: Protected) -> None:
    backup = shop.backup()
    folder = Path(shop.repository.storage.url.removeprefix("file://"))
    pack = folder / backup.packs[0].name
    pack.chmod(0o644)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    proof = proved(shop, backup=backup.id, target=Latest())
    found = verdicts(proof)
    assert found["the backup can be restored"] is Verdict.BROKEN
    assert found["backups and WAL verified"] is Verdict.BROKEN
    assert found["check sequences"] is Verdict.NOT_CHECKED
    assert shop.registry.records() == []
    assert found["restored to the last commit"] is Verdict.BROKEN
    assert proof.last_commit is None


def wal_segments(shop: Protected) -> list[Path]:
    folder = Path(shop.repository.storage.url.removeprefix("file://"))
    return sorted(path for path in (folder / "wal").glob("0*/*/*") if path.is_file())


def test_commits_behind_damaged_wal_are_counted_although_the_archive_lists_it(shop: Protected) -> None:
    shop.execute("create extension pg_walinspect")
    shop.insert(6000)
    shop.execute("select pg_switch_wal()")
    for number in range(3):
        shop.insert(7000 + number)
    shop.execute("select pg_switch_wal()")
    shop.insert(8000)
    shop.flush()
    victim = wal_segments(shop)[-1]
    victim.chmod(0o644)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    proof = proved(shop)
    found = verdicts(proof)
    assert found["restored to the last commit"] is Verdict.BROKEN
    assert found["backups and WAL verified"] is Verdict.BROKEN
    # The three and the one after them, which the archive holds for nothing, and the mark of the comparison.
    assert proof.missing_commits == 5


def test_backups_of_which_none_can_be_restored_are_a_broken_proof(shop: Protected) -> None:
    shop.flush()
    for path in wal_segments(shop):
        path.unlink()
    proof = proved(shop, wait=1)
    found = verdicts(proof)
    assert found["the backup can be restored"] is Verdict.BROKEN
    assert found["restored to the last commit"] is Verdict.BROKEN
    assert found["tables equal to the primary"] is Verdict.NOT_CHECKED
    assert found["check sequences"] is Verdict.NOT_CHECKED
    assert proof.last_commit is None
    assert json.loads(stored(shop, proof, "json"))["verdict"] == "broken"
    with pytest.raises(TargetUnreachableError):
        proved(shop, target=ToLsn(Lsn(1)), wait=1)


def test_without_a_backup_there_is_nothing_to_prove(new_server: ServerFactory, shared_folder: Path) -> None:
    with (
        protected(new_server(18, segment_megabytes=1), shared_folder / "prove-none") as shop,
        pytest.raises(TargetUnreachableError),
    ):
        proved(shop)


def test_an_encrypting_repository_is_proved_and_its_proof_hides_rows(
    new_server: ServerFactory, shared_folder: Path
) -> None:
    identity = pyrage.x25519.Identity.generate()
    server = new_server(18, segment_megabytes=1)
    keys = {"recipients": (str(identity.to_public()),), "identities": (str(identity),)}
    with protected(server, shared_folder / "prove-encrypted", 0.5, **keys) as shop:
        shop.execute("insert into t values (0)")
        shop.backup()
        shop.insert(5000)
        proof = proved(shop)
    found = verdicts(proof)
    assert [name for name, verdict in found.items() if verdict is not Verdict.HELD] == ["check invariants"]
    assert proof.missing_commits == 0
    name = shop.repository.find(f"proofs/{proof.id}.full.json")
    whole = json.loads(b"".join(shop.repository.read(str(name))))
    assert [finding["check"] for finding in whole["findings"]] == ["invariants"]
    assert "a=0" not in stored(shop, proof, "json")
    without = replace(shop.repository, identities=())
    with pytest.raises(WrongKeyError):
        proved(replace(shop, repository=without), "host=/nowhere")
