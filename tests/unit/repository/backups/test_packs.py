"""Packs: what goes in comes out, whole or in part, however the content is cut."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fix_archive import a_backup
from knockwood.errors import ObjectDamagedError
from knockwood.model import Lsn
from knockwood.repository.backups import packs as packs_module
from knockwood.repository.backups.extract import Extractor, Layout, cut, extract_pack
from knockwood.repository.backups.listing import read_index, read_object, read_packs
from knockwood.repository.backups.model import Backup, Pack
from knockwood.repository.backups.packs import PackWriter
from knockwood.repository.backups.pagecheck import PageCheck
from knockwood.repository.backups.partial import fetch_members
from knockwood.repository.backups.tar import Member, read_tar
from knockwood.repository.repository import Repository
from knockwood.repository.storage.local import LocalStorage


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    storage = LocalStorage(tmp_path / "repository")
    return Repository.create(storage, cluster="c", system_identifier=1, segment_bytes=1 << 20)


def entries(files: dict[str, bytes], step: int) -> Iterator[Member | memoryview]:
    for path, content in files.items():
        yield Member(path, len(content))
        for at in range(0, len(content), step):
            yield memoryview(content)[at : at + step]


def store(repository: Repository, files: dict[str, bytes], name: str = "b", step: int = 70_000) -> Backup:
    index = io.StringIO()
    with PackWriter(
        repository, lambda n: f"backups/{name}/pack-{n:05d}.tar", index=index, check=PageCheck(False)
    ) as writer:
        writer.write(entries(files, step))
        made = writer.finish()
    members = repository.put(f"backups/{name}/members.jsonl", [index.getvalue().encode()])
    described = a_backup(name, 1, Lsn(0), Lsn(1), datetime.now(UTC))
    return replace(
        described, packs=made, members=Pack(members.name, members.bytes, members.raw_bytes, members.sha256)
    )


def content(size: int, seed: int) -> bytes:
    return bytes((seed * 7 + i * 31 % 251) % 256 for i in range(min(size, 997))) * (size // 997 + 1)


SIZES = st.lists(
    st.sampled_from([0, 1, 511, 512, 513, 8192, 20_000, 90_000, 120_000, 300_001]), min_size=1, max_size=8
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, step=st.sampled_from([1000, 8192, 33_000]))
def test_members_come_back_whole_and_in_part(
    sizes: list[int],
    step: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("packs")
    repository = Repository.create(
        LocalStorage(root / "r"), cluster="c", system_identifier=1, segment_bytes=1 << 20
    )
    files = {f"base/1/{number}": content(size, number)[:size] for number, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        # Small limits make many packs and frames of little content.
        patch.setattr(packs_module, "PACK_BYTES", 200_000)
        patch.setattr(packs_module, "FRAME_BYTES", 65_536)
        patch.setattr(packs_module, "_GROUP_BYTES", 16_384)
        backup = store(repository, files, step=step)
    found: dict[str, bytes] = {}
    for pack in backup.packs:
        path = ""
        for entry in read_tar(read_object(repository, pack), terminated=True):
            if isinstance(entry, Member):
                path = entry.path
                found[path] = b""
            else:
                found[path] += bytes(entry)
    assert found == files
    assert sum(pack.raw_bytes for pack in backup.packs) >= sum(sizes)
    wanted = [path for number, path in enumerate(files) if number % 2 == 0]
    fetch_members(repository, backup, lambda member: member.path in wanted, root / "part")
    for path in wanted:
        assert (root / "part" / path).read_bytes() == files[path]
    assert len(list((root / "part" / "base/1").iterdir())) == len(wanted)
    _extract(repository, backup, root / "all")
    assert {path: (root / "all" / path).read_bytes() for path in files} == files


def _extract(repository: Repository, backup: Backup, into: Path) -> None:
    extractor = Extractor(Layout(into), account=None, hold_control_file=True)
    stored = read_packs(repository, backup)
    with ThreadPoolExecutor(2) as pool:
        for pack in backup.packs:
            extract_pack(repository, pack, stored[pack.name], extractor, pool)


def test_an_index_that_does_not_fit_its_pack_is_noticed(repository: Repository, tmp_path: Path) -> None:
    backup = store(repository, {"a": b"1" * 9000, "b": b"2" * 5_000_000})
    (stored,) = read_packs(repository, backup).values()
    wrong = replace(stored, members=3)
    extractor = Extractor(Layout(tmp_path / "x"), account=None, hold_control_file=True)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ObjectDamagedError, match="2 members, recorded are 3"):
        extract_pack(repository, backup.packs[0], wrong, extractor, pool)
    shifted = replace(stored, frames=((0, 0), (stored.frames[1][0] + 1, stored.frames[1][1])))
    extractor = Extractor(Layout(tmp_path / "y"), account=None, hold_control_file=True)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ObjectDamagedError):
        extract_pack(repository, backup.packs[0], shifted, extractor, pool)


def test_the_control_file_is_held_back(repository: Repository, tmp_path: Path) -> None:
    backup = store(repository, {"global/pg_control": b"c" * 8192, "PG_VERSION": b"18\n"})
    _extract(repository, backup, tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x" / "global").iterdir()) == ["pg_control.incomplete"]


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "pg_tblspc/7/../../../x"])
def test_no_member_leads_outside(repository: Repository, tmp_path: Path, path: str) -> None:
    with pytest.raises(ObjectDamagedError):
        Layout(tmp_path).place(path)


def test_tablespaces_go_where_the_layout_says(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "data", {7: tmp_path / "fast"})
    assert layout.place("pg_tblspc/7/PG_18/5/1") == tmp_path / "fast/PG_18/5/1"
    assert layout.place("pg_tblspc/8/PG_18/5/1") == tmp_path / "data/pg_tblspc/8/PG_18/5/1"


def test_a_failing_store_ends_the_writer(repository: Repository) -> None:
    # The name is taken: the store fails at its end, while the writer is long past it.
    repository.storage.put_new("backups/b/pack-00000.tar.zst", [b"here already"])
    with pytest.raises(Exception, match="already stored"):
        store(repository, {f"base/1/{n}": bytes(60_000_000) for n in range(4)})


def test_a_failing_source_stores_no_pack(repository: Repository) -> None:
    def broken() -> Iterator[Member | memoryview]:
        yield Member("a", 10_000_000)
        yield memoryview(bytes(9_000_000))
        raise ObjectDamagedError("the source broke")

    with (
        pytest.raises(ObjectDamagedError, match="the source broke"),
        PackWriter(
            repository, lambda n: f"backups/b/pack-{n}.tar", index=io.StringIO(), check=PageCheck(False)
        ) as writer,
    ):
        writer.write(broken())
    assert list(repository.storage.list("backups/")) == []


def test_the_index_names_every_member_once(repository: Repository) -> None:
    files = {f"base/1/{n}": b"x" * n for n in range(50)}
    backup = store(repository, files)
    lines = [json.loads(line) for line in b"".join(read_object(repository, backup.members)).splitlines()]
    assert [line["path"] for line in lines if "path" in line] == list(files)
    assert read_index(repository, backup, ("base/1/7",)).members.keys() == {"base/1/7"}


@given(st.binary(max_size=500), st.lists(st.integers(1, 499), max_size=5), st.integers(1, 100))
def test_a_stream_is_cut_where_the_index_says(data: bytes, places: list[int], step: int) -> None:
    starts = [0, *sorted({place for place in places if place < len(data)})]
    chunks = [data[at : at + step] for at in range(0, len(data), step)]
    found = list(cut(chunks, starts))
    assert b"".join(found) == data
    assert [sum(map(len, found[:n])) for n in range(len(found))] == starts
