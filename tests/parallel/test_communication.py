"""`python -m benchmarks.communication` compares all layouts in this way and writes the tables."""

import pytest

from benchmarks import traffic
from benchmarks.communication import (
    Result,
    computed_bubble,
    counted,
    counted_bubble,
    measure,
    table,
)
from benchmarks.traffic import LAYOUTS, Layout, computed

# Together they hold every term of the formula; the others repeat them at other sizes.
ALWAYS = {
    "TP 2 x CP 2, sequence parallel",
    "PP 2, 2 virtual stages",
    "DP 2, distributed optimizer",
    "non-colocated: encoders 1 + 1, language TP 2",
}
assert {layout.name for layout in LAYOUTS} >= ALWAYS, "a layout that is not run"
CASES = [
    pytest.param(layout, id=layout.name, marks=() if layout.name in ALWAYS else pytest.mark.slow)
    for layout in LAYOUTS
]


@pytest.mark.parametrize("layout", CASES)
def test_ranks_send_what_the_formula_says(layout):
    result = measure(layout)
    assert not result.other_operations
    assert result.is_within_bound, (result.differences, result.bubble)
    if layout.processes > 1:
        assert result.differences


def sent(event, size, number, caller="", group="TENSOR_MODEL_PARALLEL_GROUP"):
    return {
        "operation": event,
        "group": group,
        "size": size,
        "bytes": number,
        "caller": caller,
    }


def test_bytes_are_those_of_a_ring():
    events = [
        sent("allreduce", 4, 100),
        sent("allgather", 4, 10),
        sent("reduce_scatter", 4, 10),
        sent("broadcast", 4, 100),
        sent("allreduce", 1, 1000),
        {"operation": "forward"},
    ]
    traffic = counted(events)
    assert traffic.bytes == {"tensor": 150 + 30 + 30 + 75}
    assert traffic.operations == {"tensor": 4}


def test_the_formula_knows_every_parameter_of_the_model(build_model):
    model = build_model(traffic.model())
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert traffic.rank_parameters(traffic.Rank.of(Layout("one process"), 0)) == expected


def one_stage_after_the_other(micro_batches):
    """Two stages that take turns: nothing is overlapped."""
    first, second = [], []
    for _ in range(micro_batches):
        first += [{"operation": "forward"}, {"operation": "send", "peer": 1}]
        first += [{"operation": "recv", "peer": 1}, {"operation": "backward"}]
        second += [{"operation": "recv", "peer": 0}, {"operation": "forward"}]
        second += [{"operation": "backward"}, {"operation": "send", "peer": 0}]
    return [first, second]


def test_idle_slots_are_counted_from_the_order_of_passes_and_messages():
    layout = Layout("PP 2", pp=2)
    assert counted_bubble(layout, one_stage_after_the_other(3)) == pytest.approx(0.5)
    assert computed_bubble(layout) == pytest.approx(1 / 9)


def test_sharding_the_optimizer_sends_as_much_as_replicating_it():
    whole, sharded = (
        computed(Layout("DP 2", dp=2, distributed_optimizer=sharded))[0].bytes["data"]
        for sharded in (False, True)
    )
    assert whole == sharded > 0


def test_the_table_names_the_rank_that_sends_most():
    layout = Layout("PP 2", pp=2)
    formula = computed(layout)
    line = table([Result(layout, formula, formula, 1 / 9)]).splitlines()[-1]
    assert f"{max(rank.total for rank in formula):,.0f}" in line
    assert "| 1.0000 | 11.1% | 11.1% |" in line
