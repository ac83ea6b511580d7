"""One rank stops: the others end soon, and say where they were."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers.commands import PP2, ROOT, run_command

# Far below the ten minutes after which a rank that waits for another gives up.
PATIENCE_SECONDS = 120
# Ranks that are between two iterations exchange what the terminal shows.
WHERE = r"in: (iteration \d+, (computing|reading a batch)|after iteration \d+)"
# Processes and flags; rank 1 is killed.
LAYOUTS = {
    "TP 2": (2, ("--tensor-model-parallel-size", "2")),
    "PP 2": (2, PP2),
    "non-colocated encoders": (3, ("--encoder-ranks", "images=0", "audios=1")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_ends_the_others_with_rank_and_phase(layout, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    processes, flags = LAYOUTS[layout]
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
    said = [line for line in text.splitlines() if line.startswith("train.py [rank ")]
    assert sorted(line[15] for line in said) == [r for r in "012"[:processes] if r != "1"], text
    for line in said:
        assert re.search(WHERE, line), said
    assert re.search(r"rank +: 1 ", text), text
    assert "SIGKILL" in text


def test_an_error_on_one_stage_ends_the_other():
    flags = ("--lr", "1e30", "--train-iters", "4", "--global-batch-size", "8", *PP2)
    done = run_command("train.py", *flags, processes=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py [rank ")]
    assert any(
        line.startswith("train.py [rank 1]: error: the loss of iteration 2") for line in said
    )
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
