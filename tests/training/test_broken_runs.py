"""One rank stops: the others end soon, and say where they were."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers import ranks
from tests.helpers.commands import PP2, ROOT

# Far below the ten minutes after which a rank that waits for another gives up.
PATIENCE_SECONDS = 120
# Ranks that are between two iterations exchange what the terminal shows.
WHERE = r"in: (iteration \d+, (computing|reading a batch)|after iteration \d+)"
FAILING_RANK = "tests/helpers/failing_rank.py"
SIGNALLED_RANK = "tests/helpers/signalled_rank.py"
# Two samples an iteration.
ONE_EACH = ("--micro-batch-size", "1", "--global-batch-size", "2")
# Where rank 1 works on samples that another rank reads too.
OTHER_SAMPLES = {
    "PP 2": (2, PP2),
    "CP 2": (2, ("--context-parallel-size", "2")),
    "non-colocated": (3, ("--encoder-ranks", "images=0", "audios=1")),
    "encoder replicas share a batch": (4, ("--encoder-ranks", "images=0-1", "audios=2")),
}
# Processes and flags; rank 1 is killed.
LAYOUTS = {
    "TP 2": (2, ("--tensor-model-parallel-size", "2")),
    "PP 2": (2, PP2),
    "non-colocated encoders": (3, ("--encoder-ranks", "images=0", "audios=1")),
}


def assert_others_ended(text, processes):
    """All ranks but rank 1, each with one line that says where it was."""
    said = [line for line in text.splitlines() if line.startswith("train.py [rank ")]
    assert sorted(line[15] for line in said) == [r for r in "012"[:processes] if r != "1"], text
    for line in said:
        assert re.search(WHERE, line), said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_ends_the_others_with_rank_and_phase(layout, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    processes, flags = LAYOUTS[layout]
    flags = ("--train-iters", "10000", *flags, "--metrics-file", str(metrics))
    launched = ranks.Launched("examples/mimo/train.py", *flags, processes=processes)
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert launched.poll() is None, launched.said()
        time.sleep(0.1)
    launched.processes[1].kill()
    # Ranks that notice it by themselves come first; the launcher would end them next.
    time.sleep(1)
    assert launched.wait(PATIENCE_SECONDS)
    assert launched.processes[1].returncode == -signal.SIGKILL
    assert_others_ended(launched.said()[1], processes)


def test_torchrun_names_a_killed_rank_and_leaves_none_behind(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    processes, flags = LAYOUTS["TP 2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(processes), str(ROOT / "examples/mimo/train.py")]
    launch += ["--train-iters", "10000", *flags]
    launcher = subprocess.Popen(
        [*launch, "--metrics-file", str(metrics)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.1)
    workers = psutil.Process(launcher.pid).children()
    victim = next(w for w in workers if w.environ()["RANK"] == "1")
    victim.send_signal(signal.SIGKILL)
    text = launcher.communicate(timeout=PATIENCE_SECONDS)[1]
    assert not any(worker.is_running() for worker in workers)
    assert_others_ended(text, processes)
    assert re.search(r"rank +: 1 ", text), text
    assert "SIGKILL" in text


@pytest.mark.parametrize("error", ["OSError", "KeyError"])
@pytest.mark.parametrize("layout", [(), PP2], ids=["DP 2", "PP 2"])
def test_any_error_of_one_rank_ends_the_others_at_once(error, layout):
    flags = (error, "--train-iters", "100", *ONE_EACH, *layout)
    done = ranks.run(FAILING_RANK, *flags, processes=2)
    assert done.returncode == 1
    assert f"{error}: {'the disk is gone'!r}".replace("'", "") in done.stderr.replace("'", "")
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py [rank ")]
    assert [line[15] for line in said] == ["0"], done.stderr


@pytest.mark.parametrize("error", ["ValueError", "KeyError"])
@pytest.mark.parametrize("seconds", ["0.1", "1"], ids=["error first", "signal first"])
def test_a_rank_that_meets_an_error_as_it_is_ended_says_one_of_the_two(error, seconds):
    done = ranks.run(SIGNALLED_RANK, seconds, error)
    ended = [line for line in done.stderr.splitlines() if "ended from outside in: " in line]
    errors = re.findall(r"^(?:KeyError|.*\berror): '?the disk is gone", done.stderr, re.M)
    said, unsaid, status = (ended, errors, 128 + signal.SIGTERM)
    if seconds == "0.1":
        said, unsaid, status = (errors, ended, 2 if error == "ValueError" else 1)
    assert (len(said), len(unsaid), done.returncode) == (1, 0, status), done.stderr


@pytest.mark.parametrize("error", ["OutOfMemoryError", "MemoryError"])
def test_a_rank_without_memory_is_one_line_that_says_what_to_lower(error):
    flags = (error, "--train-iters", "100", *ONE_EACH)
    done = ranks.run(FAILING_RANK, *flags, processes=2)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("train.py [rank 1]: error: ")
    assert "lower --micro-batch-size, add --recompute-granularity full" in said[0]
    assert re.search(WHERE, said[0])


@pytest.mark.parametrize("layout", OTHER_SAMPLES)
def test_ranks_that_read_other_samples_than_they_must_end_the_run(layout):
    processes, flags = OTHER_SAMPLES[layout]
    done = ranks.run(FAILING_RANK, "other", *ONE_EACH, *flags, processes=processes)
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py [rank ")]
    assert any("error: iteration 3: ranks that must read the same samples" in s for s in said), said


@pytest.mark.parametrize("layout", [(), PP2], ids=["DP 2", "PP 2"])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(layout, tmp_path):
    """The rank that knows the loss names the samples; nothing of the iteration is kept."""
    metrics = tmp_path / "metrics.jsonl"
    flags = (
        "--train-iters",
        "4",
        "--lr",
        "1e30",
        "--min-lr",
        "1e30",
        "--metrics-file",
        str(metrics),
    )
    done = ranks.run("examples/mimo/train.py", *flags, *ONE_EACH, *layout, processes=2)
    assert done.returncode == 2
    assert metrics.read_text().count("\n") == 1
    pattern = (
        r"train.py \[rank \d\]: error: the loss of iteration 2 is (nan|inf); its samples are mock-"
    )
    assert re.search(pattern, done.stderr)
    assert "Traceback" not in done.stderr
