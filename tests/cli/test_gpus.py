"""Machines with GPUs: what needs none hides them, and too few of them are one line."""

import os
import stat
import subprocess
import sys

import pytest
import torch

from examples.mimo.cli import command
from tests.helpers.commands import ROOT

# In the place of torch: it says which GPUs are visible when it is imported, and ends the process.
WATCHING = """
import os
os.write(2, f"visible: {os.environ.get('CUDA_VISIBLE_DEVICES')}".encode())
os._exit(0)
"""
# Of torch what is used before anything else: a machine with one GPU.
ONE_GPU = """
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)

class distributed:
    is_initialized = staticmethod(lambda: False)
"""
FOLDERS = ("--save", "nowhere", "--load", "tests")
CONFIG = ("--model-provider", "tiny_avlm")


def start(folder, torch_code, *arguments, **variables):
    """A command that imports `torch_code` as torch, on a machine with two GPUs."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(torch_code)
    path = os.pathsep.join([str(folder), str(ROOT)])
    visible = {"CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **visible, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize(
    ("arguments", "visible"),
    [
        (("examples/mimo/train.py",), "0,1"),
        (("examples/mimo/train.py", "--dry-run", "2"), ""),
        (("examples/mimo/train.py", "--dry-run=2"), ""),
        (("examples/mimo/convert.py", "from-hf", *CONFIG, "--save", "nowhere"), ""),
        (("examples/mimo/convert.py", "to-hf", *FOLDERS), ""),
        (("examples/mimo/prepare_data.py", "real-weights", "--output", "nowhere"), ""),
        (("examples/mimo/avlm_inference.py", "--ckpt", "tests", "--prompt", "x"), "0,1"),
        (("examples/mimo/evaluate.py", "--ckpt", "tests", "--data", "tests"), "0,1"),
        (("-m", "benchmarks.integrity"), ""),
        (("-m", "benchmarks.data"), ""),
        (("-m", "benchmarks.generation"), ""),
        # These start processes that import torch, without this one's stderr being kept from them.
        (("-m", "benchmarks.balance", "--output", os.devnull), ""),
        (("-m", "benchmarks.layouts", "--output", os.devnull), ""),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else value,
)
def test_what_needs_no_gpu_hides_them_before_torch_is_imported(tmp_path, arguments, visible):
    done = start(tmp_path, WATCHING, *arguments)
    assert f"visible: {visible}" in done.stderr
    assert ("visible: 0,1" in done.stderr) == bool(visible)


@pytest.mark.parametrize("script", ["train.py", "avlm_inference.py"])
def test_more_processes_than_gpus_are_one_line(tmp_path, script):
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    flags = ("--ckpt", "tests", "--prompt", "x") if script == "avlm_inference.py" else ()
    done = start(tmp_path, ONE_GPU, f"examples/mimo/{script}", *flags, **launch, **address)
    assert done.returncode == 2
    assert done.stderr == (
        f"{script}: error: 2 processes on this machine, but 1 visible GPU; start 1 with torchrun "
        "--nproc-per-node 1, show more in CUDA_VISIBLE_DEVICES, or set CUDA_VISIBLE_DEVICES= to "
        "run on CPUs\n"
    )


@pytest.mark.parametrize(
    ("gpus", "local_rank", "processes", "visible", "refused"),
    [
        (0, 1, 2, "", False),
        (2, 1, 2, None, False),
        (8, 0, 8, "0,1,2,3,4,5,6,7", False),
        (4, 0, 8, None, True),
        (4, 3, 8, None, True),
        (1, 1, 2, "3", True),
        # As torchrun --virtual-local-rank starts every process.
        (1, 0, 2, "3", False),
        # A launcher that says nothing of the number of processes.
        (2, 2, None, None, True),
    ],
)
def test_a_process_has_the_gpu_of_its_local_rank(
    monkeypatch, gpus, local_rank, processes, visible, refused
):
    reporting = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(command, "report_every_rank", lambda: reporting.append(local_rank))
    variables = {
        **{"RANK": str(local_rank), "WORLD_SIZE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        **{"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": processes},
        "CUDA_VISIBLE_DEVICES": visible,
    }
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    if not refused:
        command.single_process_unless_launched()
        return
    count = processes or local_rank + 1
    with pytest.raises(ValueError, match=f"{count} processes on this machine, but {gpus} visible"):
        command.single_process_unless_launched()
    # Where rank 0 cannot tell, the first rank without a GPU says so.
    assert reporting == ([1] if visible else [])


def executable(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.mark.parametrize("demo", ["digits", "animals"])
@pytest.mark.parametrize(
    ("gpus", "visible", "then"), [(0, None, "unset"), (1, None, ""), (2, "4,5", "4,5"), (1, "", "")]
)
def test_a_demonstration_uses_gpus_if_its_processes_have_one_each(
    tmp_path, demo, gpus, visible, then
):
    note = f'echo "${{CUDA_VISIBLE_DEVICES-unset}} $1" >> {tmp_path}/log\n'
    # What the last step reads.
    data = tmp_path / "demo/data"
    record = f"mkdir -p {data} && echo '{{}}' > {data}/heldout.jsonl\n"
    executable(tmp_path / "python", f'if [ "$1" = -c ]; then echo {gpus}; exit; fi\n{note}{record}')
    executable(tmp_path / "torchrun", note)
    executable(tmp_path / "mv", "")
    environment = {**os.environ, "DEMO_DIR": str(tmp_path / "demo")}
    environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run(
        ["bash", f"demos/{demo}/run.sh"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    steps = [line.rpartition(" ") for line in (tmp_path / "log").read_text().splitlines()]
    assert "--standalone" in [step for _, _, step in steps]
    assert {devices for devices, _, _ in steps} == {then}
    line = "Training starts 2 processes, and GPUs are visible for 1: this runs on CPUs."
    assert (line in done.stdout.splitlines()) == (gpus == 1 and visible is None)


@pytest.mark.parametrize(
    ("target", "visible"),
    [("test", ""), ("layouts", ""), ("balance", ""), ("gpu-check", "0,1")],
)
def test_make_hides_gpus_from_what_compares_on_cpus(tmp_path, target, visible):
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "python", 'echo "visible: $CUDA_VISIBLE_DEVICES"')
    (tmp_path / "installed").touch()  # newer than what it is made from
    done = subprocess.run(
        ["make", "--silent", target, f"VENV={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"visible: {visible}\n", done.stderr
