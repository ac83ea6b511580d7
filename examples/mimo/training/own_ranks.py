"""What `pretrain()` is given when encoders have ranks of their own.

Every rank's parallel state is that of its module, so Megatron's model, optimizer, schedule and
checkpoint code sees a model of that module alone. What modules share goes over the whole world:
the norm of the gradient, the number of target tokens, and whether an update succeeded.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import mpu, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)
from megatron.training import initialize
from megatron.training import training as megatron_training

from examples.mimo.models.bridge import Bridges
from examples.mimo.models.placement import LANGUAGE, Placement, create_grids, here
from examples.mimo.training.layout import placements


class ModuleGroups(MultiModuleProcessGroupCollection):
    """The groups of this rank's module, which also answers for them as if there was no other."""

    def __getattr__(self, name: str) -> Any:
        (own,) = self.__dict__["module_pgs"].values()
        return getattr(own, name)


class OneFormatOptimizer(MimoOptimizer):
    """Megatron's optimizer of several modules, whose checkpoints are those of one.

    A rank has one module, so its optimizer state is named as on shared ranks, and either loads
    what the other saved.
    """

    def __init__(self, optimizer: Any, own: Placement, placed: Sequence[Placement], config: Any):
        self.own = optimizer
        infos = {
            placement.name: ModuleOptimizerInfo(
                optimizer=optimizer if placement == own else None,
                grid=None,
                pg_collection=None,
                is_active=placement == own,
            )
            for placement in placed
        }
        super().__init__(infos, config)
        self.is_stub_optimizer = optimizer.is_stub_optimizer

    def state_dict(self) -> Any:
        """As the module's own optimizer; so are the next two."""
        return self.own.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.own.load_state_dict(state_dict)

    def sharded_state_dict(self, *positional: Any, **named: Any) -> Any:
        return self.own.sharded_state_dict(*positional, **named)


class OwnRanks(NamedTuple):
    """What a run with `--encoder-ranks` has, and others have not."""

    grids: dict[str, HyperCommGrid] | None = None
    bridges: Bridges | None = None
    groups: ModuleGroups | None = None


def prepare(args: argparse.Namespace, transformer: Any) -> OwnRanks:
    """Process groups, random state and bridges; `transformer` is a TransformerConfig.

    Every rank of the world must call this.
    """
    if not args.encoder_ranks:
        return OwnRanks()
    placed = placements(args)
    own = here(placed, args.rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(args.local_rank)
    dist.init_process_group(
        args.distributed_backend,
        rank=args.rank,
        world_size=args.world_size,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
    )
    create_groups(
        placed,
        own,
        create_gloo_process_groups=args.use_gloo_process_groups,
        nccl_communicator_config_path=args.nccl_communicator_config_path,
        high_priority_stream_groups=args.high_priority_stream_groups,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    initialize._set_random_seed(
        args.seed, args.data_parallel_random_init, args.te_rng_tracker, args.inference_rng_tracker
    )
    grids = create_grids(placed)
    megatron_training.get_megatron_optimizer = _for_all_modules(
        own, placed, megatron_training.get_megatron_optimizer
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    language = LANGUAGE if own.name == LANGUAGE else None
    return OwnRanks(grids, Bridges(grids, transformer), ModuleGroups({own.name: groups}, language))


def create_groups(placed: Sequence[Placement], own: Placement, **options: Any) -> None:
    """Megatron's parallel state, of one module; every rank of the world makes all modules' groups.

    `options` are those of `initialize_model_parallel` that are no sizes.
    """
    kept: dict[str, Any] = {}
    for placement in placed:
        mpu.initialize_model_parallel(
            placement.tp,
            placement.pp,
            context_parallel_size=placement.cp,
            rank_offset=placement.ranks.start,
            local_world_size=len(placement.ranks),
            **options,
        )
        if placement == own:
            state = vars(parallel_state)
            kept = {name: state[name] for name in state if name.startswith("_") and name.isupper()}
        # Forgets the groups and leaves them as they are.
        mpu.destroy_model_parallel()
    vars(parallel_state).update(kept)


def finalize_on_own_ranks(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None, **named: Any
) -> None:
    """Megatron's `finalize_model_grads`, with the target tokens that all language models counted.

    The last stage has them, once on each of its tensor-parallel ranks.
    """
    finalize_model_grads(model, None, **named)
    if num_tokens is None:
        return
    if mpu.get_tensor_model_parallel_rank() > 0:
        num_tokens = torch.zeros_like(num_tokens)
    dist.all_reduce(num_tokens)
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))  # type: ignore[operator]


def _for_all_modules(own: Placement, placed: Sequence[Placement], build: Any) -> Any:
    @functools.wraps(build)
    def built(config: Any, *positional: Any, **named: Any) -> OneFormatOptimizer:
        return OneFormatOptimizer(build(config, *positional, **named), own, placed, config)

    return built
