"""python -m tests.gpu.comparison FILE: a model's weights, a batch and its losses, computed on CPUs.

A process without a device: some tensors of Megatron's modules are no buffers, and `Module.cpu()`
leaves them on the GPU.
"""

from __future__ import annotations

import sys

import torch

from examples.mimo import compat
from examples.mimo.cli import command

# The same layers on both sides, whatever is installed.
LAYERS = ("--transformer-impl", "local")


def build(config):
    """`config`'s model in fp32 on one process, on the GPU if there is one."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from examples.mimo.checkpoint.loading import start_parallel
    from examples.mimo.cli.arguments import parse_with_preset
    from examples.mimo.model.mimo import build_mimo_model
    from examples.mimo.training.pretrain import transformer_config

    command.single_process_unless_launched()
    start_parallel(1, 1)  # over NCCL where there is a GPU
    args = parse_with_preset(config, LAYERS)
    args.params_dtype = torch.float32
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_mimo_model(config, transformer_config(args), groups)


def batch_of(config):
    """Four samples with both modalities."""
    from examples.mimo.data.batch import collate
    from examples.mimo.training.inputs import MockDataset

    return collate([MockDataset(config, 128, 4, seed=0)[i] for i in range(4)])


def main():
    command.prepare_environment()
    compat.install()
    from examples.mimo.configs import get_model_config

    assert not torch.cuda.is_available(), "set CUDA_VISIBLE_DEVICES= before this process starts"
    config = get_model_config("tiny_avlm")
    model, batch = build(config), batch_of(config)
    with torch.no_grad():
        losses = model(batch.input_ids, batch.labels, batch.modality_inputs)
    weights = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    torch.save({"weights": weights, "losses": losses}, sys.argv[1])


if __name__ == "__main__":
    main()
