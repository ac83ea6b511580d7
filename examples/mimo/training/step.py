"""One micro-batch: read, broadcast, forward, loss."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from examples.mimo.data.batch import Batch, broadcast_batch
from examples.mimo.model.layers import device
from examples.mimo.model.mimo import MediaCountError, StageMimoModel
from examples.mimo.parallel.context import shard_sequence

Reduced = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


class Observer(Protocol):
    """What a run is told of a step; the commands' observer shows it to a person."""

    def enter(self, phase: str) -> None:
        """From here on this rank does this; `{iteration}` stands for the iteration."""

    def add_batch(self, batch: Batch, wait_seconds: float) -> None:
        """A micro-batch of training, and how long this rank waited for it."""


def forward_step(
    observer: Observer, data_iterator: Iterator[Batch] | None, model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Reduced]]:
    """This stage's output for the next micro-batch, and the function that makes it a loss.

    In evaluation the last stage returns logits, from which come the loss and exact match.
    """
    stage: StageMimoModel = unwrap_model(model)
    where = "iteration {iteration}" if model.training else "evaluation after iteration {iteration}"
    observer.enter(f"{where}, reading a batch")
    batch = next_batch(observer, data_iterator, stage)
    observer.enter(f"{where}, computing")
    try:
        output = model(
            input_ids=batch.input_ids,
            labels=batch.labels if model.training else None,
            modality_inputs=batch.modality_inputs,
            cu_seqlens=batch.cu_seqlens,
        )
    except MediaCountError as error:
        raise ValueError(error.explain(batch.items)) from None
    reduce = training_loss if model.training else functools.partial(evaluation_loss, stage)
    return output, functools.partial(reduce, batch)


def next_batch(
    observer: Observer, data_iterator: Iterator[Batch] | None, stage: StageMimoModel
) -> Batch:
    """What this stage needs of the next micro-batch; labels and loss mask sharded like its output.

    One rank of a tensor-parallel group reads. A middle stage needs nothing but, where sequences
    are packed, the description with their `cu_seqlens`.
    """
    if not stage.needs and not get_args().pack_sequences:
        return Batch(batch_size=0, seq_length=0, num_tokens=0, keys=[])
    start = time.perf_counter()
    group = mpu.get_tensor_model_parallel_group()
    read = next(data_iterator) if data_iterator is not None and group.rank() == 0 else None
    batch = broadcast_batch(read, group, device(), stage.needs)
    if stage.training:
        observer.add_batch(batch, time.perf_counter() - start)
    # The model's outputs are shards of the sequence, (B, S / CP).
    for name in stage.needs & {"labels", "loss_mask"}:
        batch.tensors[name] = shard_sequence(
            batch.tensors[name], 1, mpu.get_context_parallel_group(), batch.cu_seqlens
        )
    return batch


def training_loss(batch: Batch, losses: torch.Tensor) -> Reduced:
    """(B, S / CP) per-token losses -> their sum over targets, the number of targets, a report.

    Megatron divides the sum over all micro-batches and ranks by the number over all of them.
    """
    assert batch.loss_mask is not None
    mask = batch.loss_mask
    total = (losses.float() * mask).sum()
    if not torch.isfinite(total):
        raise ValueError(
            f"the loss of iteration {get_args().curr_iteration + 1} is {total.item()}; its "
            f"samples are {', '.join(batch.keys)}; lower --lr or look at these samples"
        )
    count = mask.sum()
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def evaluation_loss(stage: StageMimoModel, batch: Batch, logits: torch.Tensor) -> Reduced:
    """(B, S / CP, V / TP) logits -> the sum of losses, and exact match.

    A sequence whose every target is the argmax is what greedy decoding would answer.
    """
    assert batch.loss_mask is not None
    assert batch.labels is not None
    best = parallel_argmax(logits)
    losses = stage.language_model.compute_language_model_loss(
        batch.labels, logits.transpose(0, 1).contiguous()
    )
    mask = batch.loss_mask
    total, count = (losses.float() * mask).sum(), mask.sum()
    # Of a sequence that is sharded along its length all parts must be right.
    per_sequence = torch.stack([((best != batch.labels) * mask).sum(dim=1), mask.sum(dim=1)])
    dist.all_reduce(per_sequence, group=mpu.get_context_parallel_group())
    num_wrong, num_targets = per_sequence
    is_right = (num_wrong == 0) & (num_targets > 0)
    report = {
        "lm loss": torch.stack([total, count]),
        "exact match": torch.stack([is_right.sum(), (num_targets > 0).sum()]).float(),
    }
    return total, count.int(), report


def parallel_argmax(logits: torch.Tensor) -> torch.Tensor:
    """(..., V / TP) -> (...): the best token over all tensor-parallel ranks' vocabularies."""
    values, indices = logits.float().max(dim=-1)
    indices = indices + mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return indices
    all_values = [torch.empty_like(values) for _ in range(group.size())]
    all_indices = [torch.empty_like(indices) for _ in range(group.size())]
    dist.all_gather(all_values, values.contiguous(), group=group)
    dist.all_gather(all_indices, indices.contiguous(), group=group)
    winner = torch.stack(all_values).argmax(dim=0, keepdim=True)
    return torch.stack(all_indices).gather(0, winner).squeeze(0)
