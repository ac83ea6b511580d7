"""Ranks whose samples and hash seeds differ meet in the same collectives in the same order.

Mock samples in micro-batches of one differ the most between ranks: one has pictures, the other
recordings, or neither. Ranks have a hash seed each (tests/helpers/ranks.py), here as in all other
tests that launch several.
"""

import json
import subprocess
from pathlib import Path

import pytest

from examples.mimo.training.inputs import MockDataset
from tests.helpers import ranks
from tests.helpers.commands import TP2, run_command, run_train

ITERATIONS = 4
COMMON = (
    *("--model-provider", "tiny_avlm", "--dataset-provider", "mock", "--micro-batch-size", "1"),
    *("--global-batch-size", "8", "--lr", "1e-3", "--clip-grad", "0"),
    *("--train-iters", str(ITERATIONS)),
)
OVERLAP = ("--overlap-grad-reduce",)
OVERLAP_ALL = ("--use-distributed-optimizer", *OVERLAP, "--overlap-param-gather")
BOUND = 1e-5
DATA = {
    "mock": (),
    "mock, a worker": ("--num-workers", "1"),
    "energon": ("--dataset-provider", "energon"),
    "energon, a worker": ("--dataset-provider", "energon", "--num-workers", "1"),
}


def numbers(done: subprocess.CompletedProcess, metrics: Path) -> list[float]:
    """The losses and the gradient norms of a run that went to its end."""
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == ITERATIONS
    return [row[name] for name in ("loss", "grad_norm") for row in rows]


@pytest.fixture(scope="module")
def spoken_shards(data_folder, tmp_path_factory):
    pytest.importorskip("megatron.energon")
    output = tmp_path_factory.mktemp("shards") / "out"
    manifest = str(data_folder / "train.jsonl")
    done = run_command(
        "prepare_data.py", "webdataset", "--manifest", manifest, "--output", str(output)
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A function from a seed to the numbers of one process."""
    folder = tmp_path_factory.mktemp("one")
    known: dict[int, list[float]] = {}

    def reference(seed: int) -> list[float]:
        if seed not in known:
            metrics = folder / f"{seed}.jsonl"
            flags = ("--seed", str(seed), "--metrics-file", str(metrics))
            known[seed] = numbers(run_train(*COMMON, *flags), metrics)
        return known[seed]

    return reference


def test_every_rank_has_a_hash_seed_and_an_order_of_sets_of_its_own(tiny):
    done = ranks.run("tests/helpers/set_order.py", *tiny.inputs, processes=4)
    assert done.returncode == 0, done.stderr
    orders, hashes = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    assert len(set(hashes)) == 4
    assert len(set(map(tuple, orders))) == 2
    # The tests below launch two ranks.
    two = ranks.run("tests/helpers/set_order.py", *tiny.inputs, processes=2).stdout
    assert len({tuple(json.loads(line)[0]) for line in two.splitlines()}) == 2


def test_the_samples_are_those_that_tell_orders_apart(tiny):
    kinds = [tuple(MockDataset(tiny, 128, 32, seed=19)[i].media) for i in range(32)]
    assert {(), ("images",), ("audios",), ("images", "audios")} <= set(kinds)


@pytest.mark.parametrize(
    ("seed", "layout"),
    [
        (19, TP2),
        (11, (*OVERLAP, "--ddp-bucket-size", "20000")),
        (11, (*OVERLAP, "--ddp-bucket-size", "100000")),
        (11, (*OVERLAP, "--ddp-bucket-size", "400000")),
        (11, (*OVERLAP_ALL, "--ddp-bucket-size", "20000")),
        (11, (*OVERLAP_ALL, "--ddp-bucket-size", "400000")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_two_ranks_compute_what_one_process_computes(seed, layout, together, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    flags = (*COMMON, "--seed", str(seed), *layout, "--metrics-file", str(metrics))
    assert numbers(run_train(*flags, processes=2), metrics) == pytest.approx(
        together(seed), rel=BOUND
    )


@pytest.mark.parametrize("data", DATA)
def test_ranks_that_read_and_ranks_that_do_not_drop_out_alike(data, spoken_shards, tmp_path):
    """Else the copies of a norm on tensor-parallel ranks part, which the script looks at."""
    source = (*DATA[data], *(("--data-path", str(spoken_shards)) if "energon" in data else ()))
    flags = (*COMMON, *TP2, *source, "--hidden-dropout", "0.1", "--seed", "11")
    save = ("--save", str(tmp_path), "--save-interval", "1")
    done = ranks.run("tests/helpers/measured_train.py", *flags, *save, processes=2)
    assert done.returncode == 0, done.stderr
