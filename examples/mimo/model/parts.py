"""Parts of a model: their names (`images.encoder`, `language`), and what few models need of them.

Freezing, frozen encoders that run ahead, parts that a checkpoint need not have; how encoders
compute; norms, LayerScale, head and loss. The norms allow sequence parallelism without Transformer
Engine or Apex. The head works on the positions with loss alone, and on many of them in pieces.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, Placeholders
from examples.mimo.parallel.context import PackedSequence, share_inputs

if TYPE_CHECKING:
    from examples.mimo.model.mimo import Inputs, StageMimoModel


ENCODER = "encoder"
# The output layer makes at most so many logits at a time, 512 MiB in fp32.
MAX_LOGITS = 2**27


def part_prefix(part: str) -> str:
    """What the names of a part's weights begin with in a checkpoint."""
    if part == "language":
        return "language_model."
    name, side = part.split(".")
    inside = "input_projections.0" if side == "projector" else f"encoders.{ENCODER}"
    return f"modality_submodules.{name}.{inside}."


def part_config_of(config: MimoConfig, part: str) -> Any:
    """The config of one part by its name."""
    if part == "language":
        return config.built_language
    name, side = part.split(".")
    return getattr(config.inputs[name], side)


def part_names(config: MimoConfig) -> list[str]:
    """`images.encoder`, `images.projector`, ..., `language`."""
    sides = [f"{name}.{side}" for name in config.inputs for side in ("encoder", "projector")]
    return [*sides, "language"]


def check_freeze(names: Iterable[str], config: MimoConfig) -> None:
    """ValueError for a name that is no part of the model."""
    known = part_names(config)
    for name in names:
        if name not in known:
            raise ValueError(f"--freeze {name}: {config.name} has the parts {', '.join(known)}")


def parts(model: StageMimoModel) -> dict[str, torch.nn.Module]:
    """The parts that this stage holds."""
    held: dict[str, torch.nn.Module] = {}
    for name, modality in model.modality_submodules.items():
        held[f"{name}.encoder"] = modality.encoders[ENCODER]
        held[f"{name}.projector"] = modality.input_projections[0]
    if model.language_model is not None:
        held["language"] = model.language_model
    return held


def freeze_parts(model: StageMimoModel, names: Iterable[str]) -> None:
    """Stop the named parts from training; gradients still flow through them."""
    held = parts(model)
    for name in names:
        if name in held:
            held[name].requires_grad_(False)


class EncodersAhead:
    """Reads a micro-batch ahead and runs its frozen encoders beside the one before.

    Nothing is read beyond an iteration, after which a checkpoint may save the place in the data.
    """

    def __init__(self) -> None:
        self.stream: torch.cuda.Stream | None = None  # until this rank has its device
        # What has begun, and how many micro-batches of this iteration are still to be read.
        self.begun: tuple[Batch, dict[str, torch.Tensor], torch.cuda.Event] | None = None
        self.left = 0

    def next(
        self, stage: StageMimoModel, read: Callable[[], Batch]
    ) -> tuple[Batch, dict[str, torch.Tensor]]:
        """The next micro-batch that `read` returns, with the features of its frozen encoders."""
        if self.begun is None:
            self.begun, self.left = self._begin(stage, read()), get_num_microbatches() - 1
        batch, features, done = self.begun
        self.begun = None
        if self.left:
            self.begun, self.left = self._begin(stage, read()), self.left - 1
        current = torch.cuda.current_stream()
        current.wait_event(done)
        for tensor in features.values():
            tensor.record_stream(current)
        return batch, features

    def _begin(
        self, stage: StageMimoModel, batch: Batch
    ) -> tuple[Batch, dict[str, torch.Tensor], torch.cuda.Event]:
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            features = frozen_features(stage, batch.modality_inputs)
            return batch, features, self.stream.record_event()


@torch.no_grad()
def frozen_features(stage: StageMimoModel, modality_inputs: dict[str, Inputs]) -> Inputs:
    """This rank's share of the inputs -> features of frozen encoders, before the projectors."""
    features: Inputs = {}
    for name in stage.special_token_ids:
        modality, inputs = stage.modality_submodules[name], modality_inputs.get(name)
        if inputs is None or any(p.requires_grad for p in modality.encoders.parameters()):
            continue
        for group in stage.encoder_groups:
            inputs = share_inputs(inputs, group.rank(), group.size())
        if len(next(iter(inputs.values()))):
            features[name] = modality.combine_embeddings(modality.encode({ENCODER: inputs}))
    return features


def is_empty_state(key: str, value: Any) -> bool:
    """Whether an entry of a sharded state is a layer's extra state, and holds nothing.

    Megatron's linear layers have one, and of norms only Transformer Engine's: a checkpoint without
    these entries fits both implementations. Only FP8 has scales to put there.
    """
    if not (isinstance(value, ShardedObject) and "_extra_state" in key):
        return False
    data = value.data
    return data is None or (isinstance(data, torch.Tensor) and not data.numel())


def keep_out_of_checkpoint(
    state: dict[str, Any], prefixes: tuple[str, ...], empty_states: bool
) -> dict[str, Any]:
    """A sharded state whose entries under `prefixes` are neither saved nor loaded.

    Nor are empty extra states, unless `empty_states` is False. The model keeps what it has there.
    """
    return {
        key: LocalNonpersistentObject(value.data)
        if key.startswith(prefixes) or (empty_states and is_empty_state(key, value))
        else value
        for key, value in state.items()
    }


class FreshParts:
    """A stage whose `fresh_parts` a checkpoint to start from need not have."""

    fresh_parts: tuple[str, ...] = ()
    hides_fresh_parts = False

    @contextlib.contextmanager
    def hide_loss_modules(self) -> Iterator[None]:
        """Let fresh parts keep the weights they have instead of asking a checkpoint for them.

        Megatron enters this under `--finetune` while it makes the sharded state that it loads. Its
        name comes from distillation, where the parts that a checkpoint lacks are losses.
        """
        self.hides_fresh_parts = True
        try:
            yield
        finally:
            self.hides_fresh_parts = False

    def in_checkpoint(self, state: dict[str, Any], prefix: str, fp8: bool) -> dict[str, Any]:
        """What a checkpoint holds of a sharded state: no fresh parts, no empty extra states."""
        fresh = self.fresh_parts if self.hides_fresh_parts else ()
        hidden = tuple(prefix + part_prefix(part) for part in fresh)
        # Saved and resumed, the scales of an FP8 run are in extra states, empty until it computes.
        return keep_out_of_checkpoint(state, hidden, not fp8 or self.hides_fresh_parts)


@functools.cache
def with_layer_scale(linear: type) -> type:
    """A row-parallel linear layer class with LayerScale (arXiv:2103.17239).

    Its output, bias included, is scaled by a trained factor per feature.
    """

    class ScaledLinear(linear):  # type: ignore[misc, valid-type]
        def __init__(self, input_size: int, output_size: int, *rest: Any, **named: Any) -> None:
            super().__init__(input_size, output_size, *rest, **named)
            ones = torch.ones(output_size, dtype=self.weight.dtype, device=self.weight.device)
            self.layer_scale = torch.nn.Parameter(ones)

        def forward(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, Any]:
            output, bias = super().forward(*inputs, **named)
            return output * self.layer_scale, None if bias is None else bias * self.layer_scale

    return ScaledLinear


# Fields that say how to compute, not what: an encoder shares them with the language model.
# Pipeline, sequence- and context-parallel fields and other fusions stay at their defaults.
SHARED_FIELDS = (
    "tensor_model_parallel_size",
    "params_dtype",
    "fp16",
    "bf16",
    "autocast_dtype",
    "use_cpu_initialization",
    "perform_initialization",
    "gradient_accumulation_fusion",
    "transformer_impl",
    "bias_dropout_fusion",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
    "deterministic_mode",
)


def encoder_transformer_config(
    transformer_config: TransformerConfig, **fields: Any
) -> TransformerConfig:
    """An encoder's TransformerConfig: LayerNorm, biases, no dropout, and what `fields` say.

    `transformer_config` is the language model's. It is not copied as a whole: its pipeline,
    sequence-parallel and fusion fields would break layers that are whole on every rank.
    """
    shared = {name: getattr(transformer_config, name) for name in SHARED_FIELDS}
    if shared["recompute_method"]:
        shared["recompute_num_layers"] = 1
    defaults = {
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,
        "persist_layer_norm": shared["transformer_impl"] == "transformer_engine",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": True,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
    }
    return TransformerConfig(**{**shared, **defaults, **fields})


class Norm:
    """Builds torch's `LayerNorm` or `RMSNorm`, whichever the config asks for.

    Under sequence parallelism each rank sees a part of the sequence, so the norm's gradients
    are partial sums; marking its parameters `sequence_parallel` has Megatron add them up.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(
                f"--normalization {config.normalization} needs Transformer Engine; "
                f"choose {' or '.join(norms)}"
            )
        if config.layernorm_zero_centered_gamma:
            raise ValueError("--apply-layernorm-1p needs Transformer Engine")
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)
        return norm


class LastLayer(TransformerLayer):
    """Megatron's layer, whose MLP works on `positions` of the flattened (S, B) alone.

    No later layer attends to the others.
    """

    positions: torch.Tensor | None = None

    @staticmethod
    def fits(config: TransformerConfig) -> bool:
        """Whether the last layer may be one: with its whole sequence, and computed only once."""
        is_local = config.transformer_impl == "local"
        return is_local and not config.sequence_parallel and config.recompute_granularity != "full"

    def _forward_mlp(self, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """(S, B, H) -> (S, B, H), or (n, 1, H) of n positions."""
        if self.positions is not None:
            hidden_states = pick(hidden_states, self.positions)
        return super()._forward_mlp(hidden_states, *rest, **named)


def pick(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(S, B, H) -> (n, 1, H)."""
    return hidden.flatten(0, 1).index_select(0, positions)[:, None]


class LanguageModel(GPTModel):
    """Megatron's GPTModel, whose last MLP and output layer may work on some positions only."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        if self.post_process:
            # `head_and_loss` gathers the sequence, so that it can pick positions out of it.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.pg_collection.tp.size() > 1

    def forward(
        self, *inputs: Any, output_processor_context: torch.Tensor | None = None, **named: Any
    ) -> Any:
        """As Megatron's; `output_processor_context` are the positions that the loss needs."""
        positions = output_processor_context
        if self.decoder.layers and isinstance(last := self.decoder.layers[-1], LastLayer):
            # Megatron's fused SwiGLU refuses an empty tensor.
            last.positions = positions if positions is not None and len(positions) else None
            positions = positions if last.positions is None else None
        return super().forward(*inputs, output_processor_context=positions, **named)

    def _preprocess(self, *, packed_seq_params: Any = None, **named: Any) -> tuple:
        """As Megatron's, with the rotary angles of each packed sample's own positions."""
        if not isinstance(packed_seq_params, PackedSequence):
            return super()._preprocess(packed_seq_params=packed_seq_params, **named)
        hidden, _, *rest = super()._preprocess(**named)
        angles = self.rotary_pos_emb(packed_seq_params.table_length, packed_seq=True)
        return hidden, angles.index_select(0, packed_seq_params.positions), *rest

    def _postprocess(self, **named: Any) -> torch.Tensor:
        """As Megatron's, with this package's head and loss."""
        return super()._postprocess(**{**named, "output_processor": head_and_loss})


def head_and_loss(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor | None,
    context: torch.Tensor | None,
    compute_language_model_loss: Callable[..., torch.Tensor],
    scale_logits: Callable[[torch.Tensor], torch.Tensor],
    config: TransformerConfig,
    **unused: Any,
) -> torch.Tensor:
    """GPTModel's `output_processor`: (S, B, H) -> losses (B, S) with labels, else logits (B, S, V).

    `context` are n positions in the flattened (S, B): then of these alone, with (1, n) labels.
    Many losses are computed a piece at a time, and the logits again in the backward pass.
    """
    hidden = hidden_states
    if config.sequence_parallel:
        group = output_layer.tp_group
        hidden = gather_from_sequence_parallel_region(hidden, False, group=group)
    if context is not None:
        hidden = pick(hidden, context)
    if labels is None:
        logits, _ = output_layer(hidden, weight=output_weight)
        return scale_logits(logits).transpose(0, 1).contiguous()

    def losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits, _ = output_layer(hidden, weight=output_weight)
        return compute_language_model_loss(labels, scale_logits(logits))

    length = max(1, MAX_LOGITS // (output_layer.output_size_per_partition * hidden.shape[1]))
    if len(hidden) <= length:
        return losses(hidden, labels)
    pieces = zip(hidden.split(length), labels.split(length, dim=1), strict=True)
    again = functools.partial(checkpoint, losses, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(*piece) for piece in pieces], dim=1)


class MediaCountError(ValueError):
    """An encoder returned another number of embeddings than its items have placeholders."""

    def __init__(self, modality: str, placeholders: int, embeddings: torch.Tensor) -> None:
        self.modality = modality
        count, width = embeddings.shape
        self.numbers = (
            f"{modality}: num_tokens counted {placeholders} placeholder tokens, but the encoder "
            f"returned {count} embeddings of width {width}; make num_tokens of its config agree"
        )
        super().__init__(self.numbers)

    def explain(self, items: dict[str, list[tuple[str, str]]]) -> str:
        """The numbers with the samples and files they come from."""
        files = [f"{key} ({file})" for key, file in items.get(self.modality, [])]
        return f"{self.numbers}; samples: {', '.join(files)}"


def check_count(modality: str, embeddings: torch.Tensor, placeholders: Placeholders) -> None:
    """MediaCountError unless there is an embedding for every placeholder."""
    count = sum(placeholders.counts[modality])
    if len(embeddings) != count:
        raise MediaCountError(modality, count, embeddings)
