"""`MimoModel` whose encoders have ranks of their own: a rank holds one module, or a stage of it.

Encoders run side by side, one stage ahead of the language model's first. Their rows travel over
Megatron's bridges (`models/bridge.py`), and the gradients of the rows travel back.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Needs
from examples.mimo.models.bridge import mark_samples
from examples.mimo.models.encoder_config import split_over
from examples.mimo.models.mimo import (
    StageMimoModel,
    check_count,
    language_spec,
    modality_spec,
    one_mock_input,
)
from examples.mimo.models.placement import LANGUAGE, Placement, here


class OwnRanksMimoModel(StageMimoModel):
    """The module of this rank; what it takes and gives are dicts, module -> tensor."""

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        pg_collection: Any,
        placement: Placement,
        language_dp: int,
        pre_process: bool,
        post_process: bool,
        idle_inputs: dict[str, dict[str, torch.Tensor]],
    ) -> None:
        self.placement = placement
        # Copies of the language model that one copy of this encoder serves.
        self.served = language_dp // placement.dp if placement.name != LANGUAGE else 1
        super().__init__(mimo_config, pg_collection, pre_process, post_process, None, idle_inputs)
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
        bounds: list[int] | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """On an encoder's rank {modality: (tokens, H)}, on the last stage as in the base class.

        On the other stages of the language model {"language": (S, B, H)}.
        """
        if self.placement.name != LANGUAGE:
            assert input_ids is not None
            return {self.placement.name: self._own_rows(input_ids, modality_inputs or {}, bounds)}
        if not self.pre_process:
            self.language_model.set_input_tensor(self.input_tensors[LANGUAGE])
        output = super().forward(input_ids, labels, bounds=bounds)
        return output if self.post_process else {LANGUAGE: output}

    def _own_rows(
        self,
        input_ids: torch.Tensor,
        modality_inputs: dict[str, dict[str, Any]],
        bounds: list[int] | None,
    ) -> torch.Tensor:
        """This encoder's rows of a micro-batch, or of one for each language model it serves."""
        name = self.placement.name
        inputs = modality_inputs.get(name, {})
        some = inputs and len(next(iter(inputs.values())))
        rows = (
            self._run_encoder(name, inputs)
            if some
            # The schedule frees what it has sent, and a part of another tensor cannot be freed.
            else self._encode_idle(name, input_ids.device).clone()
        )
        if self.served < 2:
            return rows
        token_id = self.special_token_ids[name]
        check_count(name, rows, input_ids, token_id)
        return mark_samples(rows, count_by_sample(input_ids, token_id, bounds))

    def _media_rows(
        self, modality_inputs: dict[str, dict[str, Any]], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What the encoders sent; each context-parallel rank uses a part of it."""
        group = self.pg_collection.cp
        return {
            name: copy_to_tensor_model_parallel_region(rows, group=group)
            for name, rows in self.input_tensors.items()
        }


def count_by_sample(
    input_ids: torch.Tensor, token_id: int, bounds: Sequence[int] | None
) -> list[int]:
    """How often a token stands in each row, or in each sample of a packed row."""
    found = input_ids == token_id
    if bounds is None:
        return found.sum(dim=1).tolist()
    return [int(found[0, start:end].sum()) for start, end in pairwise(bounds)]


def build_own_ranks_model(
    config: MimoConfig,
    language: TransformerConfig,
    pg_collection: Any,
    placements: Sequence[Placement],
    grids: dict[str, HyperCommGrid],
    pre_process: bool,
    post_process: bool,
) -> OwnRanksMimoModel:
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
    idle = {name: one_mock_input(modality) for name, modality in held.items()}
    return OwnRanksMimoModel(
        mimo_config,
        pg_collection,
        mine,
        placed[LANGUAGE].dp,
        pre_process and mine.name == LANGUAGE,
        post_process and mine.name == LANGUAGE,
        idle,
    )
