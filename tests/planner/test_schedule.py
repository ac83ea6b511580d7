import itertools

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from examples.mimo.planner.flops import Cost
from examples.mimo.planner.pipeline import rank_order, simulate

EQUAL = Cost(1.0, 2.0)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 8), (4, 4), (4, 13)])
def test_1f1b_of_equal_stages_takes_the_known_time(stages, micro_batches):
    timeline = simulate([EQUAL] * stages, stages, micro_batches)
    assert timeline.seconds == pytest.approx(3.0 * (micro_batches + stages - 1))
    assert timeline.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_virtual_stages_divide_the_bubble(stages, virtual, micro_batches):
    """(P - 1) / V of a micro-batch's time: arXiv:2104.04473, section 2.2.2."""
    timeline = simulate([EQUAL] * (stages * virtual), stages, micro_batches)
    expected = 3.0 * (virtual * micro_batches + stages - 1)
    assert timeline.seconds == pytest.approx(expected)


def test_the_slowest_stage_sets_the_pace():
    timeline = simulate([EQUAL, Cost(3.0, 6.0)], 2, 50)
    assert timeline.seconds == pytest.approx(50 * 9.0 + 3.0)


def test_a_stage_holds_one_micro_batch_more_than_the_next():
    timeline = simulate([EQUAL] * 4, 4, 8)
    assert [timeline.in_flight(rank, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert simulate([EQUAL] * 4, 4, 2).in_flight(0, 0) == 2


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), [(4, 1, 6), (2, 3, 4), (4, 2, 8)])
def test_forward_passes_follow_megatrons_table(stages, virtual, micro_batches):
    table = get_schedule_table(micro_batches, virtual, stages)
    steps = rank_order(1, stages, virtual, micro_batches)
    forward = [(s.micro_batch, s.chunk // stages) for s in steps if s.forward]
    assert forward == table
    backward = [(s.micro_batch, virtual - 1 - s.chunk // stages) for s in steps if not s.forward]
    assert backward == table


def test_no_rank_does_two_things_at_once():
    timeline = simulate([Cost(1.0, 1.5), Cost(0.7, 2.0), Cost(0.2, 0.1), EQUAL], 2, 6)
    for steps in timeline.ranks:
        assert all(a.end <= b.start for a, b in itertools.pairwise(steps))
        assert len(steps) == 2 * 2 * 6


def test_the_drawing_shows_who_waits():
    drawn = simulate([EQUAL] * 2, 2, 2).draw(width=18)
    assert drawn == ["0011....aaaa..bbbb", "..00aaaa11bbbb...."]
