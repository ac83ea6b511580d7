"""Where encoders live: replicas of them inside tensor-parallel groups, or ranks of their own.

Colocated encoders may have a smaller TP than the language model. A tensor-parallel group of T ranks
then holds T / E data-parallel replicas of an encoder that is split over E of them
(`EncoderReplicas`), and each encodes its share of a micro-batch's media items. Megatron's
`ColocatedBridgeCommunicator` has the same purpose, for one pipeline stage, no context parallelism
and as many media tokens in every sample; none of these need hold here.

Non-colocated encoders have a `Placement` of their own, and `Bridges` to the language model. Their
data-parallel size may differ from the language model's: `join_batches` reads for several replicas
of the language model, `take_share` a part of what one of them reads.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import finalize_model_grads
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator
from megatron.core.pipeline_parallel.multimodule_communicator import (
    MultiModulePipelineCommunicator,
)
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn import functional

from examples.mimo.data.batch import TEXT, Batch
from examples.mimo.parallel.context import share_of

LANGUAGE = MIMO_LANGUAGE_MODULE_KEY
# The axes of what travels between the language model's stages: (S, B, H).
LANGUAGE_AXES = {"s": 0, "b": 1, "h": 2}


@dataclass(frozen=True)
class EncoderReplicas:
    """Process groups of the encoders and projectors on this rank, colocated with a smaller TP.

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


@dataclass(frozen=True)
class Placement:
    """A module on consecutive ranks: split over tp x cp x pp of them, dp replicas of that."""

    name: str
    ranks: range
    tp: int = 1
    cp: int = 1
    pp: int = 1

    @property
    def dp(self) -> int:
        """Data-parallel replicas, which see different samples."""
        return len(self.ranks) // (self.tp * self.cp * self.pp)

    def grid(self) -> HyperCommGrid:
        """The ranks in Megatron's order, for the bridges between modules.

        To a bridge context-parallel ranks are tensor-parallel ones: all get the same embeddings.
        """
        shape = [self.tp * self.cp, 1, self.dp, self.pp]
        return HyperCommGrid(shape, ["tp", "cp", "dp", "pp"], rank_offset=self.ranks.start)


def create_grids(placements: Sequence[Placement]) -> dict[str, HyperCommGrid]:
    """Module -> its grid, with groups of its pipeline stages; every rank must call this."""
    grids = {placement.name: placement.grid() for placement in placements}
    for grid in grids.values():
        grid.create_pg("pp")
    return grids


def here(placements: Sequence[Placement], rank: int) -> Placement:
    """The module that `rank` holds."""
    return next(placement for placement in placements if rank in placement.ranks)


class RaggedBridge(BridgeCommunicator):
    """A bridge whose senders may send different numbers of embeddings.

    Megatron's splits a gradient evenly over the senders. This one remembers how many embeddings of
    a micro-batch came from each, until their gradients go back: first in, first out. And where
    Megatron's wants NCCL, it takes the world's backend.
    """

    def __init__(self, *positional: Any, **named: Any) -> None:
        self.counts_received: deque[list[int]] = deque()
        super().__init__(*positional, **named)

    @classmethod
    def _get_or_create_broadcast_pg(cls, ranks_list: list[list[int]]) -> dist.ProcessGroup:
        return _subgroup(tuple(tuple(ranks) for ranks in ranks_list))

    @classmethod
    def _get_or_create_bridge_pg(cls, ranks: list[int]) -> dist.ProcessGroup:
        return _group(tuple(ranks))

    def _communicate_shapes(self, **options: Any) -> tuple[list, list]:
        shapes = super()._communicate_shapes(**options)
        if options.get("recv_prev") and torch.is_grad_enabled():
            self.counts_received.append([shape[0] for shape in shapes[0]])
        return shapes

    def send_backward(self, grad_tensor: torch.Tensor) -> None:
        """The gradient (tokens, H) to the ranks that sent the embeddings."""
        super().send_backward(self._for_senders(grad_tensor))

    def send_backward_recv_forward(
        self, grad_tensor: torch.Tensor, forward_shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        """The same, and the next micro-batch's embeddings."""
        return super().send_backward_recv_forward(self._for_senders(grad_tensor), forward_shape)

    def _for_senders(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.counts_received:
            setattr(gradient, "_mimo_bridge_split_sizes", self.counts_received.popleft())
        return gradient


@functools.cache
def _subgroup(ranks_list: tuple[tuple[int, ...], ...]) -> dist.ProcessGroup:
    """This rank's group of `ranks_list`; cached, so that bridges to the same ranks share it."""
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in ranks_list])[0]


@functools.cache
def _group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    return dist.new_group(list(ranks))


class Bridges(MultiModulePipelineCommunicator):
    """Megatron's multi-module communicator: a bridge from each encoder to the language model."""

    def __init__(self, grids: dict[str, HyperCommGrid], config: ModelParallelConfig) -> None:
        encoders = [name for name in grids if name != LANGUAGE]
        super().__init__(
            grids,
            topology={**{name: [LANGUAGE] for name in encoders}, LANGUAGE: []},
            config=config,
            dim_mapping=LANGUAGE_AXES,
            module_output_ndim=dict.fromkeys(encoders, 2),
        )

    def _build_bridge_comms(self) -> None:
        for name, grid in self.module_to_grid_map.items():
            if name != LANGUAGE:
                bridge = RaggedBridge(
                    src_grid=grid,
                    dest_grid=self.module_to_grid_map[LANGUAGE],
                    dim_mapping=self.dim_mapping,
                    comm_dtype=self.config.pipeline_dtype,
                    src_module_name=name,
                    dest_module_name=LANGUAGE,
                    tensor_ndim=2,
                )
                self.bridge_comms.append(bridge)


def mark_samples(embeddings: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Attach each sample's number of embeddings, by which a bridge splits them over ranks."""
    setattr(embeddings, "_mimo_bridge_split_sizes", list(counts))
    return embeddings


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Several batches as one, in their order; packed sequences are joined end to end."""
    if len(batches) == 1:
        return batches[0]
    packed = batches[0].cu_seqlens is not None
    lengths = [batch.seq_length for batch in batches]
    seq_length = sum(lengths) if packed else max(lengths)
    tensors: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for batch in batches for name in batch.tensors):
        parts = [batch.tensors[name] for batch in batches if name in batch.tensors]
        if name in TEXT and not packed:
            parts = [functional.pad(part, (0, seq_length - part.shape[1])) for part in parts]
        tensors[name] = torch.cat(parts, dim=1 if name in TEXT and packed else 0)
    cu_seqlens = [0]
    for batch in batches:
        cu_seqlens += [cu_seqlens[-1] + end for end in (batch.cu_seqlens or [])[1:]]
    modalities = dict.fromkeys(name for batch in batches for name in batch.items)
    return Batch(
        batch_size=1 if packed else sum(batch.batch_size for batch in batches),
        seq_length=seq_length,
        num_tokens=sum(batch.num_tokens for batch in batches),
        keys=[key for batch in batches for key in batch.keys],
        items={m: [item for b in batches for item in b.items.get(m, [])] for m in modalities},
        cu_seqlens=cu_seqlens if packed else None,
        bad_samples=[bad for batch in batches for bad in batch.bad_samples],
        places=[place for batch in batches for place in batch.places],
        rounded_slots=sum(batch.rounded_slots for batch in batches),
        tensors=tensors,
    )


def take_share(batch: Batch, number: int, shares: int) -> Batch:
    """The batch with one share of the encoder inputs of each modality."""
    tensors = {
        name: tensor if name in TEXT else tensor[share_of(len(tensor), number, shares)]
        for name, tensor in batch.tensors.items()
    }
    # One share counts what was skipped on the way.
    bad_samples = batch.bad_samples if number == 0 else []
    return dataclasses.replace(batch, tensors=tensors, bad_samples=bad_samples)
