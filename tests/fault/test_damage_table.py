"""Some rows of the damage table, as `make bench-damage` does them: done for real, found where they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from knockwood.drill.sandbox import choose_programs
from knockwood.host import privileges

if TYPE_CHECKING:
    from damage_site import Site

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        from damage_site import healthy_site
        from sandbox import work_folder

        account = privileges.server_account()
        with work_folder(account) as folder:
            folder.chmod(0o755)
            with healthy_site(folder, choose_programs(), account, 1) as site:
                yield site


# Needs the checks and a proof together; the rows that one check finds have tests of that check.
@pytest.mark.slow
@pytest.mark.parametrize("key", ["pg-xact"])
def test_a_row_is_found_and_nothing_else(healthy: Site, key: str) -> None:
    from damage_cases import play
    from damage_rows import ROWS

    [row] = [row for row in ROWS if row.key == key]
    judgement = play(healthy, row, healthy.folder.parent).judgement
    assert [outcome.damage for outcome in judgement.outcomes if not outcome.found] == []
    assert judgement.false_alarms == []


@pytest.mark.slow
@pytest.mark.parametrize("key", ["wal", "backup-label"])
def test_a_row_about_the_repository_is_found(healthy: Site, key: str) -> None:
    from damage_wal import play_repository

    judgement = play_repository(healthy, key, healthy.folder.parent).judgement
    assert [outcome.damage for outcome in judgement.outcomes if not outcome.found] == []
    assert judgement.false_alarms == []
