"""Runs that are killed, at random, within a save, and between two layouts, compute the same.

So does one that a scheduler ends with a signal, and no process of it stays.
"""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers import kills
from tests.helpers.commands import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("table", kills.TABLES, ids=lambda table: table.__name__)
def test_killed_runs_go_on_as_if_nothing_happened(data_folder, tmp_path, table):
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    result = table(data_folder, tmp_path)
    assert result.kills >= 10
    assert result.exact >= result.kills
    assert result.largest <= result.bound
    assert result.recomputed > 0


def begin(run, *flags):
    """The run in a session of its own, with two readers of data, after its third iteration."""
    command = [sys.executable, str(ROOT / "examples/mimo/train.py"), *run.flags]
    process = subprocess.Popen(
        [*command, "--num-workers", "2", *flags], cwd=ROOT, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(run.rows()) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_and_ends_the_run(data_folder, tmp_path):
    for folder in ("whole", "ended"):
        (tmp_path / folder).mkdir()
    workers = ("--num-workers", "2")
    whole = kills.KilledRun(data_folder, tmp_path / "whole", 30, 1000)
    whole.start(1, workers)
    run = kills.KilledRun(data_folder, tmp_path / "ended", 30, 1000)
    process = begin(run, "--exit-signal-handler")
    os.killpg(process.pid, signal.SIGTERM)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert "rror" not in errors
    ended = len(run.rows())
    assert 3 <= ended == run.saved() < 30
    run.start(1, workers)
    assert len(run.rows()) == 30
    for row, expected in zip(run.rows(), whole.rows(), strict=True):
        assert (row["keys"], row["loss"]) == (expected["keys"], expected["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_of_a_run_outlives_it(data_folder, tmp_path, number):
    process = begin(kills.KilledRun(data_folder, tmp_path, 10_000, 10_000))
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) >= 3
    process.send_signal(number)
    process.communicate(timeout=60)
    assert not psutil.wait_procs(below, timeout=60)[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_the_preparation_of_shards(data_folder, tmp_path, number):
    pytest.importorskip("megatron.energon")
    command = [sys.executable, str(ROOT / "examples/mimo/prepare_data.py"), "webdataset"]
    command += ["--manifest", str(data_folder / "train.jsonl"), "--shard-samples", "5"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out"), "--num-workers", "2"], cwd=ROOT,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while not list(tmp_path.glob(".out.draft/*.tar")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 2
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not psutil.wait_procs(below, timeout=60)[1]
