"""Parallel layout of a run, from its arguments: stages, replicas, non-colocated encoders.

`RunShape` holds the same as plain values, for code that does not know Megatron's arguments.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.fp8_utils import get_fp8_align_size

from examples.mimo.checkpoint.loading import tensor_parallel_sizes
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch
from examples.mimo.data.conversation import Sample
from examples.mimo.parallel import noncolocated
from examples.mimo.parallel.placement import LANGUAGE, Placement, here, take_share

# 16 bytes of FP4, which a GPU loads at once. Megatron's `get_fp4_align_size` is for groups of
# experts, which share a launch.
FP4_BLOCK = 32


@dataclass(frozen=True)
class RankGroup:
    """Ranks that hold the same layers: those of a pipeline stage, or of a non-colocated encoder."""

    label: str
    ranks: range
    module: str | None = None
    stage: int = 0


@dataclass(frozen=True)
class RunShape:
    """A run's layout, batch sizes and numerics.

    `placements` are those of non-colocated encoders and, last, of the language model; empty when
    all parts are colocated. `language_ranks` counts the processes that hold the language model.
    """

    world_size: int
    language_ranks: int
    tp: int
    pp: int
    cp: int
    virtual_stages: int | None
    encoder_tp: Mapping[str, int]
    placements: tuple[Placement, ...]
    sequence_parallel: bool
    local_layers: bool
    micro_batch_size: int
    global_batch_size: int | None
    seq_length: int
    frozen: frozenset[str]
    recompute: bool
    distributed_optimizer: bool
    params_dtype: torch.dtype
    gradients_in_fp32: bool

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of an iteration on one data-parallel replica."""
        replicas = self.language_ranks // (self.tp * self.pp * self.cp)
        return max(1, (self.global_batch_size or 1) // (self.micro_batch_size * replicas))


def run_shape(args: argparse.Namespace) -> RunShape:
    """The shape of the run that `args` describe; encoder sizes must be filled in already."""
    return RunShape(
        world_size=args.world_size,
        language_ranks=language_processes(args),
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        virtual_stages=args.virtual_pipeline_model_parallel_size,
        encoder_tp=dict(args.encoder_tensor_model_parallel_size),
        placements=tuple(placements(args)),
        sequence_parallel=args.sequence_parallel,
        local_layers=args.transformer_impl == "local",
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        seq_length=args.seq_length,
        frozen=frozenset(args.freeze),
        recompute=args.recompute_granularity == "full",
        distributed_optimizer=args.use_distributed_optimizer,
        params_dtype=args.params_dtype,
        gradients_in_fp32=args.accumulate_allreduce_grads_in_fp32,
    )


def placements(args: argparse.Namespace) -> list[Placement]:
    """Every module with its ranks under --encoder-ranks, the language model last; else none."""
    if not args.encoder_ranks:
        return []
    tensor_parallel = args.encoder_tensor_model_parallel_size
    encoders = parse_ranks(args.encoder_ranks, tensor_parallel, args.world_size)
    language = Placement(
        LANGUAGE,
        language_ranks(encoders, args.world_size),
        args.tensor_model_parallel_size,
        args.context_parallel_size,
        args.pipeline_model_parallel_size,
    )
    check_world(len(language.ranks), args, "the language model's ")
    return [*encoder_placements(encoders, tensor_parallel, language.dp), language]


def module_of_rank(args: argparse.Namespace) -> str | None:
    """The one module that this rank holds when encoders are non-colocated; else None."""
    placed = placements(args)
    return here(placed, args.rank).name if placed else None


def language_processes(args: argparse.Namespace) -> int:
    """How many processes hold a part of the language model."""
    placed = placements(args)
    return len(placed[-1].ranks) if placed else int(args.world_size)


def check_world(processes: int, args: argparse.Namespace, whose: str = "") -> None:
    """ValueError unless the processes hold whole replicas of the language model."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp = args.context_parallel_size
    if processes % (tp * pp * cp):
        context = f" x --context-parallel-size {cp}" if cp > 1 else ""
        raise ValueError(
            f"{whose}{processes} processes cannot hold --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp}{context} = {tp * pp * cp}; start a multiple of "
            f"{tp * pp * cp}"
            + (" beside the encoders'" if whose else " with torchrun --nproc-per-node")
        )


def check_layout(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError unless the language model divides into the layout and the world holds it."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if not args.encoder_ranks:
        check_world(args.world_size, args)
    sizes = tensor_parallel_sizes(config, "language")
    flags = {f"--{path.split('.')[1].replace('_', '-')}": size for path, size in sizes.items()}
    _check_divisible(flags, "--tensor-model-parallel-size", tp)
    uneven = (
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.pipeline_model_parallel_layout
        or args.balance_stages
    )
    if args.num_layers % pp and not uneven:
        raise ValueError(
            f"--num-layers {args.num_layers} is not divisible by --pipeline-model-parallel-size "
            f"{pp}; choose a divisor, --balance-stages or --decoder-first-pipeline-num-layers"
        )
    if args.sequence_parallel and args.seq_length % tp:
        raise ValueError(
            f"--seq-length {args.seq_length} is not divisible by --tensor-model-parallel-size "
            f"{tp}, which --sequence-parallel needs"
        )
    if args.packing_buffer_size and args.total_seq_length % layout_multiple(args):
        raise ValueError(
            f"--total-seq-length {args.total_seq_length} is not divisible by "
            f"{layout_multiple(args)}, which this layout needs of a packed sequence"
        )


def check_encoder_layout(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError unless the encoders divide into their layout; fills in sizes not typed.

    Colocated encoders are split as the language model is, non-colocated ones not at all.
    """
    typed = encoder_tensor_parallel(args.encoder_tensor_model_parallel_size, config.inputs)
    default = 1 if args.encoder_ranks else args.tensor_model_parallel_size
    sizes = {name: typed.get(name, default) for name in config.inputs}
    args.encoder_tensor_model_parallel_size = sizes
    if args.encoder_ranks:
        _check_noncolocated(args)
    else:
        _check_colocated(args, colocated_encoder_tp(args))
    for name in config.inputs:
        for part in (f"{name}.encoder", f"{name}.projector"):
            widths = tensor_parallel_sizes(config, part)
            _check_divisible(widths, "--encoder-tensor-model-parallel-size", sizes[name])


def _check_colocated(args: argparse.Namespace, encoder_tp: int) -> None:
    tp = args.tensor_model_parallel_size
    if encoder_tp < 1 or tp % encoder_tp:
        raise ValueError(
            f"--tensor-model-parallel-size {tp} is not divisible by "
            f"--encoder-tensor-model-parallel-size {encoder_tp}; choose a divisor of it"
        )
    replicas = args.world_size // (args.pipeline_model_parallel_size * encoder_tp)
    if args.encoder_data_parallel_size not in (None, replicas):
        raise ValueError(
            f"--encoder-data-parallel-size {args.encoder_data_parallel_size}, but "
            f"{args.world_size} processes hold {replicas} replicas of the encoders at "
            f"--encoder-tensor-model-parallel-size {encoder_tp}; drop the flag"
        )


def _check_noncolocated(args: argparse.Namespace) -> None:
    for flag in ("use_tp_pp_dp_mapping", "use_sharp"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} would do nothing with --encoder-ranks")
    if args.num_distributed_optimizer_instances > 1:
        raise ValueError(
            '--encoder-ranks runs with one distributed-optimizer instance (Megatron: "MIMO '
            'optimizer does not yet support num_distributed_optimizer_instances > 1")'
        )
    for placement in placements(args)[:-1]:
        if args.encoder_data_parallel_size not in (None, placement.dp):
            raise ValueError(
                f"--encoder-data-parallel-size {args.encoder_data_parallel_size}, but "
                f"--encoder-ranks has room for {placement.dp} replicas of {placement.name}'s "
                "encoder; drop the flag"
            )


def _check_divisible(sizes: Mapping[str, int], flag: str, parts: int) -> None:
    for name, size in sizes.items():
        if size % parts:
            raise ValueError(
                f"{name} {size} is not divisible by {flag} {parts}; choose a divisor of {size}"
            )


def encoder_tensor_parallel(words: Iterable[str] | None, names: Iterable[str]) -> dict[str, int]:
    """`2` or `images=2 audios=1` -> modality -> size, of those that the words name."""
    names = list(names)
    sizes: dict[str, int] = {}
    for word in words or ():
        name, equals, number = word.rpartition("=")
        if not number.isdigit() or (equals and name not in names):
            raise ValueError(
                f"--encoder-tensor-model-parallel-size {word}: write a number, or NAME=NUMBER with "
                f"a name of {', '.join(names)}"
            )
        sizes |= dict.fromkeys([name] if equals else names, int(number))
    return sizes


def colocated_encoder_tp(args: argparse.Namespace) -> int:
    """The one tensor-parallel size of colocated encoders; ValueError if there are several."""
    sizes = args.encoder_tensor_model_parallel_size.values()
    different = set(sizes) or {args.tensor_model_parallel_size}
    if len(different) > 1:
        raise ValueError(
            "--encoder-tensor-model-parallel-size: colocated encoders all have one size; "
            "--encoder-ranks gives each encoder ranks, and a size, of its own"
        )
    return different.pop()


def cp_multiple(args: argparse.Namespace) -> int:
    """What sequence lengths are a multiple of: context parallelism cuts two chunks a rank."""
    size = args.context_parallel_size
    return 2 * size if size > 1 else 1


def padding_multiple(args: argparse.Namespace) -> int:
    """What lengths are padded to a multiple of, so that they divide and that shapes repeat."""
    return math.lcm(layout_multiple(args), args.pad_to_multiple_of)


def layout_multiple(args: argparse.Namespace) -> int:
    """What lengths must be a multiple of; sequence parallelism divides a CP rank's share.

    In FP8 and FP4 a rank's share is of whole blocks of numbers that are scaled together.
    """
    block = 1
    if args.fp8:
        block = get_fp8_align_size(args.fp8_recipe)
    elif args.fp4:
        block = FP4_BLOCK
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    return math.lcm(tp * cp_multiple(args), tp * cp * block)


def rank_groups(args: argparse.Namespace) -> list[RankGroup]:
    """The groups of ranks that hold different parts, in the order of the model."""
    stages = args.pipeline_model_parallel_size
    placed = placements(args)
    groups = [RankGroup(module.name, module.ranks, module.name) for module in placed[:-1]]
    ranks = placed[-1].ranks if placed else range(args.world_size)
    module = LANGUAGE if placed else None
    ranks_per_stage = len(ranks) // stages
    for stage in range(stages):
        stage_ranks = ranks[stage * ranks_per_stage : (stage + 1) * ranks_per_stage]
        label = LANGUAGE if placed and stages == 1 else f"stage {stage}"
        groups.append(RankGroup(label, stage_ranks, module, stage))
    return groups


def parse_ranks(words: Sequence[str], names: Collection[str], num_ranks: int) -> dict[str, range]:
    """`images=0 audios=1-2` -> modality -> its ranks; ValueError unless each is given some."""
    ranks: dict[str, range] = {}
    for word in words:
        match = re.fullmatch(r"([^=]+)=(\d+)(?:-(\d+))?", word)
        if not match:
            raise ValueError(f"--encoder-ranks {word}: write NAME=RANK or NAME=FIRST-LAST")
        name, first, last = match[1], int(match[2]), int(match[3] or match[2])
        if name not in names:
            raise ValueError(
                f"--encoder-ranks {word}: the model has the modalities {', '.join(names)}"
            )
        if name in ranks:
            raise ValueError(f"--encoder-ranks {word}: {name} has ranks already")
        if last < first or last >= num_ranks:
            raise ValueError(
                f"--encoder-ranks {word}: {num_ranks} processes have the ranks 0 to {num_ranks - 1}"
            )
        ranks[name] = range(first, last + 1)
    for name in names:
        if name not in ranks:
            raise ValueError(
                f"--encoder-ranks says nothing of {name}; name ranks for {', '.join(names)}"
            )
    return ranks


def language_ranks(encoders: Mapping[str, range], num_ranks: int) -> range:
    """The consecutive ranks that no encoder has; ValueError when there are none."""
    holders: dict[int, str] = {}
    for name, ranks in encoders.items():
        for rank in ranks:
            if rank in holders:
                raise ValueError(
                    f"--encoder-ranks: {holders[rank]} and {name} both have rank {rank}; a rank "
                    "holds one module"
                )
            holders[rank] = name
    left = [rank for rank in range(num_ranks) if rank not in holders]
    if not left:
        raise ValueError(
            f"--encoder-ranks takes all {num_ranks} processes and leaves none for the language "
            "model; start more"
        )
    if left != list(range(left[0], left[-1] + 1)):
        raise ValueError(
            f"--encoder-ranks leaves the language model the ranks {', '.join(map(str, left))}, "
            "which do not follow one another; move the encoders to one end"
        )
    return range(left[0], left[-1] + 1)


def encoder_placements(
    encoders: Mapping[str, range], tensor_parallel: Mapping[str, int], language_dp: int
) -> list[Placement]:
    """ValueError unless each encoder's ranks divide as its flags say and pair up with the others.

    Replicas of an encoder and of the language model exchange whole shares of a batch.
    """
    placed = []
    for name, ranks in encoders.items():
        tp = tensor_parallel[name]
        if tp < 1 or len(ranks) % tp:
            raise ValueError(
                f"--encoder-ranks gives {name} {len(ranks)} ranks, not divisible by its "
                f"--encoder-tensor-model-parallel-size {tp}"
            )
        placement = Placement(name, ranks, tp)
        if placement.dp % language_dp and language_dp % placement.dp:
            raise ValueError(
                f"--encoder-ranks makes {placement.dp} replicas of {name}'s encoder for "
                f"{language_dp} of the language model; one must be a multiple of the other"
            )
        placed.append(placement)
    return placed


@dataclass(frozen=True)
class DataShare:
    """What a data-parallel rank reads: micro-batches of `replicas`, or a share of one's media.

    `replicas` are the language model's data-parallel ranks that it works for. A replica of a
    non-colocated encoder may work for several, whose micro-batches it reads as one, or be one of
    `shares` replicas that each encode a share of the same micro-batch.
    """

    replicas: range
    number: int = 0
    shares: int = 1

    def of(self, collate: Callable[[Sequence[Sample]], Batch]) -> Callable[..., Batch]:
        """`collate` as it is, or followed by taking this rank's share of the micro-batch."""
        return collate if self.shares == 1 else functools.partial(self._collate, collate)

    def _collate(
        self, collate: Callable[[Sequence[Sample]], Batch], samples: Sequence[Sample]
    ) -> Batch:
        return take_share(collate(samples), self.number, self.shares)


def data_share(language_dp: int) -> DataShare:
    """This rank's, where the language model has `language_dp` data-parallel replicas."""
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    shares = max(1, size // language_dp)
    served = language_dp * shares // size
    first = rank // shares * served
    return DataShare(range(first, first + served), rank % shares, shares)


def prepare_noncolocated(
    args: argparse.Namespace,
    transformer_config: Any,
    install: Callable[[dict[str, Any], Callable[..., Any]], None],
) -> noncolocated.NonColocatedRun:
    """What `pretrain()` is given under --encoder-ranks: process groups and bridges."""
    if not args.encoder_ranks:
        return noncolocated.NonColocatedRun()
    return noncolocated.prepare(
        placements(args),
        args.rank,
        transformer_config,
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
