"""Floating-point operations of a training iteration, for utilisation in benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from examples.mimo.configs.schema import LanguageConfig, MimoConfig
from examples.mimo.planner.flops import (
    Flops,
    encoder_flops,
    head_flops,
    language_layer_flops,
    mlp_flops,
    projector_flops,
)


def language_flops(language: LanguageConfig, sequences: Sequence[int], targets: int) -> Flops:
    """The language model over sequences of these lengths.

    The head and the last layer's MLP work on the positions with loss.
    """
    total = head_flops(language, targets) + mlp_flops(language, targets - sum(sequences))
    for length in sequences:
        total += language_layer_flops(language, length) * language.num_layers
    return total


def training_flops(
    config: MimoConfig,
    sequences: Sequence[int],
    items: Mapping[str, int],
    media_tokens: Mapping[str, int],
    frozen: Collection[str] = (),
    targets: int | None = None,
) -> int:
    """Forward and backward passes over a batch that holds `items` of each modality.

    So many positions have loss: all of them, unless `targets` says otherwise.

    With the samples' own lengths as `sequences` it counts real tokens only; with the padded length
    for each sample, or the spans of a packed sequence, all that is computed.
    """
    total = 0
    reached = False
    for name, modality in config.inputs.items():
        encoder_trains = f"{name}.encoder" not in frozen
        projector_trains = f"{name}.projector" not in frozen
        # Nothing before an encoder trains, but the layers behind its first pass gradients on.
        encoder = encoder_flops(modality.encoder) * items.get(name, 0)
        total += encoder.trained(encoder_trains, passes_on=encoder_trains)
        projector = projector_flops(modality, config.language.hidden_size)
        projector *= media_tokens.get(name, 0)
        total += projector.trained(projector_trains, passes_on=encoder_trains)
        reached |= encoder_trains or projector_trains
    trains = "language" not in frozen
    targets = sum(sequences) if targets is None else targets
    language = language_flops(config.built_language, sequences, targets)
    return total + language.trained(trains, passes_on=reached or trains)
