import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check
from tests.helpers.commands import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_it_says_so_and_ends_with_status_2():
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "gpu_check.py: no CUDA device here; run it on a machine with one\n"


def test_the_flops_of_a_run_match_what_the_run_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ITERATIONS", 3)
    case = gpu_check.Case("tiny_avlm", 4, frozen=("images.encoder",))
    rows = gpu_check.train(case, tmp_path)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    flops = gpu_check.iteration_flops(case, 3)
    # The slots of a row times the language model's weights are a lower bound.
    for row, counted in zip(rows, flops, strict=True):
        assert counted > 6 * row["slots"] * 700_000
    assert gpu_check.generate_in_new_process(tmp_path / "checkpoint")["tokens_per_second"] > 0
