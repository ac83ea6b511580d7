"""Floating-point operations of one micro-batch on a rank, by where in the pipeline they fall."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.parallel.placement import Placement
from examples.mimo.planner.flops import Flops, encoder_flops, head_flops, language_layer_flops
from examples.mimo.planner.pipeline import Cost, ModelCost


@dataclass(frozen=True)
class Workload:
    """A micro-batch: its rows and columns, and the encoder inputs and tokens of each modality."""

    batch_size: float
    seq_length: float
    inputs: Mapping[str, float]
    media_tokens: Mapping[str, float]


def model_cost(
    config: MimoConfig,
    args: argparse.Namespace,
    work: Workload,
    placed: Sequence[Placement] = (),
) -> ModelCost:
    """What a layer, the encoders with their projectors, and the head cost a rank.

    `placed` is where modules live when encoders have ranks of their own.
    """
    frozen = set(args.freeze)
    encoders = {name: _encoder_cost(name, config, args, work, placed) for name in config.modalities}
    reached = any({f"{name}.encoder", f"{name}.projector"} - frozen for name in config.modalities)
    trains = "language" not in frozen
    # Gradients of rows that came over a bridge are computed even if nobody trains on them.
    passes_on = reached or trains or bool(placed)
    columns = round(work.seq_length)
    recompute = args.recompute_granularity == "full"
    whole = language_layer_flops(config.language, columns)
    # Attention's kernels skip what the causal mask hides; the count that is a convention does not.
    causal = replace(whole, attention=whole.attention // 2)
    layer = _cost(causal, trains, passes_on, recompute)
    head = _cost(head_flops(config.language, columns), trains, passes_on)
    share = work.batch_size / args.tensor_model_parallel_size / args.context_parallel_size
    together = sum(encoders.values(), Cost(0.0, 0.0))
    return ModelCost(
        layer * share,
        Cost(0.0, 0.0) if placed else together,
        head * share,
        encoders if placed else {},
    )


def _encoder_cost(
    name: str,
    config: MimoConfig,
    args: argparse.Namespace,
    work: Workload,
    placed: Sequence[Placement],
) -> Cost:
    """An encoder and its projector on one of their ranks, for a micro-batch of the schedule."""
    modality = config.modalities[name]
    encoder_trains = f"{name}.encoder" not in args.freeze
    projector_trains = f"{name}.projector" not in args.freeze
    output_size = config.language.hidden_size
    projector = Flops(modality.projector.flops(modality.encoder.output_size, output_size))
    recompute = args.recompute_granularity == "full"
    encode = _cost(encoder_flops(modality.encoder), encoder_trains, encoder_trains, recompute)
    project = _cost(projector, projector_trains, encoder_trains)
    both = encode * work.inputs[name] + project * work.media_tokens[name]
    tensor = args.encoder_tensor_model_parallel_size[name]
    if placed:
        copies = next(one.dp for one in placed if one.name == name) / placed[-1].dp
    else:
        copies = args.context_parallel_size * args.tensor_model_parallel_size / tensor
    # Copies share the items of a micro-batch out, one is the least; less than one copy for each
    # language model has several micro-batches to work on.
    shares = min(copies, max(1.0, work.inputs[name]))
    return both * (1 / shares / tensor)


def _cost(flops: Flops, trains: bool, passes_on: bool, recompute: bool = False) -> Cost:
    backward = flops.trained(trains, passes_on) - flops.forward
    again = flops.forward if recompute and (trains or passes_on) else 0
    return Cost(flops.forward, backward + again)
