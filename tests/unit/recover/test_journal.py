"""The journal: durable, torn only at its end, and refusing what is damaged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knockwood.errors import HostError, LockHeldError, NoSpaceError, RefusedError
from knockwood.model.recovery import Plan, Step
from knockwood.recover.journal import Journal, StepJournal, cluster_lock, folders, new_folder

PLAN = Plan("shop", "mend", (Step("mend", "mend it", {"blocks": [1, 2]}),))


def begun(folder: Path) -> Journal:
    journal = Journal.create(folder, PLAN)
    journal.append("begun")
    journal.append("started", step=0)
    return journal


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    journal = begun(new_folder(tmp_path, PLAN))
    step = StepJournal(journal, 0)
    step.note("lock", {"mode": "EXCLUSIVE"})
    step.note("lock", None)
    path = step.evidence("page", b"damaged")
    journal.close()

    read = Journal.open(folders(tmp_path)[0])
    again = StepJournal(read, 0)
    assert read.plan == PLAN
    assert [event["event"] for event in read.events] == ["begun", "started", "note", "note", "evidence"]
    assert again.notes == {"lock": None}
    assert again.kept("page") == path
    assert again.read_evidence("page") == b"damaged"
    assert again.evidence_paths == (str(path),)
    with pytest.raises(HostError, match="not open for writing"):
        again.note("lock", 1)
    with pytest.raises(HostError, match="no evidence"):
        again.read_evidence("other")


def test_evidence_is_never_overwritten(tmp_path: Path) -> None:
    step = StepJournal(begun(tmp_path / "a"), 0)
    path = step.evidence("page", b"damaged")
    assert step.evidence("page", b"mended") == path
    assert path.read_bytes() == b"damaged"
    assert StepJournal(Journal.open(tmp_path / "a"), 1).kept("page") is None, "each step has its own"
    path.chmod(0o600)
    path.write_bytes(b"changed")
    with pytest.raises(HostError, match="not what was written"):
        step.read_evidence("page")
    for name in ("a/b", "../a", "a\0b"):
        with pytest.raises(RefusedError, match="not a name"):
            step.evidence(name, b"")


def test_many_pieces_of_evidence_are_one_line_of_the_journal(tmp_path: Path) -> None:
    journal = begun(tmp_path / "a")
    step = StepJournal(journal, 0)
    step.evidence("page-1", b"first")
    before = len(journal.events)
    step.evidence_of_many({f"page-{number}": b"%d" % number for number in range(40)})
    step.evidence_of_many({"page-3": b"later"})
    assert len(journal.events) == before + 1
    again = StepJournal(Journal.open(tmp_path / "a"), 0)
    assert again.read_evidence("page-1") == b"first", "what was kept first stays"
    assert [again.read_evidence(f"page-{number}") for number in (0, 3, 39)] == [b"0", b"3", b"39"]
    assert len(again.evidence_paths) == 40


def test_evidence_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    """One event for each piece, as it was written before."""
    journal = begun(tmp_path / "a")
    path = journal.evidence_folder / "000-page"
    path.write_bytes(b"damaged")
    sha256 = hashlib.sha256(b"damaged").hexdigest()
    journal.append("evidence", step=0, name="page", file=path.name, sha256=sha256)
    step = StepJournal(Journal.open(tmp_path / "a"), 0)
    assert step.kept("page") == path
    assert step.read_evidence("page") == b"damaged"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(cut=st.integers(1, 2000), garbage=st.binary(max_size=40))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int, garbage: bytes) -> None:
    """Any prefix of the file, followed by anything without a line's end, reads as the lines that are whole."""
    folder = tmp_path / "a"
    if not folder.exists():
        journal = begun(folder)
        for number in range(5):
            journal.append("note", step=0, name="n", value=number)
        journal.close()
        (folder / "whole").write_bytes((folder / "journal.jsonl").read_bytes())
    whole = (folder / "whole").read_bytes()
    torn = whole[: cut % (len(whole) + 1)] + garbage.replace(b"\n", b"")
    (folder / "journal.jsonl").write_bytes(torn)
    lines = torn.count(b"\n")
    journal = Journal.open(folder, write=True)
    assert len(journal.events) == lines
    journal.append("resumed")
    journal.close()
    assert [event["event"] for event in Journal.open(folder).events][lines:] == ["resumed"]


def test_a_damaged_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    begun(tmp_path).close()
    path = tmp_path / "journal.jsonl"
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)
    with pytest.raises(HostError, match="line 1 of the journal is damaged"):
        Journal.open(tmp_path)


def test_another_plan_than_the_approved_one_is_not_read(tmp_path: Path) -> None:
    begun(tmp_path).close()
    path = tmp_path / "plan.json"
    value = json.loads(path.read_text())
    value["steps"][0]["arguments"]["blocks"] = [3]
    path.write_text(json.dumps(value))
    with pytest.raises(HostError, match="not the one that was approved"):
        Journal.open(tmp_path)


def test_a_plan_that_changes_when_it_is_written_down_is_refused(tmp_path: Path) -> None:
    numbers = Plan("shop", "mend", (Step("mend", "mend it", {"blocks": {2: "a", 10: "b"}}),))
    with pytest.raises(RefusedError, match="changes when it is written down"):
        Journal.create(tmp_path / "a", numbers)
    with pytest.raises(RefusedError, match="cannot be written down"):
        Journal.create(tmp_path / "b", Plan("shop", "mend", (Step("mend", "it", {"at": object()}),)))
    assert folders(tmp_path) == []


def test_two_executors_of_one_cluster_exclude_each_other(tmp_path: Path) -> None:
    with cluster_lock(tmp_path, "shop"):
        with pytest.raises(LockHeldError), cluster_lock(tmp_path, "shop"):
            pass
        with cluster_lock(tmp_path, "other"):
            pass


def test_no_more_is_written_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After half a line, whatever follows would be lost with it."""
    journal = begun(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(NoSpaceError, match="disk is full"):
            journal.append("note", step=0, name="n", value=1)
    with pytest.raises(NoSpaceError, match="disk is full"):
        journal.append("done", step=0)
    assert [event["event"] for event in journal.events] == ["begun", "started"]
