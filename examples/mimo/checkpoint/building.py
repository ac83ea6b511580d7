"""The parts of a model one by one on one process, with or without memory behind them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.training.checkpointing import _build_sharded_state_dict_metadata

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.models.mimo import part_prefix, part_spec
from examples.mimo.training.arguments import parse_with_preset
from examples.mimo.training.providers import transformer_config


def start_alone(seed: int) -> None:
    """Parallel state for one process that talks to nobody."""
    if not parallel_state.model_parallel_is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def part_entries(
    config: MimoConfig, part: str, device: str
) -> tuple[dict[str, list[ShardedTensor]], list[ShardedObject]]:
    """What Megatron would save of a part: key -> its pieces, and the objects beside them.

    On `device` "meta" the pieces have shapes and no memory; on "cpu" they are freshly initialised.
    """
    args = parse_with_preset(config, [])
    args.params_dtype = torch.float32
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device(device):
        module = build_module(part_spec(config, part, transformer_config(args), groups))
    metadata = _build_sharded_state_dict_metadata(args)
    state: dict[str, Any] = {
        "part": module.sharded_state_dict(prefix=part_prefix(part), metadata=metadata)
    }
    apply_factories(state)
    tensors: dict[str, list[ShardedTensor]] = {}
    objects = []
    for found in nested_values(state):
        if isinstance(found, ShardedTensor):
            tensors.setdefault(found.key, []).append(found)
        elif isinstance(found, ShardedObject):
            objects.append(found)
    return tensors, objects
