"""The gap test and its like: every damage is found with the exact window, and healthy archives are silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fix_archive import (
    Archived,
    archive_wal,
    commit_in_own_segment,
    flip,
    new_archive,
    real_backup,
    six_commits,
    six_commits_on_a_backup,
)
from knockwood.errors import ProgramsMissingError, TargetUnreachableError
from knockwood.host import privileges
from knockwood.model import Lsn, Timeline, Verdict, WalSegment
from knockwood.postgres.binaries import Programs
from knockwood.postgres.connection import connect
from knockwood.repository import codec
from knockwood.repository.archive import WalArchive
from knockwood.repository.backups.model import own_sha256
from knockwood.repository.targets import BeforeXid, Latest, ToLsn, resolve
from knockwood.repository.verify import Verification, verify

if TYPE_CHECKING:
    from fix_server import ServerFactory
    from knockwood.postgres.server import LocalServer


def _server(new_server: ServerFactory, major: int = 18) -> LocalServer:
    server: LocalServer = new_server(major, segment_megabytes=1, wal_keep_size="200MB")
    return server


@pytest.fixture
def made(new_server: ServerFactory, tmp_path: Path) -> Archived:
    """A described backup and six commits: enough for WAL."""
    return six_commits(_server(new_server), tmp_path / "repository")


@pytest.fixture
def whole(new_server: ServerFactory, tmp_path: Path) -> Archived:
    """A real backup and six commits."""
    return six_commits_on_a_backup(_server(new_server), tmp_path / "repository")


def _wal_only(found: Verification) -> list[str]:
    """Damage but that of the described backup, which has no files."""
    return [damage.object for damage in found.damaged if damage.object.startswith("wal/")]


def _end(made: Archived) -> Lsn:
    return made.segments[-1].end


def _lsn(made: Archived, index: int) -> Lsn:
    """Where the record of a commit begins."""
    plan = resolve(made.repository, BeforeXid(made.commits[index].xid))
    assert plan.target_lsn is not None
    return plan.target_lsn


def test_a_healthy_archive_is_silent_and_the_next_run_reads_nothing_old(
    new_server: ServerFactory, every_version: int, tmp_path: Path
) -> None:
    made = six_commits_on_a_backup(_server(new_server, every_version), tmp_path / "r")
    first = verify(made.repository)
    assert first.verdict is Verdict.HELD, first.as_json()
    (window,) = first.windows
    (backup,) = made.backups
    assert (window.backup, window.start, window.end) == (backup.id, backup.stop_lsn, _end(made))
    assert window.end_time == resolve(made.repository, Latest()).last_commit.time  # type: ignore[union-attr]
    second = verify(made.repository, rotate_fraction=0)
    assert second.bytes_read == 0
    assert second.windows == first.windows
    assert second.verdict is Verdict.HELD
    with connect(made.server.dsn()) as connection:
        commit_in_own_segment(made, connection)
    archive_wal(made)
    third = verify(made.repository, rotate_fraction=0)
    assert third.verdict is Verdict.HELD
    assert third.bytes_read == 2 << 20  # the new segment, and the one before it for its last record
    assert third.windows[0].end == _end(made)
    assert len(list(made.root.glob("verified/*"))) == 1
    everything = verify(made.repository, full=True)
    assert everything.windows == third.windows
    assert everything.bytes_read > 3 << 20


def test_a_removed_segment_is_a_gap_up_to_the_end(whole: Archived) -> None:
    verify(whole.repository)
    whole.object(whole.segments[3]).unlink()
    for full in (False, True):
        found = verify(whole.repository, full=full)
        assert found.verdict is Verdict.BROKEN
        (gap,) = found.gaps
        assert (gap.start, gap.end) == (whole.segments[3].start, _end(whole))
        assert gap.segment == whole.segments[3].name
        assert gap.start_time == found.windows[0].end_time
        assert found.windows[0].end == whole.segments[3].start


def test_a_new_backup_after_a_gap_opens_a_new_window(whole: Archived) -> None:
    whole.object(whole.segments[3]).unlink()
    whole.lost.add(whole.segments[3])
    later = real_backup(whole)
    found = verify(whole.repository)
    assert [(w.backup, w.start) for w in found.windows] == [
        (whole.backups[0].id, whole.backups[0].stop_lsn),
        (later.id, later.stop_lsn),
    ]
    (gap,) = found.gaps
    assert (gap.start, gap.end) == (whole.segments[3].start, later.stop_lsn)
    assert gap.end_time == later.finished_at
    assert resolve(whole.repository, Latest()).backup == later


def test_bytes_flipped_in_a_stored_segment(made: Archived) -> None:
    path = made.object(made.segments[3])
    flip(path, path.stat().st_size // 2, 4)
    found = verify(made.repository)
    assert _wal_only(found) == [str(path.relative_to(made.root))]
    with pytest.raises(TargetUnreachableError, match=f"transaction {made.commits[2].xid} at"):
        resolve(made.repository, Latest())


def test_bytes_flipped_in_the_wal_itself_show_in_the_record(whole: Archived) -> None:
    lsn = _lsn(whole, 3)
    segment = whole.segments[3]
    path = whole.object(segment)
    raw = bytearray(b"".join(whole.repository.read(str(path.relative_to(whole.root)))))
    offset = lsn.value - segment.start.value
    for index in range(offset + 26, offset + 30):
        raw[index] ^= 0xFF
    path.write_bytes(b"".join(codec.encode([bytes(raw)])))
    found = verify(whole.repository)
    (damage,) = found.damaged
    assert damage.object == str(path.relative_to(whole.root))
    assert "checksum" in damage.reason
    assert damage.start == str(lsn)
    (gap,) = found.gaps
    assert (gap.start, gap.end, gap.segment) == (lsn, _end(whole), segment.name)
    assert found.windows[0].end == lsn
    plan = resolve(whole.repository, Latest(), accept_loss=True)
    assert plan.last_commit is not None
    assert plan.last_commit.xid == whole.commits[2].xid
    # It is damaged in every run, not only in the first.
    assert [d.object for d in verify(whole.repository, rotate_fraction=0).damaged] == [damage.object]


def test_a_segment_of_another_moment_breaks_the_chain_of_records(made: Archived) -> None:
    """Whole, valid WAL under a right name, but not what followed: only the prev-link shows it."""
    segment = made.segments[3]
    path = made.object(segment)
    raw = bytearray(b"".join(made.repository.read(str(path.relative_to(made.root)))))
    raw[40 + 8] ^= 0x08  # xl_prev of the first record
    path.write_bytes(b"".join(codec.encode([bytes(raw)])))
    found = verify(made.repository)
    assert _wal_only(found) == [str(path.relative_to(made.root))]
    assert found.damaged[-1].start == str(segment.start + 40) or found.damaged[-1].start == str(segment.start)


def test_without_the_segment_that_makes_it_consistent_a_backup_is_unusable(whole: Archived) -> None:
    (backup,) = whole.backups
    segment = WalSegment.containing(Timeline(1), backup.start_lsn, 1 << 20)
    whole.object(segment).unlink()
    found = verify(whole.repository)
    assert found.windows == ()
    assert [one.backup for one in found.unusable] == [backup.id]
    assert segment.name in found.unusable[0].reason
    (gap,) = found.gaps
    assert (gap.start, gap.end) == (backup.start_lsn, _end(whole))
    with pytest.raises(TargetUnreachableError, match="consistency"):
        resolve(whole.repository, Latest(), accept_loss=True)


def test_a_bit_flipped_in_a_pack(whole: Archived) -> None:
    (backup,) = whole.backups
    flip(whole.root / backup.packs[0].name, 100_000)
    found = verify(whole.repository)
    assert [damage.object for damage in found.damaged] == [backup.packs[0].name]
    assert [one.backup for one in found.unusable] == [backup.id]
    assert found.windows == ()
    assert (found.gaps[0].start, found.gaps[0].end) == (backup.start_lsn, _end(whole))


def test_a_lost_pack(whole: Archived) -> None:
    (backup,) = whole.backups
    verify(whole.repository)
    (whole.root / backup.packs[-1].name).unlink()
    found = verify(whole.repository, rotate_fraction=0)
    assert [(d.object, d.reason) for d in found.damaged] == [(backup.packs[-1].name, "is missing")]


def test_a_backup_label_removed_with_all_bookkeeping_redone(whole: Archived) -> None:
    (backup,) = whole.backups
    _without_label(whole)
    found = verify(whole.repository)
    assert found.verdict is Verdict.BROKEN
    assert [d.object for d in found.damaged] == [backup.members.name]
    assert "backup_label" in found.damaged[0].reason
    assert [one.backup for one in found.unusable] == [backup.id]


def test_a_changed_description_is_damage_and_its_backup_is_restored_from_no_more(whole: Archived) -> None:
    (backup,) = whole.backups
    path = whole.root / f"backups/{backup.id}/backup.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"stop_lsn": str(backup.start_lsn)}))
    found = verify(whole.repository)
    assert found.verdict is Verdict.BROKEN
    assert [d.object for d in found.damaged] == [str(path)]
    assert "own sha256" in found.damaged[0].reason
    with pytest.raises(TargetUnreachableError):
        resolve(whole.repository, Latest(), programs_for=lambda _: whole.server.programs)


def test_a_file_altered_with_all_bookkeeping_redone_is_found_by_a_full_run(whole: Archived) -> None:
    (backup,) = whole.backups
    assert verify(whole.repository, full=True).verdict is Verdict.HELD
    pack = min(backup.packs, key=lambda p: p.raw_bytes)
    lines = [json.loads(x) for x in b"".join(whole.repository.read(backup.members.name)).splitlines()]
    (number,) = [line["pack"] for line in lines if line.get("name") == pack.name]
    inside = max((x for x in lines if x.get("pack") == number and "path" in x), key=lambda x: x["size"])
    raw = bytearray(b"".join(whole.repository.read(pack.name)))
    raw[inside["offset"] + inside["size"] // 2] ^= 1
    counted = codec.Counted(codec.encode([bytes(raw)]))
    (whole.root / pack.name).write_bytes(b"".join(bytes(c) for c in counted))
    path = whole.root / f"backups/{backup.id}/backup.json"
    value = json.loads(path.read_text())
    for entry in value["packs"]:
        if entry["name"] == pack.name:
            entry |= {"bytes": counted.bytes, "sha256": counted.sha256}
    path.write_text(json.dumps(value | {"sha256": own_sha256(value)}))
    found = verify(whole.repository, full=True)
    assert [d.object for d in found.damaged] == [pack.name]
    assert inside["path"] in found.damaged[0].reason


def _without_label(made: Archived) -> None:
    """Drop the file from the pack and write index, sizes and sha256 anew."""
    (backup,) = made.backups
    lines = [json.loads(line) for line in b"".join(made.repository.read(backup.members.name)).splitlines()]
    (label,) = [line for line in lines if line.get("path") == "backup_label"]
    lines.remove(label)
    (pack,) = [line for line in lines if "frames" in line and line["pack"] == label["pack"]]
    raw = b"".join(made.repository.read(pack["name"]))
    begin, length = label["offset"] - 512, 512 + -(-label["size"] // 512) * 512
    pack["members"] -= 1
    pack["frames"] = [[0, 0]]
    for line in lines:
        if line.get("pack") == label["pack"] and line.get("offset", 0) > label["offset"]:
            line["offset"] -= length
    new = {
        pack["name"]: raw[:begin] + raw[begin + length :],
        backup.members.name: "\n".join(json.dumps(line) for line in lines).encode() + b"\n",
    }
    path = made.root / f"backups/{backup.id}/backup.json"
    value = json.loads(path.read_text())
    for entry in (*value["packs"], value["members"]):
        if entry["name"] in new:
            counted = codec.Counted(codec.encode([new[entry["name"]]]))
            (made.root / entry["name"]).write_bytes(b"".join(bytes(c) for c in counted))
            entry |= {
                "bytes": counted.bytes, "sha256": counted.sha256, "raw_bytes": len(new[entry["name"]]),
            }  # fmt: skip
    path.write_text(json.dumps(value | {"sha256": own_sha256(value)}))


def test_an_old_object_is_found_when_its_turn_comes(made: Archived) -> None:
    verify(made.repository)
    path = made.object(made.segments[2])
    flip(path, path.stat().st_size // 2, 4)
    runs = [_wal_only(verify(made.repository, rotate_fraction=0.25)) for _ in range(4)]
    assert any(runs)
    assert all(found == [str(path.relative_to(made.root))] for found in runs if found)
    assert _wal_only(verify(made.repository, rotate_fraction=0)) == [str(path.relative_to(made.root))]


def test_what_cannot_be_read_is_not_checked(new_server: ServerFactory, tmp_path: Path) -> None:
    from dataclasses import replace

    import pyrage

    identity = pyrage.x25519.Identity.generate()
    keys: dict[str, Any] = {"recipients": (str(identity.to_public()),), "identities": (str(identity),)}
    made = six_commits_on_a_backup(_server(new_server), tmp_path / "r", **keys)
    blind = verify(replace(made.repository, identities=()), remember=False)
    assert blind.verdict is Verdict.NOT_CHECKED
    assert any(one.part == "WAL records" for one in blind.not_checked)
    assert blind.damaged == ()

    def none(major: int) -> Programs:
        raise ProgramsMissingError(f"no programs of PostgreSQL {major} found")

    without = verify(made.repository, programs_for=none)
    assert without.verdict is Verdict.NOT_CHECKED
    assert [one.reason for one in without.not_checked] == ["no programs of PostgreSQL 18 found"]
    assert verify(made.repository).verdict is Verdict.HELD
    flip(made.root / made.backups[0].packs[0].name, 1000)
    assert verify(replace(made.repository, identities=()), full=True).verdict is Verdict.BROKEN


def test_a_window_goes_on_along_the_new_timeline(new_server: ServerFactory, tmp_path: Path) -> None:
    made = _promoted(new_server, tmp_path / "r")
    found = verify(made.repository)
    assert found.verdict is Verdict.HELD, found.as_json()
    (window,) = found.windows
    assert (window.timeline, window.start, window.end) == (2, made.backups[0].stop_lsn, _end(made))
    plan = resolve(made.repository, Latest())
    assert plan.timeline == 2
    assert plan.last_commit is not None
    assert plan.last_commit.xid == made.commits[-1].xid
    assert plan.wal[0].segment.timeline == 1
    assert plan.wal[-1].segment.timeline == 2
    assert plan.histories == (2,)
    flip_at = made.object(plan.wal[-2].segment)
    flip(flip_at, flip_at.stat().st_size // 2, 4)
    flip_at.touch()  # else it would be taken for the object that was proved
    with pytest.raises(TargetUnreachableError, match="timeline 2"):
        resolve(made.repository, Latest())


def _promoted(new_server: ServerFactory, root: Path) -> Archived:
    """Two commits on timeline 1, then the server is promoted and there are two more on timeline 2."""
    server = _server(new_server)
    made = new_archive(server, root)
    with connect(server.dsn()) as connection:
        connection.execute("create table witness (a int)")
        connection.execute("select pg_switch_wal()")
        real_backup(made)
        connection.execute("select pg_switch_wal()")
        for _ in range(2):
            commit_in_own_segment(made, connection)
        connection.execute("insert into witness values (2)")
    archive_wal(made)
    server.stop()
    signal = server.data_directory / "standby.signal"
    signal.touch()
    privileges.give(signal, server.account)
    server.start(until="standby")
    with connect(server.dsn()) as connection:
        connection.execute("select pg_promote()")
        for _ in range(2):
            commit_in_own_segment(made, connection)
    archive_wal(made)
    assert WalArchive(made.repository).inventory().histories
    return made


def test_a_partial_tail_counts_up_to_its_last_record(made: Archived) -> None:
    """The segment being written, as a receiver stores it: it may end anywhere, also inside a record."""
    with connect(made.server.dsn()) as connection:
        connection.execute("insert into witness values (7)")
        row = connection.execute("select pg_current_wal_insert_lsn()::text").fetchone()
        assert row is not None
        end = Lsn.parse(row[0])
        connection.execute("insert into witness values (8)")
    segment = WalSegment.containing(Timeline(1), end, 1 << 20)
    path = made.server.data_directory / "pg_wal" / segment.name
    archive = WalArchive(made.repository)
    archive.put_partial(segment, path, end + 20)
    found = verify(made.repository)
    assert _wal_only(found) == []
    plan = resolve(made.repository, Latest())
    assert plan.wal[-1].partial_name is not None
    assert plan.last_commit is not None
    assert segment.start <= plan.last_commit.lsn < end
    with pytest.raises(TargetUnreachableError, match=f"ends at {end}"):
        resolve(made.repository, ToLsn(end + 64))
    # Replaced by a longer one between listing and reading: no false alarm.
    listed = archive.inventory().partials[0]
    archive.put_partial(segment, path, end + 40)
    archive.drop_partials(segment, end + 40)
    archive.fetch_partial(listed.name, made.root.parent / "again")
    assert _wal_only(verify(made.repository)) == []
