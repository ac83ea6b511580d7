"""`MimoModel` whose encoders have ranks of their own: a rank holds one module, or a stage of it.

Encoders run side by side, one stage ahead of the language model's first. Their rows travel over
Megatron's bridges (`models/bridge.py`), and the gradients of the rows travel back.

What `pretrain()` is given when encoders have ranks of their own.

Every rank's parallel state is that of its module, so Megatron's model, optimizer, schedule and
checkpoint code sees a model of that module alone. What modules share goes over the whole world:
the norm of the gradient, the number of target tokens, and whether an update succeeded.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import mpu, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.models.mimo.optimizer import MimoOptimizer, ModuleOptimizerInfo
from megatron.core.process_groups_config import (
    MultiModuleProcessGroupCollection,
    ProcessGroupCollection,
)
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.training import initialize

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Needs
from examples.mimo.model.encoder import split_over
from examples.mimo.model.mimo import (
    StageMimoModel,
    check_count,
    dummy_input,
    language_spec,
    modality_spec,
)
from examples.mimo.parallel.bridge import Bridges, mark_samples
from examples.mimo.parallel.placement import LANGUAGE, Placement, create_grids, here
from examples.mimo.training.layout import placements


class NonColocatedMimoModel(StageMimoModel):
    """The module of this rank; what it takes and gives are dicts, module -> tensor."""

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        pg_collection: Any,
        placement: Placement,
        language_dp: int,
        pre_process: bool,
        post_process: bool,
        dummy_inputs: dict[str, dict[str, torch.Tensor]],
    ) -> None:
        self.placement = placement
        # Copies of the language model that one copy of this encoder serves.
        self.served = language_dp // placement.dp if placement.name != LANGUAGE else 1
        super().__init__(mimo_config, pg_collection, pre_process, post_process, None, dummy_inputs)
        if placement.name != LANGUAGE:
            # Random states of different modules are kept apart in a checkpoint.
            self.rng_state_key_prefix = f"{placement.name}."

    @property
    def needs(self) -> Needs:
        """Encoders need their media, and the ids that say how many rows a sample has."""
        if self.placement.name == LANGUAGE:
            return Needs(ids=self.pre_process, labels=self.post_process)
        return Needs(ids=True, modalities=frozenset({self.placement.name}))

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, dict[str, Any]] | None = None,
        cu_seqlens: list[int] | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """On an encoder's rank {modality: (tokens, H)}, on the last stage as in the base class.

        On the other stages of the language model {"language": (S, B, H)}.
        """
        if self.placement.name != LANGUAGE:
            assert input_ids is not None
            return {
                self.placement.name: self._encode_for_language_model(
                    input_ids, modality_inputs or {}, cu_seqlens
                )
            }
        if not self.pre_process:
            self.language_model.set_input_tensor(self.input_tensors[LANGUAGE])
        output = super().forward(input_ids, labels, cu_seqlens=cu_seqlens)
        return output if self.post_process else {LANGUAGE: output}

    def _encode_for_language_model(
        self,
        input_ids: torch.Tensor,
        modality_inputs: dict[str, dict[str, Any]],
        cu_seqlens: list[int] | None,
    ) -> torch.Tensor:
        """This encoder's rows of a micro-batch, or of one for each language model it serves."""
        name = self.placement.name
        inputs = modality_inputs.get(name, {})
        some = inputs and len(next(iter(inputs.values())))
        rows = (
            self._run_encoder(name, inputs)
            if some
            # The schedule frees what it has sent, and a part of another tensor cannot be freed.
            else self._encode_dummy(name, input_ids.device).clone()
        )
        if self.served < 2:
            return rows
        token_id = self.special_token_ids[name]
        check_count(name, rows, input_ids, token_id)
        return mark_samples(rows, count_by_sample(input_ids, token_id, cu_seqlens))

    def _encode_media(
        self, modality_inputs: dict[str, dict[str, Any]], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What the encoders sent, in the order of the config, on which the backward pass depends.

        Each context-parallel rank uses a part of it.
        """
        group = self.pg_collection.cp
        return {
            name: copy_to_tensor_model_parallel_region(self.input_tensors[name], group=group)
            for name in self.special_token_ids
        }


def count_by_sample(
    input_ids: torch.Tensor, token_id: int, cu_seqlens: Sequence[int] | None
) -> list[int]:
    """How often a token stands in each row, or in each sample of a packed row."""
    found = input_ids == token_id
    if cu_seqlens is None:
        return found.sum(dim=1).tolist()
    return [int(found[0, start:end].sum()) for start, end in pairwise(cu_seqlens)]


def build_noncolocated_model(
    config: MimoConfig,
    language: TransformerConfig,
    pg_collection: Any,
    placements: Sequence[Placement],
    grids: dict[str, HyperCommGrid],
    pre_process: bool,
    post_process: bool,
) -> NonColocatedMimoModel:
    """The module of this rank; `pg_collection` holds that module's groups, `grids` are all's."""
    mine = here(placements, dist.get_rank())
    placed = {placement.name: placement for placement in placements}
    mimo_config = MimoModelConfig(
        language_model_spec=language_spec(
            config.language, language, pg_collection, pre_process, post_process, None
        ),
        modality_submodules_spec={
            name: modality_spec(modality, split_over(language, placed[name].tp), pg_collection)
            for name, modality in config.modalities.items()
        },
        special_token_ids={name: m.token_id for name, m in config.modalities.items()},
        module_to_grid_map=grids,
    )
    held = {name: m for name, m in config.modalities.items() if name == mine.name}
    idle = {name: dummy_input(modality) for name, modality in held.items()}
    return NonColocatedMimoModel(
        mimo_config,
        pg_collection,
        mine,
        placed[LANGUAGE].dp,
        pre_process and mine.name == LANGUAGE,
        post_process and mine.name == LANGUAGE,
        idle,
    )


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


def prepare(
    args: argparse.Namespace,
    transformer: Any,
    install: Callable[[dict[str, Any], Callable[..., Any]], None],
) -> OwnRanks:
    """Process groups, random state and bridges; `transformer` is a TransformerConfig.

    Every rank of the world must call this. `install` gives Megatron the parallel state of this
    rank's module and wraps the function that builds its optimizer (`compat`).
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
    parallel_state_of_module = create_groups(
        placed,
        own,
        create_gloo_process_groups=args.use_gloo_process_groups,
        nccl_communicator_config_path=args.nccl_communicator_config_path,
        high_priority_stream_groups=args.high_priority_stream_groups,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    install(parallel_state_of_module, functools.partial(_for_all_modules, own, placed))
    initialize._set_random_seed(
        args.seed, args.data_parallel_random_init, args.te_rng_tracker, args.inference_rng_tracker
    )
    grids = create_grids(placed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    language = LANGUAGE if own.name == LANGUAGE else None
    return OwnRanks(grids, Bridges(grids, transformer), ModuleGroups({own.name: groups}, language))


def create_groups(placed: Sequence[Placement], own: Placement, **options: Any) -> dict[str, Any]:
    """The globals of Megatron's parallel state for this rank's module, `own`.

    Every rank of the world makes all modules' groups, in one order. `options` are those of
    `initialize_model_parallel` that are no sizes.
    """
    kept: dict[str, Any] = {}
    for placement in placed:
        initialize_module_parallel(placement, **options)
        if placement == own:
            state = vars(parallel_state)
            kept = {name: state[name] for name in state if name.startswith("_") and name.isupper()}
        # Forgets the groups and leaves them as they are.
        mpu.destroy_model_parallel()
    return kept


def initialize_module_parallel(placement: Placement, **options: Any) -> None:
    """Make Megatron's parallel state that of one module, on the ranks where it is placed."""
    mpu.initialize_model_parallel(
        placement.tp,
        placement.pp,
        context_parallel_size=placement.cp,
        rank_offset=placement.ranks.start,
        local_world_size=len(placement.ranks),
        **options,
    )


def finalize_noncolocated(
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
