"""A killed run resumes with the same losses, at the same layout and at another."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.helpers.commands import PP2, ROOT, TP2, kill_all, run_command, run_train

ITERATIONS, EVERY = 14, 4


def flags(data_folder, work, layout):
    return (
        *layout,
        *("--dataset-provider", "spoken_questions", "--data-path", str(data_folder)),
        *("--augment", "--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-3"),
        *("--train-iters", str(ITERATIONS), "--save-interval", str(EVERY)),
        *("--save", str(work / "checkpoint"), "--load", str(work / "checkpoint")),
        *("--metrics-file", str(work / "metrics.jsonl")),
    )


def read(work):
    """Iteration -> what its last run said of it."""
    file = work / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["iteration"]: row for row in rows}


@pytest.fixture(scope="module")
def uninterrupted(data_folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("uninterrupted")
    done = run_train(*flags(data_folder, work, TP2), processes=2)
    assert done.returncode == 0, done.stderr
    assert sorted(read(work)) == list(range(1, ITERATIONS + 1))
    return work


def same(resumed, expected, bound):
    for iteration, row in expected.items():
        assert resumed[iteration]["keys"] == row["keys"], iteration
        assert resumed[iteration]["loss"] == pytest.approx(row["loss"], rel=bound), iteration


def test_killed_and_started_again(data_folder, uninterrupted, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "examples/mimo/train.py"), *flags(data_folder, tmp_path, TP2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and len(read(tmp_path)) < EVERY + 2:
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    kill_all(process)
    before = read(tmp_path)
    assert len(before) < ITERATIONS
    done = run_command("train.py", *flags(data_folder, tmp_path, TP2), processes=2)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "metrics.jsonl").read_text()
    iterations = [json.loads(line)["iteration"] for line in text.splitlines()]
    resumed_at = iterations[len(before)]
    assert resumed_at % EVERY == 1
    assert resumed_at > 1, "the run began from nothing"
    same(read(tmp_path), read(uninterrupted), 1e-6)


def test_a_finished_run_ends_at_once(data_folder, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    done = run_train(*flags(data_folder, uninterrupted, TP2), processes=2)
    assert done.returncode == 0, done.stderr
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("layout", [PP2, (*TP2, *PP2), ()], ids=["PP 2", "TP 2 x PP 2", "alone"])
def test_goes_on_at_another_layout(data_folder, uninterrupted, tmp_path, layout):
    shutil.copytree(uninterrupted / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text(str(2 * EVERY))
    processes = 2 ** (len(layout) // 2)
    done = run_train(*flags(data_folder, tmp_path, layout), processes=processes)
    assert done.returncode == 0, done.stderr
    expected = {i: row for i, row in read(uninterrupted).items() if i > 2 * EVERY}
    assert sorted(read(tmp_path)) == sorted(expected)
    same(read(tmp_path), expected, 1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--use-distributed-optimizer",), "saved without the distributed optimizer; drop"),
        (("--train-iters", "20"), "trained on another schedule"),
    ],
)
def test_another_optimizer_or_schedule_is_one_line(
    data_folder, uninterrupted, tmp_path, more, message
):
    load = ("--load", str(uninterrupted / "checkpoint"))
    done = run_train(*flags(data_folder, tmp_path, ()), *load, *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
