"""FLOPs of each part of a model, and the cost of a micro-batch on each rank.

A multiply-add is two operations. Matrix products only, and attention over all pairs of positions
whether masked or not: the convention of PaLM's model FLOP utilisation (arXiv:2204.02311,
appendix B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from examples.mimo.configs.schema import InputModality, LanguageConfig, MimoConfig
from examples.mimo.modalities.base import EncoderConfig
from examples.mimo.training.layout import RunShape


@dataclass(frozen=True)
class Cost:
    """One micro-batch through something, forward and backward, in any one unit."""

    forward: float
    backward: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.forward * times, self.backward * times)

    @property
    def both(self) -> float:
        """Forward and backward pass together."""
        return self.forward + self.backward


@dataclass(frozen=True)
class ModelCost:
    """One micro-batch through a layer of the language model, and through what is not a layer.

    `first` is what the first chunk holds besides layers, `last` what the last one does.
    `ahead` are non-colocated encoders, which run side by side before the first chunk.
    """

    layer: Cost
    first: Cost
    last: Cost
    ahead: Mapping[str, Cost] = field(default_factory=dict)

    def chunks(self, layers: tuple[int, ...]) -> list[Cost]:
        """The cost of each chunk of so many layers, behind the slowest non-colocated encoder."""
        costs = [self.layer * count for count in layers]
        costs[0] += self.first
        costs[-1] += self.last
        slowest = sorted(self.ahead.values(), key=lambda cost: cost.both)[-1:]
        return slowest + costs


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
    seq_length: int,
    hidden_size: int,
    query_projection_size: int,
    kv_projection_size: int,
    ffn_hidden_size: int,
    ffn_matrices: int,
) -> Flops:
    """One transformer layer over a sequence; a gated MLP has three matrices."""
    projections = 2 * seq_length * hidden_size * 2 * (query_projection_size + kv_projection_size)
    feed_forward = 2 * seq_length * hidden_size * ffn_hidden_size * ffn_matrices
    attention = 2 * 2 * seq_length**2 * query_projection_size
    return Flops(projections + feed_forward, attention)


def encoder_layer_flops(seq_length: int, hidden_size: int, ffn_hidden_size: int) -> Flops:
    """One layer of an encoder: as many keys as queries, a plain MLP."""
    return layer_flops(
        seq_length, hidden_size, hidden_size, hidden_size, ffn_hidden_size, ffn_matrices=2
    )


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


def mlp_flops(language: LanguageConfig, seq_length: int) -> Flops:
    """The MLP of one layer over a sequence; a gated one has three matrices."""
    return Flops(2 * seq_length * language.hidden_size * language.ffn_hidden_size * 3)


def projector_flops(modality: InputModality, hidden_size: int) -> Flops:
    """One token from the width that leaves the encoder to the language model's `hidden_size`."""
    return Flops(modality.projector.flops(modality.encoder.output_size, hidden_size))


def head_flops(language: LanguageConfig, seq_length: int) -> Flops:
    """The logits of a sequence."""
    return Flops(2 * seq_length * language.hidden_size * language.vocab_size)


@dataclass(frozen=True)
class Workload:
    """A mean micro-batch: its size, and the encoder inputs and tokens of each modality in it.

    The head and the MLP before it run on `target_share` of its positions, those with loss.
    """

    batch_size: float
    seq_length: float
    inputs: Mapping[str, float]
    media_tokens: Mapping[str, float]
    target_share: float = 1.0


def model_cost(config: MimoConfig, shape: RunShape, work: Workload) -> ModelCost:
    """What a layer, the encoders with their projectors, and the head cost a rank."""
    encoders = {
        name: _encoder_cost(name, modality, config.language.hidden_size, shape, work)
        for name, modality in config.inputs.items()
    }
    reached = any({f"{name}.encoder", f"{name}.projector"} - shape.frozen for name in config.inputs)
    trains = "language" not in shape.frozen
    # Gradients of features that came over a bridge are computed even if nobody trains on them.
    passes_on = reached or trains or bool(shape.placements)
    seq_length = round(work.seq_length)
    layer = language_layer_flops(config.language, seq_length)
    # Attention's kernels skip what the causal mask hides; the count that is a convention does not.
    causal = replace(layer, attention=layer.attention // 2)
    layer_cost = _cost(causal, trains, passes_on, shape.recompute)
    head_cost = _cost(head_flops(config.built_language, seq_length), trains, passes_on)
    # Of the last layer's MLP the positions without loss are left out (model/parts.py).
    mlp_cost = _cost(mlp_flops(config.language, seq_length), trains, passes_on)
    is_short = shape.local_layers and not (shape.recompute or shape.sequence_parallel)
    left_out = 1 - work.target_share if is_short else 0.0
    share = work.batch_size / shape.tp / shape.cp
    nothing = Cost(0.0, 0.0)
    return ModelCost(
        layer_cost * share,
        nothing if shape.placements else sum(encoders.values(), nothing),
        (head_cost * work.target_share + mlp_cost * -left_out) * share,
        encoders if shape.placements else {},
    )


def _encoder_cost(
    name: str, modality: InputModality, hidden_size: int, shape: RunShape, work: Workload
) -> Cost:
    """An encoder and its projector on one of their ranks, for a micro-batch of the schedule."""
    encoder_trains = f"{name}.encoder" not in shape.frozen
    projector_trains = f"{name}.projector" not in shape.frozen
    encode = _cost(encoder_flops(modality.encoder), encoder_trains, encoder_trains, shape.recompute)
    project = _cost(projector_flops(modality, hidden_size), projector_trains, encoder_trains)
    both = encode * work.inputs[name] + project * work.media_tokens[name]
    encoder_tp = shape.encoder_tp[name]
    if shape.placements:
        encoder = next(placement for placement in shape.placements if placement.name == name)
        replicas = encoder.dp / shape.placements[-1].dp
    else:
        replicas = shape.cp * shape.tp / encoder_tp
    # Replicas share the items of a micro-batch, and one item is the least. With less than one
    # replica for each of the language model, it has several micro-batches to work on.
    shares = min(replicas, max(1.0, work.inputs[name]))
    return both * (1 / shares / encoder_tp)


def _cost(flops: Flops, trains: bool, passes_on: bool, recompute: bool = False) -> Cost:
    backward = flops.trained(trains, passes_on) - flops.forward
    again = flops.forward if recompute and (trains or passes_on) else 0
    return Cost(flops.forward, backward + again)
