import json

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.mimo.data.batch import collate, locate
from examples.mimo.model.parts import freeze_parts
from examples.mimo.training.inputs import MockDataset
from tests.helpers.ranks import run as run_ranks
from tests.helpers.training_flops import training_flops


@pytest.mark.parametrize(
    "frozen",
    [
        (),
        ("language",),
        ("images.encoder", "audios.encoder"),
        ("images.encoder", "audios.encoder", "language"),
    ],
)
@pytest.mark.parametrize("targets_alone", [False, True])
def test_the_count_is_what_runs(tiny, build_model, frozen, targets_alone):
    model = build_model(tiny)
    freeze_parts(model, frozen)
    batch = collate([MockDataset(tiny, 128, 4, seed=0)[i] for i in range(4)])
    assert set(batch.items) == {"images", "audios"}
    targets, positions = None, None
    if targets_alone:
        locate(batch, model.special_token_ids)
        positions = batch.tensors["target_positions"]
        targets = len(positions)
    # The other kernels on CPUs are not known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model(
            batch.input_ids, batch.labels, batch.modality_inputs, target_positions=positions
        )
        losses.sum().backward()
    media_tokens = {
        name: int((batch.input_ids == m.token_id).sum()) for name, m in tiny.inputs.items()
    }
    items = {name: len(files) for name, files in batch.items.items()}
    counted = training_flops(tiny, [batch.seq_length] * 4, items, media_tokens, frozen, targets)
    # The first layer of a trained encoder takes no gradient of its inputs.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_attention_grows_with_the_square(tiny):
    def cost(length):
        return training_flops(tiny, [length], {}, {})

    assert cost(256) > 2 * cost(128)


def test_context_parallel_ranks_share_the_encoders_work(tmp_path):
    counts = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        done = run_ranks("tests/planner/count_encoder_flops.py", str(folder), processes=ranks)
        assert done.returncode == 0, done.stderr
        counts[ranks] = [json.loads(file.read_text()) for file in sorted(folder.iterdir())]
    [alone] = counts[1]
    assert set(alone) == {"images", "audios"}
    assert min(alone.values()) > 0
    for name, flops in alone.items():
        shares = [count[name] for count in counts[2]]
        assert sum(shares) == flops
        # Recordings differ in length.
        assert shares == pytest.approx([flops / 2] * 2, rel=0.02)
