"""The pure parts of the benches: tables, medians and ratios, and the judgement of what Knockwood found."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from knockwood.model import Lsn

SEGMENT = 16 << 20
ENDS = tuple(Lsn(number * SEGMENT + 4096) for number in range(10, 16))
NAME = "00000001000000000000000C"


def test_a_table_is_aligned_and_its_cells_cannot_break_it() -> None:
    from tables import markdown

    lines = markdown(["tool", "says"], [["x", "a|b\nc"], ["longer name", ""]]).splitlines()
    assert lines[0] == "| tool        | says   |"
    assert lines[1] == "| ----------- | ------ |"
    assert lines[2] == "| x           | a\\|b c |"
    assert len({len(line) for line in lines}) == 1


def test_a_row_of_another_length_is_refused() -> None:
    from tables import markdown

    with pytest.raises(ValueError, match="2 cells in a table of 1"):
        markdown(["one"], [["1", "2"]])


def test_a_clipped_text_is_never_wider_than_asked() -> None:
    from tables import clipped

    assert clipped("short", 10) == "short"
    assert clipped("a long sentence", 6) == "a lon…"


def test_a_series_tells_median_least_and_most() -> None:
    from measure import Series

    assert Series((3.0, 1.0, 10.0)).text(1) == "3.0 (1.0 to 10.0, 3 runs)"
    with pytest.raises(ValueError, match="no measurements"):
        Series(())


def test_ratios_above_one_mean_faster_than_the_peer() -> None:
    from measure import Series, ratio, ratios_of_pairs

    peer, ours = Series((4.0, 6.0, 8.0)), Series((2.0, 3.0, 16.0))
    assert ratio(peer, ours) == 2.0
    assert ratios_of_pairs(peer, ours).values == (2.0, 2.0, 0.5)
    assert ratios_of_pairs(peer, ours).median == 2.0


def _answer(end: Lsn, gap_from: Lsn, segment: str = NAME, damaged: str = "") -> str:
    point: Any = {"lsn": "0/0A000100", "time": None}
    value = {
        "verdict": "broken",
        "windows": [{"from": point, "to": {"lsn": str(end)}}],
        "gaps": [{"from": {"lsn": str(gap_from)}, "to": {"lsn": str(ENDS[-1])}, "segment": segment}],
        "damaged": [{"object": damaged}] if damaged else [],
    }
    return json.dumps(value)


def _faults(key: str, verify: str, **changes: Any) -> list[str]:
    from gap_expect import Known, Observed, faults

    seen: dict[str, Any] = {
        "verify_exit": 1,
        "restore_exit": 4,
        "started": False,
        "rows": None,
        "loss_rows": 2,
    }
    seen |= {"tables": ""} | changes
    segments = tuple(end.value // SEGMENT for end in ENDS)
    return faults(Observed(key=key, verify_json=verify, **seen), Known(ENDS, segments, 3, SEGMENT, ""))


def test_the_exact_window_and_a_refusal_are_accepted() -> None:
    start = Lsn(12 * SEGMENT)
    assert _faults("a", _answer(start, start)) == []
    assert _faults("c", _answer(start, start, damaged=f"wal/{NAME}.zst")) == []


@pytest.mark.parametrize(
    ("key", "verify", "changes", "word"),
    [
        ("a", _answer(ENDS[0], ENDS[0]), {}, "the window ends"),
        ("a", _answer(ENDS[3], ENDS[3]), {}, "the window ends"),
        ("a", _answer(ENDS[1], ENDS[1], segment="other"), {}, "the gaps name"),
        ("a", _answer(ENDS[1], ENDS[2]), {}, "the gap begins"),
        ("c", _answer(ENDS[1], ENDS[1]), {}, "damaged names nothing"),
        ("a", _answer(ENDS[1], ENDS[1]), {"restore_exit": 0, "started": True, "rows": 2}, "starts"),
        ("a", _answer(ENDS[1], ENDS[1]), {"restore_exit": 1}, "not 4"),
        ("a", _answer(ENDS[1], ENDS[1]), {"loss_rows": 1}, "--accept-loss"),
        ("a", _answer(ENDS[1], ENDS[1]), {"verify_exit": 0}, "verify ended with 0"),
        ("d", _answer(ENDS[1], ENDS[1]), {}, "restorable"),
        ("a", "Traceback", {}, "no JSON"),
    ],
)
def test_every_shortcoming_is_told(key: str, verify: str, changes: dict[str, Any], word: str) -> None:
    assert any(word in fault for fault in _faults(key, verify, **changes))


def test_a_manifest_without_a_file_keeps_a_right_checksum() -> None:
    from gap_barman import without_member

    manifest = (
        '{ "PostgreSQL-Backup-Manifest-Version": 1,\n"Files": [\n'
        '{ "Path": "base/1/2", "Size": 1 },\n{ "Path": "backup_label", "Size": 2 }\n],\n'
        '"Manifest-Checksum": "00"}\n'
    )
    changed = without_member(manifest, "backup_label")
    assert [entry["Path"] for entry in json.loads(changed)["Files"]] == ["base/1/2"]
    body = changed[: changed.index('"Manifest-Checksum"')]
    assert json.loads(changed)["Manifest-Checksum"] == hashlib.sha256(body.encode()).hexdigest()
    with pytest.raises(RuntimeError, match="no backup_label"):
        without_member(changed, "backup_label")


def test_the_checksum_of_an_info_file_covers_all_but_itself() -> None:
    from gap_pgbackrest import stamp, stamped

    text = '[backrest]\nbackrest-checksum="' + "0" * 40 + '"\nbackrest-format=5\n\n[db]\na=b={"x":1}\n'
    body = '{"backrest":{"backrest-format":5},"db":{"a=b":{"x":1}}}'
    assert stamped(text) == "0" * 40
    assert stamp(text) == hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()
