"""`--dry-run` and `--balance-stages`, against what runs hold and do."""

import json
import re

import pytest

from tests.helpers import ranks
from tests.helpers.commands import PP2, TP2, run_train

SHARDED = ("--use-distributed-optimizer",)
LAYOUTS = {
    "one process": (1, ()),
    "TP 2": (2, TP2),
    "PP 2": (2, PP2),
    "PP 2, 2 virtual stages": (2, (*PP2, "--num-layers-per-virtual-pipeline-stage", "1")),
    "DP 2, distributed optimizer": (2, SHARDED),
    "CP 2, distributed optimizer, bf16": (2, ("--context-parallel-size", "2", *SHARDED, "--bf16")),
    "TP 2 x PP 2, bf16": (4, (*TP2, *PP2, "--bf16")),
    "non-colocated, distributed optimizer, bf16": (
        5,
        (
            *("--encoder-ranks", "images=0-1", "audios=2", *PP2, *SHARDED, "--bf16"),
            *("--freeze", "audios.encoder"),
        ),
    ),
    "PP 2, balanced, frozen encoders": (
        2,
        (*PP2, "--balance-stages", "--freeze", "images.encoder", "audios.encoder"),
    ),
}
ALWAYS = {
    "CP 2, distributed optimizer, bf16",
    "PP 2, balanced, frozen encoders",
    "non-colocated, distributed optimizer, bf16",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow) for n in LAYOUTS]
)
def test_predicted_bytes_are_those_that_ranks_hold(name, tmp_path):
    processes, flags = LAYOUTS[name]
    script = "tests/planner/measure_memory.py"
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
    done = run_train(
        *("--dry-run", "512", "--model-provider", "qwen3_avlm", "--bf16"),
        *("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4"),
        *("--sequence-parallel", "--global-batch-size", "1024", "--micro-batch-size", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("qwen3_avlm: TP 4 x PP 4 x DP 32 + sequence parallel on 512 proc")
    assert re.search(r"^  language +frozen +8,190,735,360 ", done.stdout, re.MULTILINE)
    assert re.search(r"^  stage 3 +384-511 +1,124\.9 ", done.stdout, re.MULTILINE)
    assert "layers by stage 9, 9, 9, 9; 32 micro-batches" in done.stdout
    assert len(drawn_rows(done.stdout)) == 4
    assert done.stderr == ""


def drawn_rows(text):
    result = (re.match(r" +(\S+) [0-9a-z.]{96}$", line) for line in text.splitlines())
    return [match[1] for match in result if match]


def test_noncolocated_encoders_are_planned():
    done = run_train(
        *("--dry-run", "160", "--model-provider", "llava_avlm_tuned", "--bf16"),
        *("--encoder-ranks", "images=0-15", "audios=16-31"),
        *("--encoder-tensor-model-parallel-size", "images=2"),
        *("--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4"),
        *("--use-distributed-optimizer", "--global-batch-size", "256", "--micro-batch-size", "1"),
    )
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith(
        "llava_avlm_tuned: TP 4 x PP 4 x DP 8 + distributed optimizer on ranks 32-159; "
        "images TP 2 x DP 8 on ranks 0-15; audios DP 16 on ranks 16-31; on 160 processes"
    )
    held = {line.split("  ")[1]: line.split()[-6:] for line in lines if re.search(r"\d-\d", line)}
    assert list(held) == ["images", "audios", "stage 0", "stage 1", "stage 2", "stage 3"]
    assert [row[0] for row in held.values()][:3] == ["0-15", "16-31", "32-63"]
    assert drawn_rows(done.stdout) == ["encoders", "0", "1", "2", "3"]
    assert "layers by stage 8, 8, 8, 8; 32 micro-batches" in done.stdout


def test_balanced_stages_wait_less():
    flags = ("--dry-run", "2", *PP2, "--global-batch-size", "64")
    flags += ("--num-layers", "8", "--set", "images.encoder.num_layers=16")
    bubbles, layers = [], []
    for extra in ((), ("--balance-stages",)):
        text = run_train(*flags, *extra).stdout
        result = re.search(r"layers by stage (\d), (\d); .* bubble of (\d+) %", text)
        layers.append(tuple(map(int, result.groups()[:2])))
        bubbles.append(int(result[3]))
    assert layers[0] == (4, 4)
    assert layers[1] == (2, 6)
    assert bubbles[1] < bubbles[0] / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dry-run", "3", *TP2), "3 processes cannot hold"),
        (("--dry-run", "0"), "--dry-run 0: name a number of processes"),
        (
            ("--dry-run", "2", "--balance-stages"),
            "--balance-stages would do nothing here: there is one stage",
        ),
        (
            ("--dry-run", "2", *PP2, "--balance-stages", "--decoder-first-pipeline-num-layers=1"),
            "both choose the split",
        ),
    ],
)
def test_a_plan_that_cannot_run_says_why(flags, message):
    done = run_train(*flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
