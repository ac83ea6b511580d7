"""All-reduce through shared memory: gloo's results, on as many ranks and groups as there are."""

import json
import re

import pytest

from tests.helpers import ranks

SCRIPT = "tests/helpers/reducing_ranks.py"


def reports(case, processes):
    done = ranks.run(SCRIPT, case, processes=processes)
    assert done.returncode == 0, done.stderr
    found = sorted(map(json.loads, done.stdout.splitlines()), key=lambda report: report["rank"])
    assert [report["rank"] for report in found] == list(range(processes))
    return found


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_sums_and_maxima_are_those_of_gloo_in_every_group(processes):
    """Of any size, dtype and stride, whole or as work to wait for; other operations are gloo's."""
    for report in reports("one machine", processes):
        assert report["different"] == []
        assert report["same bits"]
        assert report["works"]
        assert all(report["works"])


@pytest.mark.parametrize("case", ["no memory", "two machines"])
def test_gloo_does_it_where_one_rank_cannot_share(case):
    for report in reports(case, 3):
        assert report["different"] == []
        assert report["works"]
        assert not any(report["works"])


def test_ranks_that_wait_for_one_that_is_killed_learn_it_at_once():
    launched = ranks.Launched(SCRIPT, "killed", processes=3)
    for process in launched.processes:
        process.wait()
    found = [json.loads(line) for line in launched.said()[1].splitlines()]
    assert len(found) == 2
    for report in found:
        assert report["soon"]
        # As in `LOST_RANK_MESSAGES`: which one, depends on who was waiting for whom.
        assert re.search("Connection (closed|reset) by peer|Broken pipe", report["error"])
