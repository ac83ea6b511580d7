"""One micro-batch: read, share, forward, loss."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from examples.mimo.cli import observer
from examples.mimo.cli.observer import BAD_SAMPLES, COUNTERS
from examples.mimo.data.batch import Batch, Needs, share_batch
from examples.mimo.model.layers import device
from examples.mimo.model.mimo import MediaCountError, StageMimoModel
from examples.mimo.parallel.context import shard_sequence

Reduced = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def forward_step(
    data_iterator: Iterator[Batch] | None, model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Reduced]]:
    """This stage's output for the next micro-batch, and the function that makes it a loss.

    In evaluation the last stage returns logits, from which come the loss and exact match.
    """
    stage: StageMimoModel = unwrap_model(model)
    where = "iteration {iteration}" if model.training else "evaluation after iteration {iteration}"
    observer.enter(f"{where}, reading a batch")
    batch = shard_targets(next_batch(data_iterator, stage))
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


def next_batch(data_iterator: Iterator[Batch] | None, stage: StageMimoModel) -> Batch:
    """What this stage needs of the next micro-batch; a middle stage needs a packed row's bounds."""
    if stage.needs == Needs() and not get_args().pack_sequences:
        return Batch(batch_size=0, seq_length=0, num_tokens=0, keys=[])
    start = time.perf_counter()
    group = mpu.get_tensor_model_parallel_group()
    batch = next(data_iterator) if data_iterator is not None and group.rank() == 0 else None
    shared = share_batch(batch, group, device(), stage.needs)
    if stage.training:
        BAD_SAMPLES.add(get_args(), shared.refused)
        COUNTERS.add(shared, time.perf_counter() - start)
    return shared


def shard_targets(batch: Batch) -> Batch:
    """Labels and loss mask (B, S) -> (B, S / CP), as the model's outputs are sharded."""
    group = mpu.get_context_parallel_group()
    if group.size() == 1 or batch.labels is None or batch.loss_mask is None:
        return batch
    return dataclasses.replace(
        batch,
        labels=shard_sequence(batch.labels, 1, group, batch.cu_seqlens),
        loss_mask=shard_sequence(batch.loss_mask, 1, group, batch.cu_seqlens),
    )


def training_loss(batch: Batch, losses: torch.Tensor) -> Reduced:
    """(B, S / CP) per-token losses -> their sum over target tokens, the number of those, a report.

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
    """(B, S / CP, V / TP) logits -> the sum of losses, and rows whose every target is the argmax.

    Such a row is what greedy decoding would answer, so this is exact match.
    """
    assert batch.loss_mask is not None
    assert batch.labels is not None
    best = parallel_argmax(logits)
    losses = stage.language_model.compute_language_model_loss(
        batch.labels, logits.transpose(0, 1).contiguous()
    )
    mask = batch.loss_mask
    total, count = (losses.float() * mask).sum(), mask.sum()
    # Of a row that is sharded along its length all parts must be right.
    per_row = torch.stack([((best != batch.labels) * mask).sum(dim=1), mask.sum(dim=1)])
    dist.all_reduce(per_row, group=mpu.get_context_parallel_group())
    wrong, asked = per_row
    right = (wrong == 0) & (asked > 0)
    report = {
        "lm loss": torch.stack([total, count]),
        "exact match": torch.stack([right.sum(), (asked > 0).sum()]).float(),
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
