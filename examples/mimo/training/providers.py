"""What `pretrain()` asks for: a model, and iterators over batches."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_args
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader, Dataset

from examples.mimo.checkpoint.description import TOKENIZER, TRACKER
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, collate, collate_packed
from examples.mimo.data.conversation import BadSampleCount, Sample, SampleEncoder
from examples.mimo.data.datasets import ConversationDataset, MockDataset
from examples.mimo.data.tokenizer import holds_tokenizer, load_tokenizer
from examples.mimo.model.mimo import StageMimoModel, build_mimo_model
from examples.mimo.model.parts import freeze_parts
from examples.mimo.parallel import noncolocated
from examples.mimo.parallel.placement import LANGUAGE
from examples.mimo.parallel.replicas import EncoderReplicas, create_encoder_replicas
from examples.mimo.training.layout import (
    colocated_encoder_tp,
    cp_multiple,
    data_share,
    module_of_rank,
    padding_multiple,
    placements,
)

Collate = Callable[[Sequence[Sample]], Batch]


def transformer_config(args: argparse.Namespace) -> Any:
    """Megatron's TransformerConfig of the language model."""
    config = core_transformer_config_from_args(args)
    # Batches differ in sequence length, which receiving stages must be told.
    config.variable_seq_lengths = args.pipeline_model_parallel_size > 1 or bool(args.encoder_ranks)
    return config


def prepare_noncolocated(
    args: argparse.Namespace, install: Callable[[dict[str, Any], Callable[..., Any]], None]
) -> noncolocated.NonColocatedRun:
    """What `pretrain()` is given under --encoder-ranks: process groups and bridges."""
    if not args.encoder_ranks:
        return noncolocated.NonColocatedRun()
    return noncolocated.prepare(
        placements(args),
        args.rank,
        transformer_config(args),
        install,
        local_rank=args.local_rank,
        process_group={
            "backend": args.distributed_backend,
            "rank": args.rank,
            "world_size": args.world_size,
            "timeout": timedelta(minutes=args.distributed_timeout_minutes),
        },
        parallel_state_options={
            "create_gloo_process_groups": args.use_gloo_process_groups,
            "nccl_communicator_config_path": args.nccl_communicator_config_path,
            "high_priority_stream_groups": args.high_priority_stream_groups,
            "distributed_timeout_minutes": args.distributed_timeout_minutes,
        },
        random_state=(
            args.seed,
            args.data_parallel_random_init,
            args.te_rng_tracker,
            args.inference_rng_tracker,
        ),
    )


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
    collate_train = _collate(args)
    collate_valid = functools.partial(collate, multiple=padding_multiple(args))
    if is_sharded(args):
        shard_iterators, encoder = _shards(args, "shard_iterators"), sample_encoder(args, config)
        share = data_share(args.data_parallel_size)
        options = shard_options(args, share.replicas)
        collates = share.of(collate_train), share.of(collate_valid)
        return *shard_iterators(options, encoder, *collates, bad_samples), None
    build = DATASETS[args.dataset_provider]
    train, valid = build(args, config, num_samples[0], num_samples[1] or 0)
    consumed, size = args.consumed_train_samples, args.micro_batch_size
    train_iterator = _batches(train, consumed, size, args.num_workers, collate_train)
    if valid is None or args.eval_iters == 0:
        return train_iterator, None, None
    consumed, size = args.consumed_valid_samples, args.eval_micro_batch_size
    return train_iterator, _batches(valid, consumed, size, args.num_workers, collate_valid), None


Datasets = tuple[Dataset, Dataset | None]


def mock_datasets(
    args: argparse.Namespace, config: MimoConfig, num_train: int, num_valid: int
) -> Datasets:
    """Random samples of any model, without files."""
    return (
        MockDataset(config, args.seq_length, num_train, args.seed),
        MockDataset(config, args.seq_length, num_valid, args.seed + 1),
    )


def conversation_datasets(
    args: argparse.Namespace, config: MimoConfig, num_train: int, num_valid: int
) -> Datasets:
    """A JSON-lines file a split in `--data-path`; without evaluation no validation split."""
    encoder = sample_encoder(args, config)
    root, bad = Path(args.data_path[0]), args.max_bad_samples
    varied = dataclasses.replace(encoder, augment=args.augment)
    split, seed = args.train_split, args.seed
    train = ConversationDataset(root, split, varied, num_train, seed, True, bad)
    if not args.eval_iters:
        return train, None
    split = args.valid_split
    return train, ConversationDataset(root, split, encoder, num_valid, seed, False, bad)


# A function, or a module that energon is needed for and the name of what makes its iterators.
SHARDS = "examples.mimo.shards.resume"
DATASETS: dict[str, Any] = {
    "mock": mock_datasets,
    "conversations": conversation_datasets,
    "spoken_questions": conversation_datasets,
    "energon": SHARDS,
    # Upstream's names for its own data in shards.
    "llava_avlm": SHARDS,
    "llava_vlm": SHARDS,
    "video_llava_vlm": SHARDS,
}


def is_sharded(args: argparse.Namespace) -> bool:
    """Whether samples come out of shards, which megatron-energon reads."""
    return DATASETS[args.dataset_provider] == SHARDS


def _shards(args: argparse.Namespace, function: str) -> Any:
    """A function of the room that reads shards; the example names it nowhere else."""
    try:
        return getattr(importlib.import_module(SHARDS), function)
    except ImportError as error:
        raise ValueError(
            f"--dataset-provider {args.dataset_provider} needs megatron-energon ({error}): "
            "pip install 'mimo-examples[data]'"
        ) from None


def shard_options(args: argparse.Namespace, replicas: range) -> Any:
    """The flags about shards as a `ShardOptions`, for a rank that reads for `replicas`."""
    resumes = args.load and getattr(args, "iteration", 0) and not args.finetune
    samples = args.eval_iters * (args.eval_global_batch_size or 0) // args.data_parallel_size
    # Only the language model's first context-parallel rank saves; a dry run has no ranks.
    running = torch.distributed.is_initialized()
    saves = running and mpu.get_context_parallel_rank() == 0
    return _shards(args, "ShardOptions")(
        data_path=Path(args.data_path[0]),
        train_split=args.train_split,
        valid_split=args.valid_split,
        data_parallel_size=args.data_parallel_size,
        replicas=replicas,
        micro_batch_size=args.micro_batch_size,
        num_workers=args.num_workers,
        shuffle_buffer_size=args.shuffle_buffer_size,
        max_bad_samples=args.max_bad_samples,
        seed=args.seed,
        augment=args.augment,
        packing_buffer_size=args.packing_buffer_size or 0,
        packed_seq_length=args.total_seq_length or 0,
        sample_multiple=cp_multiple(args),
        eval_micro_batch_size=args.eval_micro_batch_size,
        eval_batches=samples // args.eval_micro_batch_size if args.eval_iters else 0,
        checkpoint=Path(args.load) / f"iter_{args.iteration:07d}" if resumes else None,
        saves_state=saves and module_of_rank(args) in (None, LANGUAGE),
    )


def sample_encoder(args: argparse.Namespace, config: MimoConfig) -> SampleEncoder:
    """What encodes samples of `--data-path`; ValueError without the folder or a tokenizer."""
    if not args.data_path:
        raise ValueError(f"--dataset-provider {args.dataset_provider} needs --data-path FOLDER")
    root = Path(args.data_path[0])
    if not root.exists():
        raise ValueError(f"--data-path {root}: no such folder; prepare_data.py makes one")
    path = tokenizer_path(args)
    if path is None:
        raise ValueError(
            f"--data-path {root}: no tokenizer.model in it; name one with --tokenizer-model"
        )
    return SampleEncoder(config, load_tokenizer(path), args.seq_length)


def tokenizer_path(args: argparse.Namespace) -> Path | None:
    """`--tokenizer-model`, else the data folder's, else that of the weights, else none."""
    if args.tokenizer_model:
        return Path(args.tokenizer_model)
    if args.data_path and holds_tokenizer(Path(args.data_path[0])):
        return Path(args.data_path[0])
    start = starting_point(args)
    return start / TOKENIZER if start and (start / TOKENIZER).is_dir() else None


def starting_point(args: argparse.Namespace) -> Path | None:
    """The folder of the weights a run begins with, if it does not begin with random ones."""
    for folder in (args.load, args.pretrained_checkpoint):
        if folder and (Path(folder) / TRACKER).is_file():
            return Path(folder)
    return None


def fresh_parts(args: argparse.Namespace) -> tuple[str, ...]:
    """The parts that keep their random weights when this run loads; none when it resumes."""
    resumes = args.load and (Path(args.load) / TRACKER).is_file() and not args.finetune
    return () if resumes else tuple(args.fresh)


def check_data(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError for data that is not there, before anything is built."""
    if not is_sharded(args):
        DATASETS[args.dataset_provider](args, config, 1, 1)
        return
    read_mixture = _shards(args, "read_mixture")
    sample_encoder(args, config)
    for split in (args.train_split, args.valid_split)[: 2 if args.eval_iters else 1]:
        read_mixture(Path(args.data_path[0]), split)


def _batches(
    dataset: Dataset[Sample],
    consumed: int,
    micro_batch_size: int,
    num_workers: int,
    collate_fn: Collate,
) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches from sample `consumed` on."""
    if consumed >= len(dataset):  # type: ignore[arg-type]
        return iter(())
    share = data_share(get_args().data_parallel_size)
    served = len(share.replicas)
    sampler = MegatronPretrainingSampler(
        total_samples=len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size * served,
        data_parallel_rank=share.replicas.start // served,
        data_parallel_size=get_args().data_parallel_size // served,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=share.of(collate_fn),
    )
    return iter(loader)


def _collate(args: argparse.Namespace) -> Collate:
    if not args.pack_sequences:
        return functools.partial(collate, multiple=padding_multiple(args))
    # Sequences that are filled from a buffer all have one length.
    multiple = args.total_seq_length if args.packing_buffer_size else padding_multiple(args)
    return functools.partial(collate_packed, multiple=multiple, sample_multiple=cp_multiple(args))


def first_batches(args: argparse.Namespace, config: MimoConfig, num_samples: int) -> list[Batch]:
    """The first samples of the training data in micro-batches, without a process group."""
    size = args.micro_batch_size
    if is_sharded(args):
        read_first, encoder = _shards(args, "first_shard_batches"), sample_encoder(args, config)
        options = shard_options(args, range(1))
        return read_first(options, encoder, _collate(args), max(1, num_samples // size))
    dataset, _ = DATASETS[args.dataset_provider](args, config, num_samples, 0)
    starts = range(0, max(size, num_samples - size + 1), size)
    return [_collate(args)([dataset[start + i] for i in range(size)]) for start in starts]
