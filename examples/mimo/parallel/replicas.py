"""Encoders with less tensor parallelism than the language model, on the same ranks.

A tensor-parallel group of T ranks then holds T / E copies of an encoder that is split over E of
them. The copies share a micro-batch's media out among themselves, so the ranks that the encoders
do not use for tensor parallelism they use for data parallelism.

Megatron's `ColocatedBridgeCommunicator` has the same purpose, for one pipeline stage, no context
parallelism and as many media tokens in every sample; none of these need hold here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@dataclass(frozen=True)
class EncoderGroups:
    """Process groups of the encoders and projectors on this rank.

    `layers` is what their layers are built with, `copies` are the ranks of one tensor-parallel
    group that hold the same shard of them.
    """

    layers: Any
    copies: dist.ProcessGroup

    def tie(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """All copies start alike, and only the first counts in the norm of the gradient."""
        where = "cuda" if torch.cuda.is_available() else "cpu"
        for parameter in parameters:
            start = parameter.data.to(where)
            dist.broadcast(start, group_src=0, group=self.copies)
            parameter.data.copy_(start)
            setattr(parameter, "shared", self.copies.rank() > 0)

    def mark_copies(self, sharded_state_dict: dict[str, Any]) -> None:
        """A checkpoint holds one of the copies: the others' replica ids are not zero."""
        for entry in nested_values(sharded_state_dict):
            if hasattr(entry, "replica_id"):
                pipeline, tensor, data = entry.replica_id
                tensor += self.copies.rank() * self.layers.tp.size()
                entry.replica_id = (pipeline, tensor, data)

    def finalizer(self) -> Callable[..., None]:
        """Megatron's `finalize_model_grads`, and then the sum over the copies."""

        def finalize(model: list[torch.nn.Module], *positional: Any, **named: Any) -> None:
            finalize_model_grads(model, *positional, **named)
            self._sum_gradients(model)

        return finalize

    def _sum_gradients(self, model: list[torch.nn.Module]) -> None:
        gradients = [
            parameter.main_grad  # type: ignore[attr-defined]
            for chunk in model
            for name, parameter in chunk.named_parameters()
            if "modality_submodules." in name and parameter.requires_grad
        ]
        if not gradients:
            return
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat, group=self.copies)
        for gradient, total in zip(
            gradients, _unflatten_dense_tensors(flat, gradients), strict=True
        ):
            gradient.copy_(total)


def encoder_groups(tensor_parallel_size: int, language: Any) -> EncoderGroups | None:
    """Groups for encoders at TP `tensor_parallel_size`; None where that is the language model's.

    `language` is its ProcessGroupCollection. Every rank of the world must call this.
    """
    tp, cp = language.tp.size(), language.cp.size()
    if tensor_parallel_size == tp:
        return None
    others = dist.get_world_size() // (tp * cp)
    # Megatron's order of ranks, with the tensor-parallel dimension in two.
    grid = HyperCommGrid(
        [tensor_parallel_size, tp // tensor_parallel_size, cp, others],
        ["tp", "copies", "cp", "others"],
    )
    layers = copy.copy(language)
    layers.tp = grid.create_pg("tp")
    return EncoderGroups(layers, grid.create_pg("copies"))
