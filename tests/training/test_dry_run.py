"""`--dry-run` and `--balance-stages`, against what runs hold and do."""

import json
import re

import pytest

from benchmarks import ranks
from tests.conftest import run_command

TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")
SHARDED = ("--use-distributed-optimizer",)
LAYOUTS = {
    "one process": (1, ()),
    "TP 2": (2, TP2),
    "PP 2": (2, PP2),
    "PP 2, 2 virtual stages": (2, (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")),
    "DP 2, distributed optimizer": (2, SHARDED),
    "CP 2, distributed optimizer, bf16": (2, ("--context-parallel-size", "2", *SHARDED, "--bf16")),
    "TP 2 x PP 2, bf16": (4, (*TP2, *PP2, "--bf16")),
    "PP 2, balanced, frozen encoders": (
        2,
        (*PP2, "--balance-stages", "--freeze", "images.encoder", "audios.encoder"),
    ),
}
ALWAYS = {"CP 2, distributed optimizer, bf16", "PP 2, balanced, frozen encoders"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in LAYOUTS]
)
def test_predicted_bytes_are_those_that_ranks_hold(name, tmp_path):
    processes, flags = LAYOUTS[name]
    script = "tests/training/measure_memory.py"
    flags = (str(tmp_path), "--train-iters", "2", "--global-batch-size", "8", *flags)
    done = ranks.run(script, *flags, processes=processes)
    assert done.returncode == 0, done.stderr
    pairs_of_ranks = [
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)
    ]
    for pairs in pairs_of_ranks:
        for predicted, measured in pairs.values():
            assert predicted == pytest.approx(measured, rel=0.02)
    assert all(pair[1] > 0 for pair in pairs_of_ranks[0].values())


def test_a_cluster_is_planned_from_one_process():
    done = run_command(
        *("train.py", "--dry-run", "512", "--model-provider", "qwen3_avlm", "--bf16"),
        *("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4"),
        *("--sequence-parallel", "--global-batch-size", "1024", "--micro-batch-size", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("qwen3_avlm: TP 4 x PP 4 x DP 32 + sequence parallel on 512 proc")
    assert re.search(r"^  language +frozen +8,190,735,360 ", done.stdout, re.MULTILINE)
    assert re.search(r"^  3 +384-511 +1,124\.9 ", done.stdout, re.MULTILINE)
    assert "layers by stage 9, 9, 9, 9; 32 micro-batches" in done.stdout
    drawn = [line for line in done.stdout.splitlines() if re.match(r" +\d [0-9a-z.]{96}$", line)]
    assert len(drawn) == 4
    assert done.stderr == ""


def test_balanced_stages_wait_less():
    flags = ("train.py", "--dry-run", "2", *PP2, "--global-batch-size", "64")
    flags += ("--num-layers", "8", "--set", "images.encoder.num_layers=12")
    bubbles, layers = [], []
    for extra in ((), ("--balance-stages",)):
        text = run_command(*flags, *extra).stdout
        found = re.search(r"layers by stage (\d), (\d); .* bubble of (\d+) %", text)
        layers.append(tuple(map(int, found.groups()[:2])))
        bubbles.append(int(found[3]))
    assert layers[0] == (4, 4)
    assert layers[1] == (3, 5)
    assert bubbles[1] < bubbles[0] / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dry-run", "3", *TP2), "3 processes cannot hold"),
        (("--dry-run", "0"), "--dry-run 0: say a number of processes"),
        (("--dry-run", "2", "--balance-stages"), "--balance-stages needs --pipeline"),
        (
            ("--dry-run", "2", *PP2, "--balance-stages", "--decoder-first-pipeline-num-layers=1"),
            "both choose the split",
        ),
    ],
)
def test_a_plan_that_cannot_run_says_why(flags, message):
    done = run_command("train.py", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
