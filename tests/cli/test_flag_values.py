"""Values that a flag cannot have: one line that names it and exit status 2, before any allocation.

Megatron takes most of them: some end in a traceback after the model is built, some train silently.
"""

import argparse

import pytest
from megatron.training import arguments as megatron_arguments

from examples.mimo.cli.arguments import parse_arguments
from examples.mimo.cli.flags import RANGES, add_own_flags
from tests.helpers import ranks

FILES = ("--dataset-provider", "conversations", "--data-path", "tests")
SHARDS = ("--dataset-provider", "energon", "--data-path", "tests")
# A command line, and the words of its line; the flag that is named is the first word of both.
WRONG = [
    *((f"{flag} 0", ": at least 1") for flag in (
        "--train-iters", "--log-interval", "--save-interval", "--eval-interval", "--exit-interval",
        "--exit-duration-in-mins", "--micro-batch-size", "--global-batch-size", "--num-layers",
        "--eval-micro-batch-size", "--eval-global-batch-size", "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size", "--context-parallel-size", "--hidden-size",
        "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank",
        "--num-query-groups", "--num-attention-heads", "--ffn-hidden-size", "--kv-channels",
        "--seq-length", "--vocab-size", "--recompute-num-layers", "--lr-decay-iters",
        "--num-distributed-optimizer-instances", "--distributed-timeout-minutes",
        "--encoder-data-parallel-size", "--dist-ckpt-workers", "--tensorboard-log-interval",
        "--ddp-bucket-size", "--rotary-base", "--save-tokens-per-expert-interval",
    )),
    *((f"{flag} -1", ": at least 1") for flag in (
        "--train-iters", "--save-interval", "--micro-batch-size", "--hidden-size",
        "--tensor-model-parallel-size",
    )),
    *((f"{flag} {value}", ": at least 0") for flag, value in (
        ("--lr", "inf"), ("--min-lr", "nan"), ("--clip-grad", "nan"), ("--weight-decay", "nan"),
        ("--init-method-std", "inf"), ("--lr-warmup-init", "nan"),
    )),
    *((f"{flag} -1", ": at least 0") for flag in (
        "--lr", "--clip-grad", "--weight-decay", "--init-method-std", "--lr-warmup-iters",
        "--num-workers", "--eval-iters", "--manual-gc-interval", "--decoupled-lr",
        "--embedding-init-method-std", "--start-eval-at-iter",
    )),
    *((f"{flag} {value}", ": from 0 to less than 1") for flag, value in (
        ("--adam-beta1", 2), ("--adam-beta2", 1), ("--sgd-momentum", "-0.1"),
        ("--hidden-dropout", 1.5), ("--attention-dropout", "nan"), ("--lr-warmup-fraction", 2),
    )),
    ("--rotary-percent 2", ": from 0 to 1"),
    *((f"{flag} 0", ": more than 0") for flag in (
        "--adam-eps", "--norm-epsilon", "--loss-scale", "--rope-scaling-factor"
    )),
    ("--seed 0", ": from 1 to 2147483647"),
    ("--seed 4294967296", ": from 1 to 2147483647"),
    ("--rampup-batch-size 0 0 0", "would do nothing here: use --step-batch-size-schedule"),
    ("--lr-warmup-iters 20", "leaves nothing of --train-iters 20 to decay in; at most 19"),
    ("--lr-warmup-iters 9 --lr-decay-iters 5", "nothing of --lr-decay-iters 5 to decay in"),
    ("--lr-decay-style WSD", "needs --lr-wsd-decay-iters, the length of the last part, from 1 to"),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 21", "from 1 to --train-iters 20, not 21"),
    ("--min-lr 0.1", "0.1 is more than --lr 0.0001"),
    ("--lr-warmup-init 0.1", "0.1 is more than --lr 0.0001"),
    ("--start-weight-decay 0.1", "would do nothing here: add --weight-decay-incr-style"),
    ("--weight-decay-incr-style linear", "needs --start-weight-decay and an --end-weight-decay"),
    ("--optimizer foo", "invalid choice: 'foo' (choose from 'adam', 'sgd'"),
    ("--save-interval often", "invalid int value: 'often'"),
    ("--lr high", "invalid float value: 'high'"),
    ("--lr-decay-style step", "invalid choice: 'step'"),
    ("--use-checkpoint-opt_param-scheduler --override-opt_param-scheduler", "do not go together"),
]  # fmt: skip
# Together with flags without which they would be refused for another reason.
WRONG_WITH = [
    (("--max-bad-samples", "-1", *FILES), ": at least 0"),
    (("--shuffle-buffer-size", "-1", *SHARDS), ": at least 0"),
    (("--packing-buffer-size", "0", *SHARDS), ": at least 1"),
    (("--total-seq-length", "0", "--packing-buffer-size", "8", *SHARDS), ": at least 1"),
    (("--dry-run", "0"), "name a number of processes, 1 or more"),
    (("--adam-beta1=2",), ": from 0 to less than 1"),
]
RIGHT = (
    "--lr-warmup-iters 19",
    "--lr-warmup-iters 4 --lr-decay-iters 5",
    "--lr-warmup-fraction 0.99",
    "--lr-warmup-fraction 0",
    "--lr-decay-style WSD --lr-wsd-decay-iters 20",
    "--lr-decay-iters 1",
    "--train-iters 1",
    "--lr 0",
    "--lr 1e30",
    "--min-lr 0.0001",
    "--weight-decay 0",
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0",
    "--clip-grad 0",
    "--adam-beta1 0 --adam-beta2 0.9999",
    "--hidden-dropout 0 --attention-dropout 0",
    "--init-method-std 0",
    "--eval-interval 1 --eval-iters 0",
    "--eval-interval 1000000",
    "--save-interval 1",
    "--exit-interval 1",
    "--log-interval 1000000",
    "--seed 1",
    "--seed 2147483647",
    "--num-workers 0",
    "--manual-gc-interval 0",
    "--null-tokenizer-pad-id -1",
    "--timing-log-level 0",
    "--num-query-groups 4",
    "--loss-scale 1",
)


@pytest.mark.parametrize(
    ("flags", "message"), [*((line.split(), words) for line, words in WRONG), *WRONG_WITH]
)
def test_a_wrong_value_is_one_line(flags, message):
    done = ranks.run("examples/mimo/train.py", *flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert flags[0].split("=")[0].strip("-").replace("-", "_") in done.stderr.replace("-", "_")
    assert message in done.stderr
    assert done.stdout == ""
    assert "did you mean" not in done.stderr


@pytest.mark.parametrize("line", RIGHT)
def test_a_value_at_the_edge_is_taken(monkeypatch, line):
    monkeypatch.setenv("WORLD_SIZE", "1")
    flags = line.split()
    args, _ = parse_arguments(flags)
    assert args.train_iters == (1 if "--train-iters" in flags else 20)


def test_every_range_is_of_a_number_that_a_flag_sets():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    megatron_arguments.add_megatron_arguments(parser)
    add_own_flags(parser)
    numbers = {action.dest for action in parser._actions if action.type in (int, float)}
    named = [name for allowed in RANGES for name in allowed.arguments]
    assert set(named) <= numbers
    assert len(named) == len(set(named))
