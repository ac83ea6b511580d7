"""Floating-point operations, counted from sizes; a multiply-add is two.

Matrix products only, and attention over all pairs of positions whether masked or not: the
convention of PaLM's model FLOP utilisation (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from examples.mimo.configs.schema import LanguageConfig, MimoConfig
from examples.mimo.modalities.base import EncoderConfig


@dataclass(frozen=True)
class Flops:
    """A forward pass: products with weights, and attention's products of activations."""

    weights: int
    attention: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.weights + other.weights, self.attention + other.attention)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.weights * times, self.attention * times)

    @property
    def forward(self) -> int:
        """The forward pass alone."""
        return self.weights + self.attention

    def trained(self, trains: bool, passes_on: bool) -> int:
        """Forward and backward operations.

        The gradients of weights cost as much as the forward pass and only parts that train take
        them; those of inputs cost as much again, and nothing takes them unless an earlier part
        trains (`passes_on`). Attention has two inputs for every output.
        """
        backward = trains or passes_on
        return self.weights * (1 + trains + passes_on) + self.attention * (1 + 2 * backward)


def layer_flops(
    rows: int,
    width: int,
    query_projection_size: int,
    kv_projection_size: int,
    ffn_hidden_size: int,
    ffn_matrices: int,
) -> Flops:
    """One transformer layer over a sequence of `rows`; a gated MLP has three matrices."""
    projections = 2 * rows * width * (2 * query_projection_size + 2 * kv_projection_size)
    feed_forward = 2 * rows * width * ffn_hidden_size * ffn_matrices
    return Flops(projections + feed_forward, attention=2 * 2 * rows**2 * query_projection_size)


def encoder_layer_flops(rows: int, width: int, ffn_hidden_size: int) -> Flops:
    """One layer of an encoder: as many keys as queries, a plain MLP."""
    return layer_flops(rows, width, width, width, ffn_hidden_size, ffn_matrices=2)


def encoder_flops(encoder: EncoderConfig) -> Flops:
    """An encoder on one of its inputs."""
    layer = encoder_layer_flops(
        encoder.sequence_length, encoder.hidden_size, encoder.ffn_hidden_size
    )
    return Flops(encoder.stem_flops) + layer * encoder.built_layers


def language_layer_flops(language: LanguageConfig, seq_length: int) -> Flops:
    """One layer of the language model over a sequence."""
    return layer_flops(
        seq_length,
        language.hidden_size,
        language.query_projection_size,
        language.kv_projection_size,
        language.ffn_hidden_size,
        ffn_matrices=3,
    )


def head_flops(language: LanguageConfig, seq_length: int) -> Flops:
    """The logits of a sequence."""
    return Flops(2 * seq_length * language.hidden_size * language.vocab_size)


def language_flops(language: LanguageConfig, batch_size: int, seq_length: int) -> Flops:
    """The language model over `batch_size` sequences, head included."""
    layers = language_layer_flops(language, seq_length) * language.num_layers
    return (layers + head_flops(language, seq_length)) * batch_size


def training_flops(
    config: MimoConfig,
    batch_size: int,
    seq_length: int,
    items: Mapping[str, int],
    media_tokens: Mapping[str, int],
    frozen: Collection[str] = (),
) -> int:
    """Forward and backward passes over a batch that holds `items` of each modality."""
    total = 0
    reached = False
    for name, modality in config.modalities.items():
        encoder_trains = f"{name}.encoder" not in frozen
        projector_trains = f"{name}.projector" not in frozen
        output_size = config.language.hidden_size
        projector = Flops(modality.projector.flops(modality.encoder.output_size, output_size))
        # Nothing before an encoder trains, but the layers behind its first pass gradients on.
        encoder = encoder_flops(modality.encoder) * items.get(name, 0)
        total += encoder.trained(encoder_trains, passes_on=encoder_trains)
        projector *= media_tokens.get(name, 0)
        total += projector.trained(projector_trains, passes_on=encoder_trains)
        reached |= encoder_trains or projector_trains
    trains = "language" not in frozen
    language = language_flops(config.language, batch_size, seq_length)
    return total + language.trained(trains, passes_on=reached or trains)
