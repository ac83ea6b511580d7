"""Fixtures of all tests: the host layer, a small data folder, a process group of one."""

import gc
import signal
import sys
from pathlib import Path

import pytest

from examples.mimo.cli import command

# On a machine with GPUs too, all tests but those run with `-m gpu` are about CPUs.
command.prepare_environment(uses_gpus="gpu" in sys.argv)

from examples.mimo import compat

compat.install()

# A shell without job control starts what it puts into the background with this signal ignored, and
# so would be the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.helpers import costs, warm
from tests.helpers.commands import launch_command


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(costs.Costs(config))


def pytest_collection_finish() -> None:
    if "megatron.training" in sys.modules:
        warm.remember_flags()
    # What is imported stays: collections during the tests need not look at it.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Spoken questions by ten voices, as prepare_data.py writes them."""
    folder = tmp_path_factory.mktemp("data") / "spoken"
    sizes = ("--samples", "200", "--voices", "10")
    done = launch_command("prepare_data.py", "spoken-questions", "--output", str(folder), *sizes)
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

    # A test that writes a checkpoint may have done so in this process already.
    if not parallel_state.model_parallel_is_initialized():
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
