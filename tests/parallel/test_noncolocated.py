"""Non-colocated encoders: what the table of layouts does not compare."""

import json

import pytest
import torch

from examples.mimo.data.batch import Placeholders, collate, collate_packed
from examples.mimo.parallel.context import share_of
from examples.mimo.parallel.placement import Placement, take_share
from examples.mimo.training import layout
from examples.mimo.training.inputs import MockDataset
from tests.helpers import layouts
from tests.helpers.commands import run_train

EVALUATE = ("--train-iters", "1", "--lr", "0", "--eval-interval", "1", "--eval-iters", "3")
LAYOUTS = {
    "one process": layouts.ONE,
    "encoders serve two replicas": layouts.Layout("", 6, layouts.NONCOLOCATED + layouts.PP2),
    "encoder replicas share a batch": layouts.Layout("", 6, layouts.NONCOLOCATED_DP2 + layouts.TP2),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return layouts.start_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def scores(start, tmp_path_factory):
    """A function from a layout's name to its held-out scores."""
    folder = tmp_path_factory.mktemp("scores")

    def score(name):
        run, file = LAYOUTS[name], folder / name
        load = ("--load", str(start), "--finetune", "--metrics-file", str(file))
        flags = (*layouts.COMMON, *run.flags, *EVALUATE, *load)
        done = run_train(*flags, processes=run.processes)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        return next(row["validation"] for row in rows if "validation" in row)

    return score


def test_held_out_scores_equal_those_of_one_process(scores):
    expected = scores("one process")
    assert expected["lm loss"] > 0
    for name in ("encoders serve two replicas", "encoder replicas share a batch"):
        assert scores(name) == pytest.approx(expected, rel=1e-6)


def test_shares_are_all_items_once_and_nearly_equal():
    for count in range(9):
        shares = [range(count)[share_of(count, number, 3)] for number in range(3)]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shares_of_a_batch_split_its_media_and_keep_its_text(tiny):
    batch = collate([MockDataset(tiny, 128, 8, seed=0)[i] for i in range(8)])
    parts = [take_share(batch, number, 2) for number in range(2)]
    for name, inputs in batch.modality_inputs.items():
        for key, whole in inputs.items():
            halves = [part.modality_inputs[name][key] for part in parts]
            assert torch.equal(torch.cat(halves), whole)
    assert all(torch.equal(part.input_ids, batch.input_ids) for part in parts)


def test_embeddings_are_counted_by_sample_packed_or_not(tiny):
    samples = [MockDataset(tiny, 128, 6, seed=0)[i] for i in range(6)]
    for name, modality in tiny.inputs.items():
        expected = [sample.tokens.ids.count(modality.token_id) for sample in samples]
        assert sum(expected) > 0
        for batch in (collate(samples), collate_packed(samples)):
            places = Placeholders.of(batch.input_ids, {name: modality.token_id}, batch.cu_seqlens)
            assert places.counts == {name: expected}
            ids = batch.input_ids.t().flatten()[places.positions]
            assert ids.tolist() == [modality.token_id] * sum(expected)


def test_a_placement_counts_its_data_parallel_replicas():
    placement = Placement("language", range(4, 16), tp=2, cp=1, pp=3)
    assert placement.dp == 2


@pytest.mark.parametrize(
    ("rank", "size", "language_dp", "expected"),
    [
        (1, 4, 4, (range(1, 2), 0, 1)),
        (0, 1, 4, (range(4), 0, 1)),
        (1, 2, 4, (range(2, 4), 0, 1)),
        (1, 2, 1, (range(1), 1, 2)),
        (3, 4, 2, (range(1, 2), 1, 2)),
    ],
)
def test_what_a_data_parallel_rank_reads(monkeypatch, rank, size, language_dp, expected):
    monkeypatch.setattr(layout.mpu, "get_data_parallel_rank", lambda: rank)
    monkeypatch.setattr(layout.mpu, "get_data_parallel_world_size", lambda: size)
    assert layout.data_share(language_dp) == layout.DataShare(*expected)
