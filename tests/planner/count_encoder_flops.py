"""Run by test_flops.py: count_encoder_flops.py FOLDER; a rank's count goes to FOLDER/RANK.json."""

import json
import os
import sys
from pathlib import Path

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.mimo.cli.arguments import parse_with_preset
from examples.mimo.configs import get_model_config
from examples.mimo.data.batch import collate
from examples.mimo.model.mimo import build_mimo_model
from examples.mimo.training.inputs import MockDataset
from examples.mimo.training.pretrain import transformer_config


def main():
    """Counts of one forward and backward pass over four samples with two items of each kind."""
    ranks = int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    config = get_model_config("tiny_avlm")
    args = parse_with_preset(config, ["--context-parallel-size", str(ranks)])
    args.params_dtype = torch.float32
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = build_mimo_model(config, transformer_config(args), groups)
    mock = (MockDataset(config, 256, 1000, seed=0)[i] for i in range(1000))
    samples = [s for s in mock if [len(items) for items in s.media.values()] == [2, 2]][:4]
    batch = collate(samples, multiple=4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        labels = batch.labels.chunk(ranks, dim=1)[0]
        model(batch.input_ids, labels, batch.modality_inputs).sum().backward()
    counts = {
        name: sum(counter.get_flop_counts()[f"StageMimoModel.modality_submodules.{name}"].values())
        for name in config.inputs
    }
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(counts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
