"""Model provider, data provider, forward step and loss for Megatron's `pretrain()`."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader, Dataset

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, collate, locate
from examples.mimo.data.conversation import BadSampleCount, Sample
from examples.mimo.model.layers import device
from examples.mimo.model.mimo import StageMimoModel, build_mimo_model
from examples.mimo.model.parts import EncodersAhead, MediaCountError, freeze_parts
from examples.mimo.parallel import noncolocated
from examples.mimo.parallel.context import broadcast_batch, parallel_argmax, shard_targets
from examples.mimo.parallel.placement import EncoderReplicas, create_encoder_replicas
from examples.mimo.training.inputs import (
    DATASETS,
    Collate,
    Observer,
    collate_function,
    fresh_parts,
    from_shards,
    is_sharded,
    sample_encoder,
    shard_options,
)
from examples.mimo.training.layout import (
    colocated_encoder_tp,
    data_share,
    padding_multiple,
    placements,
)

# What Megatron expects of a loss function: a sum, the number of tokens in it, and what to log.
Reduced = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def transformer_config(args: argparse.Namespace) -> Any:
    """Megatron's TransformerConfig of the language model."""
    config = core_transformer_config_from_args(args)
    # Batches differ in sequence length, which receiving stages must be told.
    config.variable_seq_lengths = args.pipeline_model_parallel_size > 1 or bool(args.encoder_ranks)
    return config


@functools.cache
def _encoder_replicas(tensor_parallel_size: int) -> EncoderReplicas | None:
    """A run's groups are made once, by all ranks, for all virtual stages of the model."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return create_encoder_replicas(tensor_parallel_size, groups)


def model_provider(
    mimo_config: MimoConfig,
    grids: dict[str, HyperCommGrid] | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> StageMimoModel:
    """The part of the model that this rank holds, with the parts of `--freeze` frozen.

    `grids` are those of non-colocated modules. `config` is Megatron's name for its
    TransformerConfig, by which it passes it.
    """
    args = get_args()
    config = config or transformer_config(args)
    model: StageMimoModel
    if grids:
        config.finalize_model_grads_func = noncolocated.finalize_noncolocated
        model = noncolocated.build_noncolocated_model(
            mimo_config, config, pg_collection, placements(args), grids, pre_process, post_process
        )
    else:
        # Without replicas the schedule calls Megatron's `finalize_model_grads`; model/mimo.py says
        # which gradients of encoders each of the three sums.
        replicas = _encoder_replicas(colocated_encoder_tp(args))
        if replicas:
            config.finalize_model_grads_func = replicas.finalizer()
        model = build_mimo_model(
            mimo_config, config, pg_collection, pre_process, post_process, vp_stage, replicas
        )
    freeze_parts(model, args.freeze)
    model.fresh_parts = fresh_parts(args)
    return model


def data_provider(
    config: MimoConfig,
    bad_samples: BadSampleCount,
    num_samples: tuple[int, int, int],
    vp_stage: int | None = None,
) -> tuple[Iterator[Batch], Iterator[Batch] | None, None]:
    """Training and validation iterators of this data-parallel rank; there is no test split.

    `bad_samples` is the run's count, which checkpoints of shards save and restore.
    """
    args = get_args()
    collate_train = collate_function(args)
    collate_valid = functools.partial(collate, multiple=padding_multiple(args))  # not packed
    if is_sharded(args):
        shard_iterators = from_shards(args, "shard_iterators")
        encoder = sample_encoder(args, config)
        share = data_share(args.data_parallel_size)
        options = shard_options(args, share.replicas)
        collates = share.of(collate_train), share.of(collate_valid)
        return *shard_iterators(options, encoder, *collates, bad_samples), None
    build = DATASETS[args.dataset_provider]
    train, valid = build(args, config, num_samples[0], num_samples[1] or 0)
    consumed, size = args.consumed_train_samples, args.micro_batch_size
    train_iterator = _batches(args, train, consumed, size, collate_train)
    if valid is None or args.eval_iters == 0:
        return train_iterator, None, None
    consumed, size = args.consumed_valid_samples, args.eval_micro_batch_size
    return train_iterator, _batches(args, valid, consumed, size, collate_valid), None


def _batches(
    args: argparse.Namespace,
    dataset: Dataset[Sample],
    consumed: int,
    micro_batch_size: int,
    collate_fn: Collate,
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches from sample `consumed` on."""
    if consumed >= len(dataset):  # type: ignore[arg-type]
        return iter(())
    share = data_share(args.data_parallel_size)
    served = len(share.replicas)
    sampler = MegatronPretrainingSampler(
        total_samples=len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size * served,  # an encoder replica may serve several
        data_parallel_rank=share.replicas.start // served,
        data_parallel_size=args.data_parallel_size // served,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        collate_fn=share.of(collate_fn),
        # Else it draws from torch's own, with which ranks that do not read drop out alike.
        generator=torch.Generator(),
    )
    return iter(loader)


def forward_step(
    observer: Observer,
    ahead: EncodersAhead | None,
    data_iterator: Iterator[Batch] | None,
    model: torch.nn.Module,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], Reduced]]:
    """This stage's output for the next micro-batch, and the function that makes it a loss.

    In evaluation the last stage returns logits, from which come the loss and exact match.
    """
    stage: StageMimoModel = unwrap_model(model)
    where = "iteration {iteration}" if model.training else "evaluation after iteration {iteration}"
    observer.enter(f"{where}, reading a batch")
    read, features = functools.partial(next_batch, observer, data_iterator, stage), None
    if ahead and model.training and stage.pre_process:
        batch, features = ahead.next(stage, read)
    else:
        batch = read()
    observer.enter(f"{where}, computing")
    try:
        output = model(
            input_ids=batch.input_ids,
            labels=batch.labels if model.training else None,  # without labels it returns logits
            modality_inputs=batch.modality_inputs,
            cu_seqlens=batch.cu_seqlens,
            placeholders=batch.placeholders,
            target_positions=batch.tensors.get("target_positions"),
            features=features,
        )
    except MediaCountError as error:
        raise ValueError(error.explain(batch.items)) from None
    if model.training:
        return output, functools.partial(training_loss, observer, batch)
    return output, functools.partial(evaluation_loss, stage, batch)


def next_batch(
    observer: Observer, data_iterator: Iterator[Batch] | None, stage: StageMimoModel
) -> Batch:
    """What this stage needs of the next micro-batch.

    One rank of a tensor-parallel group reads. A middle stage needs nothing but, where sequences
    are packed, the description with their `cu_seqlens`.
    """
    if not stage.needs and not get_args().pack_sequences:
        return Batch(batch_size=0, seq_length=0, num_tokens=0, keys=[])
    start = time.perf_counter()
    group = mpu.get_tensor_model_parallel_group()
    read = None
    if data_iterator is not None and group.rank() == 0:
        read = next(data_iterator)
        shard_targets(read, mpu.get_context_parallel_group())
        locate(read, stage.special_token_ids)
    batch = broadcast_batch(read, group, device(), stage.needs)
    # Every virtual stage reads a packed batch for itself; the first one counts it.
    if stage.training and not (get_args().pack_sequences and stage.vp_stage):
        observer.add_batch(batch, time.perf_counter() - start)
    return batch


def training_loss(observer: Observer, batch: Batch, losses: torch.Tensor) -> Reduced:
    """(1, n) losses of the targets -> their sum, the number of targets, metrics.

    Megatron divides the sum over all micro-batches and ranks by the number over all of them.
    """
    assert batch.loss_mask is not None
    total, count = (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()
    # Whether it is finite is checked once an iteration: here the host would wait for it.
    observer.add_loss(total.detach(), batch.keys)
    return total, count.int(), {"lm loss": torch.stack([total.detach(), count])}


def evaluation_loss(stage: StageMimoModel, batch: Batch, logits: torch.Tensor) -> Reduced:
    """(1, n, V / TP) logits of the targets -> the sum of losses, and exact match.

    A sequence whose every target is the argmax is what greedy decoding would answer.
    """
    labels, mask = batch.labels, batch.loss_mask
    assert labels is not None
    assert mask is not None
    losses = stage.language_model.compute_language_model_loss(
        labels, logits.transpose(0, 1).contiguous()
    )
    total, count = (losses.float() * mask).sum(), mask.sum()
    # Of a sequence that is sharded along its length all parts must be right.
    counted = torch.cat([(parallel_argmax(logits) != labels) * mask, mask])
    sequence = batch.tensors["target_positions"] % batch.batch_size
    per_sequence = mask.new_zeros(2, batch.batch_size).index_add(1, sequence, counted)
    dist.all_reduce(per_sequence, group=mpu.get_context_parallel_group())
    num_wrong, num_targets = per_sequence
    is_right = (num_wrong == 0) & (num_targets > 0)
    metrics = {
        "lm loss": torch.stack([total, count]),
        "exact match": torch.stack([is_right.sum(), (num_targets > 0).sum()]).float(),
    }
    return total, count.int(), metrics
