"""Shared by all tests: the host layer, a small data folder, a process group of one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from examples.mimo.cli import command

command.prepare_environment()

from examples.mimo import compat

compat.install()

from benchmarks import ranks

ROOT = Path(__file__).resolve().parent.parent


def run_command(script: str, *flags: str, processes: int = 0) -> subprocess.CompletedProcess:
    """A command of the package as a user types it, under torchrun when `processes` is given."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        launch += [str(processes)]
    return subprocess.run(
        [*launch, str(ROOT / "examples/mimo" / script), *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def run_train(*flags: str, processes: int = 1) -> subprocess.CompletedProcess:
    """`train.py` on ranks that need not import Megatron first; comparisons of runs use it."""
    return ranks.run("examples/mimo/train.py", *flags, processes=processes)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and its ranks, whose helpers must end by themselves."""
    below = psutil.Process(process.pid).children(recursive=True)
    ranks_of_it = [member for member in below if member.ppid() == process.pid]
    for member in [process, *ranks_of_it]:
        os.kill(member.pid, signal.SIGKILL)
    process.wait()
    assert len(below) > len(ranks_of_it)
    assert not psutil.wait_procs(below, timeout=120)[1]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spoken questions by ten voices, as prepare_data.py writes them."""
    folder = tmp_path_factory.mktemp("data") / "spoken"
    sizes = ("--samples", "200", "--voices", "10")
    done = run_command("prepare_data.py", "spoken-questions", "--output", str(folder), *sizes)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny():
    from examples.mimo.configs import get_model_config

    return get_model_config("tiny_avlm")


@pytest.fixture(scope="session")
def tokenizer(data_folder):
    from examples.mimo.data.tokenizer import load_tokenizer

    return load_tokenizer(data_folder)


@pytest.fixture(scope="session")
def build_model():
    """A function from a MimoConfig to the whole model on one process, fp32."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from examples.mimo.cli.arguments import parse_with_preset
    from examples.mimo.model.mimo import build_mimo_model
    from examples.mimo.training.pretrain import transformer_config

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)

    def build(config):
        args = parse_with_preset(config, [])
        args.params_dtype = torch.float32
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return build_mimo_model(config, transformer_config(args), groups)

    return build
