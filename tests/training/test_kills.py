"""Runs that are killed, at random, within a save, and between two layouts, compute the same."""

import pytest

from tests.helpers import kills


@pytest.mark.slow
@pytest.mark.parametrize("table", kills.TABLES, ids=lambda table: table.__name__)
def test_killed_runs_go_on_as_if_nothing_happened(data_folder, tmp_path, table):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    result = table(data_folder, tmp_path)
    assert result.kills >= 10
    assert result.exact >= result.kills
    assert result.largest <= result.bound
    assert result.recomputed > 0
