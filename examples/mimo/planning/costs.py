"""Floating-point operations of one micro-batch on a rank, by where in the pipeline they fall."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.models.flops import Flops, head_flops, language_layer_flops
from examples.mimo.planning.balance import ModelCost
from examples.mimo.planning.schedule import Cost


@dataclass(frozen=True)
class Workload:
    """A micro-batch: its rows and columns, and the items and tokens of each modality."""

    num_rows: float
    num_columns: float
    items: Mapping[str, float]
    media_tokens: Mapping[str, float]


def model_cost(config: MimoConfig, args: argparse.Namespace, work: Workload) -> ModelCost:
    """What a layer, the encoders with their projectors, and the head cost a rank."""
    frozen = set(args.freeze)
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    recompute = args.recompute_granularity == "full"
    first = Cost(0.0, 0.0)
    reached = False
    for name, modality in config.modalities.items():
        encoder_trains = f"{name}.encoder" not in frozen
        projector_trains = f"{name}.projector" not in frozen
        widths = modality.encoder.hidden_size + config.language.hidden_size
        projector = Flops(2 * modality.projector.ffn_hidden_size * widths)
        # The ranks that hold the same encoder share its items out; one is the least.
        encoder_tensor = args.encoder_tensor_model_parallel_size
        copies = context * tensor // encoder_tensor
        shares = max(1.0, min(copies, work.items[name]))
        encode = _cost(modality.encoder.flops(), encoder_trains, encoder_trains, recompute)
        project = _cost(projector, projector_trains, encoder_trains)
        both = encode * work.items[name] + project * work.media_tokens[name]
        first += both * (1 / shares / encoder_tensor)
        reached |= encoder_trains or projector_trains
    trains = "language" not in frozen
    passes_on = reached or trains
    columns = round(work.num_columns)
    layer = _cost(language_layer_flops(config.language, columns), trains, passes_on, recompute)
    head = _cost(head_flops(config.language, columns), trains, passes_on)
    share = work.num_rows / tensor / context
    return ModelCost(layer * share, first, head * share)


def _cost(flops: Flops, trains: bool, passes_on: bool, recompute: bool = False) -> Cost:
    backward = flops.trained(trains, passes_on) - flops.forward
    again = flops.forward if recompute and (trains or passes_on) else 0
    return Cost(flops.forward, backward + again)
