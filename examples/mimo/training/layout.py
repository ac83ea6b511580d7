"""What the arguments say of where modules live: on shared ranks, or encoders on their own."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

from examples.mimo.parallel.placement import (
    LANGUAGE,
    Placement,
    encoder_placements,
    here,
    language_ranks,
    parse_ranks,
)


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
