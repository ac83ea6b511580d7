"""`make layouts` compares the same layouts in the same way and writes the table."""

import pytest

from benchmarks import layouts
from examples.mimo.data.datasets import MockDataset


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    work = tmp_path_factory.mktemp("layouts")
    start = layouts.start_checkpoint(work / "start")
    return start, layouts.measure(layouts.ONE, start, work / "one")


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_computes_what_one_process_computes(layout, reference, tmp_path):
    start, one = reference
    found = layouts.compare(layouts.measure(layout, start, tmp_path), one)
    assert found.first_loss <= layouts.FIRST_LOSS_BOUND
    assert found.gradient <= layouts.GRADIENT_BOUND, found.worst_parameter
    assert found.ten_losses <= layouts.TEN_LOSSES_BOUND


def test_the_comparison_sees_every_parameter_layer_and_loss(reference, tiny, build_model):
    one = reference[1]
    layers = {name.split(".layers.")[1].split(".")[0] for name in one.gradients if "layers" in name}
    assert layers == {"0", "1", "2", "3"}
    assert len(one.gradients) == len(list(build_model(tiny).parameters()))
    assert all(gradient.norm() > 0 for gradient in one.gradients.values())
    assert len(set(one.losses)) == layouts.ITERATIONS


def test_the_batches_mix_samples_with_and_without_media(tiny):
    found = {tuple(sorted(MockDataset(tiny, 128, 80, seed=11)[i].media)) for i in range(80)}
    assert found == {(), ("images",), ("audios",), ("audios", "images")}
