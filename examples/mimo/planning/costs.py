"""Floating-point operations of one micro-batch on a rank, by where in the pipeline they fall.

Every sample is taken to be a full row that holds one item of each modality at its longest.
"""

from __future__ import annotations

import argparse

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.models.flops import Flops, head_flops, language_layer_flops
from examples.mimo.planning.balance import ModelCost
from examples.mimo.planning.schedule import Cost


def model_cost(config: MimoConfig, args: argparse.Namespace) -> ModelCost:
    """What a layer, the encoders with their projectors, and the head cost a rank."""
    samples, frozen = args.micro_batch_size, set(args.freeze)
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    recompute = args.recompute_granularity == "full"
    # Encoders share their items over the context-parallel ranks when each gets one.
    shares = context if samples >= context else 1
    first = Cost(0.0, 0.0)
    reached = False
    for name, modality in config.modalities.items():
        encoder_trains = f"{name}.encoder" not in frozen
        projector_trains = f"{name}.projector" not in frozen
        widths = modality.encoder.hidden_size + config.language.hidden_size
        projector = Flops(2 * modality.projector.ffn_hidden_size * widths)
        projector *= modality.encoder.max_tokens
        cost = _cost(modality.encoder.flops(), encoder_trains, encoder_trains, recompute)
        cost += _cost(projector, projector_trains, encoder_trains)
        first += cost * (samples / shares / tensor)
        reached |= encoder_trains or projector_trains
    trains = "language" not in frozen
    passes_on = reached or trains
    layer = language_layer_flops(config.language, args.seq_length)
    head = head_flops(config.language, args.seq_length)
    share = samples / tensor / context
    return ModelCost(
        layer=_cost(layer, trains, passes_on, recompute) * share,
        first=first,
        last=_cost(head, trains, passes_on) * share,
    )


def _cost(flops: Flops, trains: bool, passes_on: bool, recompute: bool = False) -> Cost:
    backward = flops.trained(trains, passes_on) - flops.forward
    again = flops.forward if recompute and (trains or passes_on) else 0
    return Cost(flops.forward, backward + again)
