"""Frozen towers and language model: the last stage has nothing to train, and nothing changes."""

import pytest

from benchmarks import layouts
from benchmarks.layouts import PP2, TP2, Layout

FREEZE = ("--freeze", "images.encoder", "audios.encoder", "language")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    work = tmp_path_factory.mktemp("frozen")
    start = layouts.start_checkpoint(work / "start")
    return start, layouts.measure(Layout("one process", 1, FREEZE), start, work / "one")


def test_only_the_projectors_have_optimizer_state(reference):
    gradients = reference[1].gradients
    assert len(gradients) == 2 * 4
    assert all("input_projections" in name for name in gradients)


@pytest.mark.parametrize("flags", [PP2, (*TP2, *PP2)], ids=["PP 2", "TP 2 x PP 2"])
def test_a_stage_without_anything_to_train(reference, tmp_path, flags):
    start, one = reference
    processes = 2 ** (len(flags) // 2)
    run = layouts.measure(Layout("frozen", processes, (*flags, *FREEZE)), start, tmp_path)
    found = layouts.compare(run, one)
    assert found.first_loss <= layouts.FIRST_LOSS_BOUND
    assert found.gradient <= layouts.GRADIENT_BOUND
    assert found.ten_losses <= layouts.TEN_LOSSES_BOUND
