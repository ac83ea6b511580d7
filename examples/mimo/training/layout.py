"""What the arguments say of where modules live: on shared ranks, or encoders on their own."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron.core import mpu

from examples.mimo.data.batch import Batch, take_share
from examples.mimo.data.conversation import Sample
from examples.mimo.parallel.placement import LANGUAGE, Placement, here


@dataclass(frozen=True)
class RankGroup:
    """A stage of the shared model, or a module on ranks of its own; its ranks hold the same."""

    label: str
    ranks: range
    module: str | None = None
    stage: int = 0


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
    """The one module of this rank, where encoders have ranks of their own."""
    placed = placements(args)
    return here(placed, args.rank).name if placed else None


def language_processes(args: argparse.Namespace) -> int:
    """How many processes hold a part of the language model."""
    placed = placements(args)
    return len(placed[-1].ranks) if placed else int(args.world_size)


def check_world(processes: int, args: argparse.Namespace, whose: str = "") -> None:
    """ValueError unless the processes hold whole copies of the language model."""
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


def encoder_tensor_parallel(words: Iterable[str] | None, names: Iterable[str]) -> dict[str, int]:
    """`2` or `images=2 audios=1` -> modality -> size, of those that the words name."""
    names = list(names)
    sizes: dict[str, int] = {}
    for word in words or ():
        name, found, number = word.rpartition("=")
        if not number.isdigit() or (found and name not in names):
            raise ValueError(
                f"--encoder-tensor-model-parallel-size {word}: write a number, or NAME=NUMBER with "
                f"a name of {', '.join(names)}"
            )
        sizes |= dict.fromkeys([name] if found else names, int(number))
    return sizes


def colocated_encoder_tp(args: argparse.Namespace) -> int:
    """The one tensor-parallel size of encoders on shared ranks; ValueError if there are two."""
    sizes = args.encoder_tensor_model_parallel_size.values()
    different = set(sizes) or {args.tensor_model_parallel_size}
    if len(different) > 1:
        raise ValueError(
            "--encoder-tensor-model-parallel-size: on shared ranks all encoders have one size; "
            "--encoder-ranks gives them ranks of their own"
        )
    return different.pop()


def cp_multiple(args: argparse.Namespace) -> int:
    """Context parallelism cuts a sequence into two chunks a rank."""
    size = args.context_parallel_size
    return 2 * size if size > 1 else 1


def padding_multiple(args: argparse.Namespace) -> int:
    """Sequence parallelism divides what context parallelism leaves of a row."""
    return args.tensor_model_parallel_size * cp_multiple(args)


def places(args: argparse.Namespace) -> list[RankGroup]:
    """What ranks can hold, in the order of the model."""
    stages = args.pipeline_model_parallel_size
    placed = placements(args)
    found = [RankGroup(one.name, one.ranks, one.name) for one in placed[:-1]]
    ranks = placed[-1].ranks if placed else range(args.world_size)
    module = LANGUAGE if placed else None
    each = len(ranks) // stages
    for stage in range(stages):
        part = ranks[stage * each : (stage + 1) * each]
        label = LANGUAGE if placed and stages == 1 else f"stage {stage}"
        found.append(RankGroup(label, part, module, stage))
    return found


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
