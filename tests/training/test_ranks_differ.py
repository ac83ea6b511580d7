"""Ranks whose samples and hash seeds differ meet in the same collectives in the same order.

Ranks that are forked from one process share its hash seed, and mock samples in micro-batches of
one differ the most between ranks: one has pictures, the other recordings, or neither.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.mimo.data.datasets import MockDataset
from tests.helpers import ranks
from tests.helpers.commands import TP2, run_train

TRAIN = "examples/mimo/train.py"
ITERATIONS = 4
COMMON = (
    *("--model-provider", "tiny_avlm", "--dataset-provider", "mock", "--micro-batch-size", "1"),
    *("--global-batch-size", "8", "--lr", "1e-3", "--clip-grad", "0"),
    *("--train-iters", str(ITERATIONS)),
)
# A set of the names of two modalities has one order under the first and the other under the second.
HASH_SEEDS = (0, 1)
OVERLAP = ("--overlap-grad-reduce",)
OVERLAP_ALL = ("--use-distributed-optimizer", *OVERLAP, "--overlap-param-gather")
BOUND = 1e-5


def numbers(done: subprocess.CompletedProcess, metrics: Path) -> list[float]:
    """The losses and the gradient norms of a run that went to its end."""
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == ITERATIONS
    return [row[name] for name in ("loss", "grad_norm") for row in rows]


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


def test_the_hash_seeds_order_a_set_of_the_modalities_differently(tiny):
    names = sorted(tiny.modalities)
    code = f"import sys; sys.stdout.write(' '.join({{*{names!r}}}))"
    orders = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in HASH_SEEDS
    }
    assert len(orders) == len(HASH_SEEDS)


def test_the_samples_are_those_that_tell_orders_apart(tiny):
    kinds = [tuple(MockDataset(tiny, 128, 32, seed=19)[i].media) for i in range(32)]
    assert {(), ("images",), ("audios",), ("images", "audios")} <= set(kinds)


def test_tensor_parallel_ranks_with_hash_seeds_of_their_own(together, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    flags = (*COMMON, "--seed", "19", *TP2, "--metrics-file", str(metrics))
    done = ranks.run_apart(TRAIN, *flags, hash_seeds=HASH_SEEDS)
    assert numbers(done, metrics) == pytest.approx(together(19), rel=BOUND)


def test_data_parallel_ranks_with_hash_seeds_of_their_own_and_small_buckets(together, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    flags = (*COMMON, "--seed", "11", *OVERLAP, "--ddp-bucket-size", "100000")
    done = ranks.run_apart(TRAIN, *flags, "--metrics-file", str(metrics), hash_seeds=HASH_SEEDS)
    assert numbers(done, metrics) == pytest.approx(together(11), rel=BOUND)


@pytest.mark.parametrize("overlap", [OVERLAP, OVERLAP_ALL], ids=["gradients", "and weights"])
@pytest.mark.parametrize("bucket_size", ["20000", "400000"])
def test_gradients_of_small_buckets_are_reduced_in_one_order(
    overlap, bucket_size, together, tmp_path
):
    metrics = tmp_path / "metrics.jsonl"
    flags = (*COMMON, "--seed", "11", *overlap, "--ddp-bucket-size", bucket_size)
    done = run_train(*flags, "--metrics-file", str(metrics), processes=2)
    assert numbers(done, metrics) == pytest.approx(together(11), rel=BOUND)
