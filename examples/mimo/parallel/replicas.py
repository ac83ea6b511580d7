"""Colocated encoders with a smaller TP: data-parallel encoder replicas inside a TP group.

A tensor-parallel group of T ranks then holds T / E data-parallel replicas of an encoder that is
split over E of them. Each replica encodes its share of a micro-batch's media items, so the ranks
that encoders do not use for tensor parallelism are used for data parallelism.

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
class EncoderReplicas:
    """Process groups of the encoders and projectors on this rank.

    `layers` are the groups that their layers are built with, `replicas` the ranks of one
    tensor-parallel group that hold the same shard of them.
    """

    layers: Any
    replicas: dist.ProcessGroup

    def tie(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give all replicas the same weights; only the first's count in the gradient's norm."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for parameter in parameters:
            start = parameter.data.to(device)
            dist.broadcast(start, group_src=0, group=self.replicas)
            parameter.data.copy_(start)
            setattr(parameter, "shared", self.replicas.rank() > 0)

    def mark(self, sharded_state_dict: dict[str, Any]) -> None:
        """Let a checkpoint hold the first replica: the others' replica ids are not zero."""
        for entry in nested_values(sharded_state_dict):
            if hasattr(entry, "replica_id"):
                pipeline, tensor, data = entry.replica_id
                tensor += self.replicas.rank() * self.layers.tp.size()
                entry.replica_id = (pipeline, tensor, data)

    def finalizer(self) -> Callable[..., None]:
        """Megatron's `finalize_model_grads`, which sums gradients over data-parallel ranks.

        Then they are summed over the replicas, of whose existence DDP knows nothing: each encoded
        a share of the media.
        """

        def finalize(model: list[torch.nn.Module], *positional: Any, **named: Any) -> None:
            finalize_model_grads(model, *positional, **named)
            gradients = [
                parameter.main_grad  # type: ignore[attr-defined]
                for chunk in model
                for name, parameter in chunk.named_parameters()
                if "modality_submodules." in name and parameter.requires_grad
            ]
            if not gradients:
                return
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat, group=self.replicas)
            totals = _unflatten_dense_tensors(flat, gradients)
            for gradient, total in zip(gradients, totals, strict=True):
                gradient.copy_(total)

        return finalize


def create_encoder_replicas(
    tensor_parallel_size: int, pg_collection: Any
) -> EncoderReplicas | None:
    """Groups for encoders at TP `tensor_parallel_size`; None where that is the language model's.

    `pg_collection` holds the language model's groups. Every rank of the world must call this.
    """
    tp, cp = pg_collection.tp.size(), pg_collection.cp.size()
    if tensor_parallel_size == tp:
        return None
    others = dist.get_world_size() // (tp * cp)
    # Megatron's order of ranks, with the tensor-parallel dimension in two.
    grid = HyperCommGrid(
        [tensor_parallel_size, tp // tensor_parallel_size, cp, others],
        ["tp", "replicas", "cp", "others"],
    )
    layers = copy.copy(pg_collection)
    layers.tp = grid.create_pg("tp")
    return EncoderReplicas(layers, grid.create_pg("replicas"))
