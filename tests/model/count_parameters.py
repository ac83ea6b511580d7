"""Run by test_sizes.py in a process of its own: count_parameters.py NAME:TP ..."""

import json
import sys

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from examples.mimo.cli.arguments import parse_with_preset
from examples.mimo.cli.output import part_sizes
from examples.mimo.configs import get_model_config
from examples.mimo.model.mimo import build_mimo_model
from examples.mimo.model.parts import parts
from examples.mimo.training.layout import check_encoder_layout
from examples.mimo.training.pretrain import transformer_config


def count(name, tp):
    """Parameters per part, and per linear weight, on a rank of `tp`; nothing is allocated."""
    torch.distributed.init_process_group("fake", rank=0, world_size=tp, store=FakeStore())
    parallel_state.initialize_model_parallel(tp, create_gloo_process_groups=False)
    config = get_model_config(name)
    flags = ["--tensor-model-parallel-size", str(tp), "--no-initialization"]
    args = parse_with_preset(config, flags)
    args.params_dtype = torch.float32
    args.rank, args.world_size = 0, tp
    check_encoder_layout(args, config)
    with torch.device("meta"):
        model = build_mimo_model(
            config, transformer_config(args), ProcessGroupCollection.use_mpu_process_groups()
        )
    linear = {
        f"{part}.{path}": parameter.numel()
        for part, module in parts(model).items()
        for path, parameter in module.named_parameters()
        if "linear" in path and path.endswith("weight")
    }
    sizes = {
        part: size.here
        for part, size in part_sizes(model, tp, args.encoder_tensor_model_parallel_size).items()
    }
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return {"parts": sizes, "linear": linear}


if __name__ == "__main__":
    cases = [case.split(":") for case in sys.argv[1:]]
    print(json.dumps({f"{name}:{tp}": count(name, int(tp)) for name, tp in cases}))
