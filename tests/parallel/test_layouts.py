"""`make layouts` compares the same layouts in the same way and writes the table."""

import dataclasses

import pytest

from examples.mimo.training.inputs import MockDataset
from tests.helpers import layouts, outputs
from tests.helpers.mock_variants import TextFirst


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return layouts.References(tmp_path_factory.mktemp("references"))


# `make layouts` runs them all; these hold every mechanism once and run on every change.
ALWAYS = {
    "TP 2",
    "TP 2, sequence parallel",
    "PP 2, 2 virtual stages",
    "PP 2, no layer beside the encoders",
    "PP 4, balanced stages",
    "TP 2 x PP 2",
    "TP 2 x DP 2, distributed optimizer",
    "DP 2, distributed optimizer, overlap",
    "CP 2 x PP 2",
    "TP 2, encoders TP 1",
    "TP 2 x CP 2, encoders TP 1, sequence parallel",
    "non-colocated: encoders 1 + 1, language DP 2, packed",
    "non-colocated: encoders DP 2, language 1",
    "non-colocated: images TP 2, audios 1, language TP 2 x PP 2, sequence parallel",
    "non-colocated, images frozen: language TP 2",
    "full recompute",
    "packed",
    "packed, TP 2 x CP 2, sequence parallel",
    "packed, PP 4",
    "packed, CP 2 x PP 2, 2 virtual stages",
    "encoders ahead, projectors only: TP 2 x PP 2, encoders TP 1",
    "encoders ahead, projectors only, packed: CP 2 x PP 2, 2 virtual stages",
    "description in two messages: TP 2",
    "lengths rounded: TP 2, sequence parallel",
    "loss in pieces: TP 2 x PP 2, sequence parallel",
    "text first: DP 2, overlap",
    "text first: TP 2, encoders TP 1",
    "text first, non-colocated: encoders DP 2, language DP 2, overlap",
    "tied embeddings: PP 2 x DP 2, distributed optimizer, overlap",
    "tied embeddings: PP 4",
    "tied embeddings, language frozen: PP 4, distributed optimizer",
    "tied embeddings, layers frozen: PP 2",
    "tied embeddings, embedding frozen: PP 4",
    "projectors only, PP 2",
    "projectors only, TP 2 x PP 2",
    "bf16, TP 2, sequence parallel",
    "bf16, DP 2, distributed optimizer, overlap",
}
assert {layout.name for layout in layouts.LAYOUTS} >= ALWAYS, "a layout that is not run"
CASES = [
    pytest.param(layout, id=layout.name, marks=() if layout.name in ALWAYS else pytest.mark.slow)
    for layout in layouts.LAYOUTS
]


@pytest.mark.parametrize("layout", CASES)
def test_a_layout_computes_what_one_process_computes(layout, references, tmp_path):
    difference = references.difference(layout, tmp_path)
    assert difference.within_bounds(layout.bf16), difference


# The same of a model that answers aloud: its codes are tokens of the language model.
OUTPUTS = ("--model-provider", outputs.SPEECH)
WITH_OUTPUTS = (
    "TP 2, sequence parallel",
    "PP 2, 2 virtual stages",
    "CP 2 x PP 2",
    "packed",
    "packed, TP 2 x CP 2, sequence parallel",
    "non-colocated: encoders 1 + 1, language DP 2, packed",
)


@pytest.mark.parametrize("name", WITH_OUTPUTS)
def test_a_layout_computes_the_same_of_outputs(name, references, tmp_path):
    layout = next(layout for layout in layouts.LAYOUTS if layout.name == name)
    difference = references.difference(dataclasses.replace(layout, model=OUTPUTS), tmp_path)
    assert difference.within_bounds(bf16=False), difference


def test_the_batches_with_outputs_hold_codes_that_are_targets(references):
    config = outputs.with_speech()
    samples = [MockDataset(config, 128, 80, seed=11)[i] for i in range(80)]
    assert 10 < sum(bool(sample.outputs) for sample in samples) < 70
    gradient = references.run(model=OUTPUTS).gradients["language_model.output_layer.weight"]
    speech = config.outputs["speech"]
    assert gradient.shape[0] == config.vocab_size
    assert all(row.norm() > 0 for row in gradient[speech.begin_id : speech.ids.stop])


def test_the_comparison_sees_every_parameter_layer_and_loss(references, tiny, build_model):
    one = references.run()
    layers = {name.split(".layers.")[1].split(".")[0] for name in one.gradients if "layers" in name}
    assert layers == {"0", "1", "2", "3"}
    assert len(one.gradients) == len(list(build_model(tiny).parameters()))
    assert all(gradient.norm() > 0 for gradient in one.gradients.values())
    assert len(set(one.losses)) == layouts.ITERATIONS


def test_only_the_projectors_have_optimizer_state(references):
    gradients = references.run(layouts.PROJECTORS_ONLY).gradients
    assert len(gradients) == 2 * 4
    assert all("input_projections" in name for name in gradients)


def test_the_batches_mix_samples_with_and_without_media(tiny):
    kinds = {tuple(sorted(MockDataset(tiny, 128, 80, seed=11)[i].media)) for i in range(80)}
    assert kinds == {(), ("images",), ("audios",), ("audios", "images")}


def test_of_every_four_samples_the_first_two_are_text_alone(tiny):
    samples = [TextFirst(tiny, 128, 80, seed=11)[i] for i in range(80)]
    assert [bool(sample.media) for sample in samples] == [False, False, True, True] * 20
    assert {name for sample in samples for name in sample.media} == set(tiny.inputs)
    assert len({sample.key for sample in samples}) > 20
