"""What a plan counts for a rank, against counts by hand."""

import pytest

from examples.mimo.cli.arguments import parse_arguments
from examples.mimo.planner.flops import Workload, language_layer_flops, model_cost
from examples.mimo.training.layout import run_shape

WORK = Workload(
    batch_size=2,
    seq_length=100,
    inputs={"images": 4, "audios": 4},
    media_tokens={"images": 64, "audios": 40},
)
NONCOLOCATED = ("--encoder-ranks", "images=0", "audios=1")


@pytest.fixture
def count(monkeypatch):
    def counted(processes, *flags):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        args, config = parse_arguments(flags)
        return model_cost(config, run_shape(args), WORK)

    return counted


def test_a_layers_attention_skips_what_the_mask_hides(count, tiny):
    whole = language_layer_flops(tiny.language, WORK.seq_length)
    expected = WORK.batch_size * (whole.weights + whole.attention / 2)
    assert count(1).layer.forward == expected
    assert count(1).layer.both == 3 * expected
    assert count(2, "--context-parallel-size", "2").layer.forward == expected / 2


def test_noncolocated_encoders_run_ahead_of_the_first_stage(count):
    shared, own = count(1), count(3, *NONCOLOCATED)
    assert shared.ahead == {}
    assert own.first.both == 0
    assert sum(cost.both for cost in own.ahead.values()) == pytest.approx(shared.first.both)
    slowest = max(cost.both for cost in own.ahead.values())
    first, *others = own.chunks((1, 1))
    assert first.both == slowest
    assert len(others) == len(shared.chunks((1, 1)))


def test_encoder_replicas_share_the_work_of_language_model_replicas(count):
    encoder = count(3, *NONCOLOCATED).ahead["images"].both
    two_language_models = count(4, *NONCOLOCATED).ahead["images"].both
    two_encoders = count(4, "--encoder-ranks", "images=0-1", "audios=2").ahead["images"].both
    assert two_language_models == pytest.approx(2 * encoder)
    assert two_encoders == pytest.approx(encoder / 2)
