"""The code for CUDA, on CPU tensors that say they are on a GPU (tests/helpers/rehearsal.py)."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.helpers.commands import python_path
from tests.helpers.ranks import ROOT
from tests.helpers.rehearsed import NEW_TOKENS, PATHS

# Most waits of a host in a micro-batch of training, forward and backward.
PER_MICRO_BATCH = {
    "padded": 0,
    "packed": 0,
    "saved": 2,  # Megatron asks whether the gradients of each bucket are finite
    "resumed": 2,
    "tensor parallel": 1,  # ranks that do not read wait for the description of the batch
    "pipeline": 0,
    "context parallel": 0,
    "non-colocated": 0,
}
# And in an iteration besides, nearly all of them Megatron's logging.
PER_ITERATION = {"padded": 30}
# Most waits for a token of all sequences together.
PER_TOKEN = {"greedy": 1, "sampled": 1, "penalised": 1, "logprobs": 1}
PER_TOKEN_OF_GRAPHS = 1


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the ranks of each path report, all run by one child process."""
    file = tmp_path_factory.mktemp("rehearsal") / "reports.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.rehearsal", "--json", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def waits(reports, path, part):
    """How often each rank waited in each part of the run that the pattern `part` matches."""
    counts = []
    for rank, report in enumerate(reports[path]):
        by_part = Counter()
        for name, _, _, count in report["waits"]:
            if re.fullmatch(part, name):
                by_part[rank, name] += count
        counts += by_part.items()
    return dict(counts)


@pytest.mark.parametrize("path", PATHS)
def test_no_tensors_of_two_devices_meet(reports, path):
    assert len(reports[path]) == PATHS[path].processes
    for report in reports[path]:
        assert report["error"] is None, report["error"]


@pytest.mark.parametrize("path", PER_MICRO_BATCH)
def test_waits_in_a_micro_batch(reports, path):
    # The first iteration fills caches.
    counts = waits(reports, path, r"iteration ([2-9]), micro-batch \d+").values()
    assert max(counts, default=0) <= PER_MICRO_BATCH[path]


def test_other_waits_do_not_grow_with_the_micro_batches(reports):
    of_two, of_four = waits(reports, "padded", "iteration [23]").values()
    assert of_two <= PER_ITERATION["padded"]
    # Two more end the run.
    assert of_four - of_two <= 2


@pytest.mark.parametrize("kind", PER_TOKEN)
def test_waits_for_a_token(reports, kind):
    counts = waits(reports, "answers", rf"{kind}, token \d+").values()
    assert len(counts) == NEW_TOKENS - 1
    assert max(counts) <= PER_TOKEN[kind]


def test_a_captured_step_computes_the_same_tokens_and_waits_for_nothing(reports):
    """Inside the capture a wait or a tensor of the host would have been an error."""
    (captured,), (plain,) = reports["captured"], reports["answers"]
    assert captured["result"]["greedy"] == plain["result"]["greedy"]
    counts = list(waits(reports, "captured", r"greedy, token \d+").values())
    # The first one captures the graph.
    assert max(counts[1:]) <= PER_TOKEN_OF_GRAPHS


@pytest.mark.parametrize("path", ["converted", "planned"])
def test_conversion_and_dry_run_leave_the_device_alone(reports, path):
    assert reports[path][0]["error"] is None, reports[path][0]["error"]
    assert reports[path][0]["num_on_device"] == 0


def test_the_rehearsed_device_refuses_what_cuda_refuses(reports):
    (report,) = reports["refusals"]
    answers = report["result"]
    errors = {
        "two places": "Expected all tensors to be on the same device: aten::add",
        "stacked with a number of the host": "same device: aten::stack",
        "numpy": "can't convert cuda:0",
        "nccl, host": "a nccl group got {'cpu'}",
        "gloo, device": "a gloo group got {'cuda'}",
        "captured wait": "the host waits (numbers are read)",
        "captured tensor of the host": "makes a tensor of the host",
        "captured copy": "the host waits (copy to the device",
        "meta": "Cannot copy out of meta tensor",
    }
    for name, text in errors.items():
        assert text in str(answers.pop(name)), name
    assert answers == {
        **{"number": 1, "list": 1, "test": 1, "mask": 1, "assigned to a mask": 0},
        **{"list as index": 1, "scalar of the host": 0},
        **{"pageable": 1, "pinned": 0, "pinned, blocking": 1},
        **{"from a list": 1, "from a list, pinned": 0, "numbers in a list": 2},
        **{"nccl, device": 0, "replayed": [10.0] * 4, "hidden": False},
    }
