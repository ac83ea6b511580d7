"""Non-colocated encoders: on ranks apart from the language model's, with their own TP and DP.

A rank holds one module: an encoder with its projector, or a stage of the language model. Encoders
run side by side, one pipeline stage ahead of the language model's first. Their embeddings travel
over bridges (placement.py), and the embeddings' gradients travel back.

Every rank's parallel state is that of its module, so Megatron's model, optimizer, schedule and
checkpoint code sees a model of that module alone. What modules share goes over the whole world:
the norm of the gradient, the number of target tokens, and whether an update succeeded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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
from examples.mimo.data.batch import Placeholders
from examples.mimo.model.layers import split_over
from examples.mimo.model.mimo import (
    Inputs,
    StageMimoModel,
    dummy_input,
    language_spec,
    modality_spec,
)
from examples.mimo.model.parts import check_count
from examples.mimo.parallel.placement import (
    LANGUAGE,
    Bridges,
    Placement,
    create_grids,
    here,
    mark_samples,
)


class NonColocatedMimoModel(StageMimoModel):
    """The module of this rank; what it takes and gives are dicts, module -> tensor.

    `language_dp` is the number of the language model's data-parallel replicas.
    """

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        pg_collection: Any,
        placement: Placement,
        language_dp: int,
        pre_process: bool,
        post_process: bool,
        dummy_inputs: dict[str, Inputs],
    ) -> None:
        self.placement = placement
        is_encoder = placement.name != LANGUAGE
        # Replicas of the language model that one replica of this encoder serves.
        self.replicas_served = language_dp // placement.dp if is_encoder else 1
        super().__init__(mimo_config, pg_collection, pre_process, post_process, None, dummy_inputs)
        if is_encoder:
            # Random states of different modules are kept apart in a checkpoint.
            self.rng_state_key_prefix = f"{placement.name}."

    @property
    def needs(self) -> frozenset[str]:
        """An encoder needs its modality; what each sample has of it, the description says."""
        if self.placement.name != LANGUAGE:
            return frozenset({self.placement.name})
        return super().needs - set(self.special_token_ids)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, Inputs] | None = None,
        cu_seqlens: list[int] | None = None,
        placeholders: Placeholders | None = None,
        target_positions: torch.Tensor | None = None,
        features: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """On an encoder's rank {modality: (tokens, H)}, on the last stage as in the base class.

        On the other stages of the language model {"language": (S, B, H)}.
        """
        if self.placement.name != LANGUAGE:
            assert placeholders is not None
            inputs = (modality_inputs or {}).get(self.placement.name, {})
            return {self.placement.name: self._encode_for_bridge(inputs, placeholders)}
        if not self.pre_process:
            self.language_model.set_input_tensor(self.input_tensors[LANGUAGE])
        output = super().forward(
            input_ids, labels, None, cu_seqlens, placeholders, target_positions
        )
        return output if self.post_process else {LANGUAGE: output}

    def _encode_for_bridge(self, inputs: Inputs, placeholders: Placeholders) -> torch.Tensor:
        """This encoder's embeddings of a micro-batch, or of one for each replica it serves."""
        name = self.placement.name
        embeddings = self.run_encoder(name, inputs)
        if not len(embeddings):
            # The schedule frees what it has sent, and a part of another tensor cannot be freed.
            embeddings = embeddings.clone()
        if self.replicas_served < 2:
            return embeddings
        check_count(name, embeddings, placeholders)
        return mark_samples(embeddings, placeholders.counts[name])

    def encode(
        self, modality_inputs: dict[str, Inputs], features: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """What the encoders sent, in the order of the config, on which the backward pass depends.

        Each context-parallel rank uses a part of it, so the backward pass sums the gradients of
        the embeddings over those ranks before they travel back.
        """
        group = self.pg_collection.cp
        return {
            name: copy_to_tensor_model_parallel_region(self.input_tensors[name], group=group)
            for name in self.special_token_ids
        }


def build_noncolocated_model(
    config: MimoConfig,
    transformer_config: TransformerConfig,
    pg_collection: Any,
    placements: Sequence[Placement],
    grids: dict[str, HyperCommGrid],
    pre_process: bool,
    post_process: bool,
) -> NonColocatedMimoModel:
    """The module of this rank; `pg_collection` holds its groups, `grids` those of all modules."""
    own = here(placements, dist.get_rank())
    by_name = {placement.name: placement for placement in placements}
    encoder_configs = {
        name: split_over(transformer_config, by_name[name].tp) for name in config.inputs
    }
    mimo_config = MimoModelConfig(
        language_model_spec=language_spec(
            *(config.built_language, transformer_config, pg_collection),
            *(pre_process, post_process, None),
        ),
        modality_submodules_spec={
            name: modality_spec(modality, encoder_configs[name], pg_collection)
            for name, modality in config.inputs.items()
        },
        special_token_ids={name: m.token_id for name, m in config.inputs.items()},
        module_to_grid_map=grids,
    )
    is_language = own.name == LANGUAGE
    dummies = {} if is_language else {own.name: dummy_input(config.inputs[own.name])}
    return NonColocatedMimoModel(
        mimo_config,
        pg_collection,
        own,
        by_name[LANGUAGE].dp,
        pre_process and is_language,
        post_process and is_language,
        dummies,
    )


class ModuleGroups(MultiModuleProcessGroupCollection):
    """The groups of all modules; attributes are those of this rank's own module."""

    def __getattr__(self, name: str) -> Any:
        (own,) = self.__dict__["module_pgs"].values()
        return getattr(own, name)


class OneFormatOptimizer(MimoOptimizer):
    """Megatron's optimizer of several modules, whose checkpoints are those of one.

    A rank has one module, so its optimizer state is named as in a colocated run, and either loads
    what the other saved.
    """

    def __init__(
        self, optimizer: Any, own: Placement, placements: Sequence[Placement], config: Any
    ) -> None:
        self.own = optimizer
        infos = {
            placement.name: ModuleOptimizerInfo(
                optimizer=optimizer if placement == own else None,
                grid=None,
                pg_collection=None,
                is_active=placement == own,
            )
            for placement in placements
        }
        super().__init__(infos, config)
        self.is_stub_optimizer = optimizer.is_stub_optimizer

    def state_dict(self) -> Any:
        """The state of the module's own optimizer, as in the two methods below."""
        return self.own.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.own.load_state_dict(state_dict)

    def sharded_state_dict(self, *positional: Any, **named: Any) -> Any:
        return self.own.sharded_state_dict(*positional, **named)


class NonColocatedRun(NamedTuple):
    """What `pretrain()` is given with non-colocated encoders; all None without."""

    grids: dict[str, HyperCommGrid] | None = None
    bridges: Bridges | None = None
    groups: ModuleGroups | None = None


def prepare(
    placements: Sequence[Placement],
    rank: int,
    transformer_config: TransformerConfig,
    install: Callable[[dict[str, Any], Callable[..., Any]], None],
    *,
    local_rank: int,
    process_group: Mapping[str, Any],
    parallel_state_options: Mapping[str, Any],
    random_state: Sequence[Any],
) -> NonColocatedRun:
    """Process groups, random state and bridges; every rank of the world must call this.

    `process_group` are arguments of `init_process_group`, `parallel_state_options` those of
    `initialize_model_parallel` that are no sizes, `random_state` those of Megatron's
    `_set_random_seed`. `install` gives Megatron the parallel state of this rank's module and wraps
    the function that builds its optimizer (compat/), for which `pretrain()` has no parameter.
    """
    own = here(placements, rank)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    dist.init_process_group(**process_group)
    state_of_module = create_groups(placements, own, **parallel_state_options)
    install(state_of_module, functools.partial(_for_all_modules, own, placements))
    initialize._set_random_seed(*random_state)
    grids = create_grids(placements)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    language = LANGUAGE if own.name == LANGUAGE else None
    return NonColocatedRun(
        grids, Bridges(grids, transformer_config), ModuleGroups({own.name: groups}, language)
    )


def create_groups(
    placements: Sequence[Placement], own: Placement, **options: Any
) -> dict[str, Any]:
    """The globals of Megatron's parallel state for this rank's module, `own`.

    Every rank of the world makes all modules' groups, in one order. `options` are those of
    `initialize_model_parallel` that are no sizes.
    """
    kept: dict[str, Any] = {}
    for placement in placements:
        initialize_module_parallel(placement, **options)
        if placement == own:
            kept = parallel_state_globals()
        # Forgets the groups and leaves them as they are.
        mpu.destroy_model_parallel()
    return kept


def parallel_state_globals() -> dict[str, Any]:
    """Megatron's process groups and sizes of this rank: the globals of `parallel_state`."""
    state = vars(parallel_state)
    return {name: state[name] for name in state if name.startswith("_") and name.isupper()}


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


def _for_all_modules(
    own: Placement, placements: Sequence[Placement], build: Callable[..., Any]
) -> Callable[..., OneFormatOptimizer]:
    @functools.wraps(build)
    def build_for_all_modules(config: Any, *positional: Any, **named: Any) -> OneFormatOptimizer:
        return OneFormatOptimizer(build(config, *positional, **named), own, placements, config)

    return build_for_all_modules
