"""What `pretrain()` asks for: a model, and iterators over batches."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
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

from examples.mimo.checkpoint.description import TOKENIZER, TRACKER, check_same_model
from examples.mimo.checkpoint.resuming import check_same_optimizer, has_random_states
from examples.mimo.cli.flags import SHARDED
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, collate, collate_packed, take_share
from examples.mimo.data.conversation import Sample, SampleReader
from examples.mimo.data.datasets import ConversationDataset, MockDataset
from examples.mimo.data.tokenizer import holds_tokenizer, load_tokenizer
from examples.mimo.model.mimo import StageMimoModel, build_mimo_model, freeze_parts
from examples.mimo.parallel.noncolocated import build_noncolocated_model, finalize_noncolocated
from examples.mimo.parallel.placement import LANGUAGE
from examples.mimo.parallel.replicas import EncoderGroups, encoder_groups
from examples.mimo.shards.mixtures import read_mixture
from examples.mimo.training.layout import (
    colocated_encoder_tp,
    cp_multiple,
    module_of_rank,
    padding_multiple,
    placements,
)


def transformer_config(args: argparse.Namespace) -> Any:
    """The language model's TransformerConfig; rows differ in length from batch to batch."""
    config = core_transformer_config_from_args(args)
    staged = args.pipeline_model_parallel_size > 1 or bool(args.encoder_ranks)
    config.variable_seq_lengths = staged
    return config


@functools.cache
def _encoder_groups(tensor_parallel_size: int) -> EncoderGroups | None:
    """A run's groups are made once, by all ranks, for all chunks of the model."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return encoder_groups(tensor_parallel_size, groups)


def check_inputs(args: argparse.Namespace, mimo: MimoConfig) -> None:
    """ValueError for a folder that is not there, before anything is built."""
    start = args.pretrained_checkpoint
    resumes = args.load and (Path(args.load) / TRACKER).is_file()
    if args.load and not resumes and args.load != args.save and not start:
        raise ValueError(f"--load {args.load}: no checkpoint in this folder")
    if start and not resumes and not (Path(start) / TRACKER).is_file():
        raise ValueError(f"--pretrained-checkpoint {start}: no checkpoint in this folder")
    for flag in ("load", "pretrained_checkpoint", "save"):
        folder = getattr(args, flag)
        if folder:
            check_same_model(f"--{flag.replace('_', '-')}", Path(folder), mimo)
    if resumes and not args.finetune and not args.no_load_optim:
        check_same_optimizer(Path(args.load), args.use_distributed_optimizer)
    if resumes and args.encoder_ranks:
        sizes = args.encoder_tensor_model_parallel_size
        if not has_random_states(Path(args.load), sizes):
            args.no_load_rng = True
    if is_sharded(args):
        _shards(args, mimo)
        read_mixture(Path(args.data_path[0]), args.train_split)
        if args.eval_iters:
            read_mixture(Path(args.data_path[0]), args.valid_split)
    elif args.dataset_provider != "mock":
        DATASETS[args.dataset_provider](args, mimo, 1, 1)


def model_provider(
    mimo: MimoConfig,
    grids: dict[str, HyperCommGrid] | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> StageMimoModel:
    """The part of the model that this rank holds, with the parts of `--freeze` frozen.

    `grids` are those of modules on ranks of their own.
    """
    args = get_args()
    config = config or transformer_config(args)
    model: StageMimoModel
    if grids:
        config.finalize_model_grads_func = finalize_noncolocated
        model = build_noncolocated_model(
            mimo, config, pg_collection, placements(args), grids, pre_process, post_process
        )
    else:
        groups = _encoder_groups(colocated_encoder_tp(args))
        if groups:
            config.finalize_model_grads_func = groups.finalizer()
        model = build_mimo_model(
            mimo,
            config,
            pg_collection,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            encoder_groups=groups,
        )
    freeze_parts(model, args.freeze)
    return model


def tokenizer_path(args: argparse.Namespace) -> Path | None:
    """`--tokenizer-model`, else the data folder's, else that of the weights, else none."""
    if args.tokenizer_model:
        return Path(args.tokenizer_model)
    if args.data_path and holds_tokenizer(Path(args.data_path[0])):
        return Path(args.data_path[0])
    start = starting_point(args)
    if start and (start / TOKENIZER).is_dir():
        return start / TOKENIZER
    return None


def starting_point(args: argparse.Namespace) -> Path | None:
    """The folder of the weights a run begins with, if it does not begin with random ones."""
    for folder in (args.load, args.pretrained_checkpoint):
        if folder and (Path(folder) / TRACKER).is_file():
            return Path(folder)
    return None


def data_provider(
    mimo: MimoConfig, num_samples: tuple[int, int, int], vp_stage: int | None = None
) -> tuple[Iterator[Batch], Iterator[Batch] | None, None]:
    """Training and validation iterators of this data-parallel rank; there is no test split."""
    args = get_args()
    multiple = padding_multiple(args)
    if is_sharded(args):
        # The observer's module imports this one.
        from examples.mimo.cli.observer import BAD_SAMPLES

        module, reader = _shards(args, mimo)
        collate_valid = functools.partial(collate, multiple=multiple)
        # A replica of a non-colocated encoder reads for one replica of the language model, for
        # several, or encodes a share of one's media.
        replica, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        shares = max(1, replicas // args.data_parallel_size)
        served = args.data_parallel_size * shares // replicas
        first = replica // shares * served
        options = shard_options(args, module.ShardOptions, range(first, first + served))
        share = functools.partial(_collate_share, number=replica % shares, shares=shares)
        collate_train = functools.partial(share, _collate(args))
        collate_valid = functools.partial(share, collate_valid)
        train, valid = module.shard_iterators(
            options, reader, collate_train, collate_valid, BAD_SAMPLES
        )
        return train, valid, None
    build = DATASETS[args.dataset_provider]
    train, valid = build(args, mimo, num_samples[0], num_samples[1] or 0)
    train_iterator = _batches(
        train, args.consumed_train_samples, args.micro_batch_size, args.num_workers, _collate(args)
    )
    if valid is None or args.eval_iters == 0:
        return train_iterator, None, None
    valid_iterator = _batches(
        valid,
        args.consumed_valid_samples,
        args.eval_micro_batch_size,
        args.num_workers,
        functools.partial(collate, multiple=multiple),
    )
    return train_iterator, valid_iterator, None


def _mock(
    args: argparse.Namespace, mimo: MimoConfig, num_train: int, num_valid: int
) -> tuple[Dataset, Dataset]:
    return (
        MockDataset(mimo, args.seq_length, num_train, args.seed),
        MockDataset(mimo, args.seq_length, num_valid, args.seed + 1),
    )


def _conversations(
    args: argparse.Namespace, mimo: MimoConfig, num_train: int, num_valid: int
) -> tuple[Dataset, Dataset]:
    reader = _reader(args, mimo)
    root, varied = Path(args.data_path[0]), dataclasses.replace(reader, augment=args.augment)
    train = ConversationDataset(root, args.train_split, varied, num_train, args.seed, shuffle=True)
    valid = ConversationDataset(root, args.valid_split, reader, num_valid, args.seed)
    return train, valid


def _reader(args: argparse.Namespace, mimo: MimoConfig) -> SampleReader:
    """What reads samples of `--data-path`; ValueError without the folder or a tokenizer."""
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
    return SampleReader(mimo, load_tokenizer(path), args.seq_length)


def is_sharded(args: argparse.Namespace) -> bool:
    """Whether samples come out of shards, which megatron-energon reads."""
    return args.dataset_provider in SHARDED


def _shards(args: argparse.Namespace, mimo: MimoConfig) -> tuple[Any, SampleReader]:
    """`training/shards.py`, which needs energon, and what reads its samples."""
    try:
        module = importlib.import_module("examples.mimo.shards.resume")
    except ImportError as error:
        raise ValueError(
            f"--dataset-provider {args.dataset_provider} needs megatron-energon ({error}): "
            "pip install 'mimo-examples[data]'"
        ) from None
    return module, _reader(args, mimo)


def shard_options(args: argparse.Namespace, options_class: type[Any], replicas: range) -> Any:
    """The flags about shards as a `ShardOptions`, whose module needs energon."""
    resumes = args.load and getattr(args, "iteration", 0) and not args.finetune
    samples = args.eval_iters * (args.eval_global_batch_size or 0) // args.data_parallel_size
    # Only the language model's first context-parallel rank saves; a dry run has no ranks.
    running = torch.distributed.is_initialized()
    saves = running and mpu.get_context_parallel_rank() == 0
    return options_class(
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


DATASETS: dict[str, Callable[..., tuple[Dataset, Dataset]]] = {
    "mock": _mock,
    "conversations": _conversations,
    "spoken_questions": _conversations,
}


def _batches(
    dataset: Dataset[Sample],
    consumed: int,
    micro_batch_size: int,
    num_workers: int,
    collate_fn: Callable[[Sequence[Sample]], Batch],
) -> Iterator[Batch]:
    """Micro-batches from sample `consumed` on.

    An encoder's copy on ranks of its own works for one copy of the language model, for several,
    whose micro-batches it then reads as one, or for a share of one's media.
    """
    if consumed >= len(dataset):  # type: ignore[arg-type]
        return iter(())
    copy, copies = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    shares = max(1, copies // get_args().data_parallel_size)
    if shares > 1:
        share = {"number": copy % shares, "shares": shares}
        collate_fn = functools.partial(_collate_share, collate_fn, **share)
    readers = copies // shares
    sampler = MegatronPretrainingSampler(
        total_samples=len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size * (get_args().data_parallel_size // readers),
        data_parallel_rank=copy // shares,
        data_parallel_size=readers,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate_fn,
    )
    return iter(loader)


def _collate_share(
    collate_fn: Callable[[Sequence[Sample]], Batch],
    samples: Sequence[Sample],
    number: int,
    shares: int,
) -> Batch:
    return take_share(collate_fn(samples), number, shares)


def _collate(args: argparse.Namespace) -> Callable[[Sequence[Sample]], Batch]:
    if not args.pack_sequences:
        return functools.partial(collate, multiple=padding_multiple(args))
    # Rows that are filled from a buffer all have one length.
    multiple = args.total_seq_length if args.packing_buffer_size else padding_multiple(args)
    return functools.partial(collate_packed, multiple=multiple, sample_multiple=cp_multiple(args))


def first_batches(args: argparse.Namespace, mimo: MimoConfig, num_samples: int) -> list[Batch]:
    """The first samples of the training data in micro-batches, without a process group."""
    size = args.micro_batch_size
    if is_sharded(args):
        module, reader = _shards(args, mimo)
        count = max(1, num_samples // size)
        options = shard_options(args, module.ShardOptions, range(1))
        return module.first_shard_batches(options, reader, _collate(args), count)
    dataset, _ = DATASETS[args.dataset_provider](args, mimo, num_samples, 0)
    starts = range(0, max(size, num_samples - size + 1), size)
    return [_collate(args)([dataset[start + i] for i in range(size)]) for start in starts]


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
