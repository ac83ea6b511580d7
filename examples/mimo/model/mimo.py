"""`StageMimoModel`: one pipeline stage of the encoders, projectors and language model.

The first stage holds the encoders, the projectors and the token embedding, the last one the head;
every stage has its layers of the language model. A batch comes in through `forward`: `encode` runs
every modality's encoder and projector, `embed` puts the results where the placeholders are, and
Megatron's `GPTModel` does the rest.

Where gradients of encoders are summed: context-parallel ranks, and replicas of the encoders inside
a tensor-parallel group, each encode a share of a micro-batch's items (`encode_shares`,
parallel/context.py), so each rank holds a part of an encoder's gradient.
- Over context-parallel ranks Megatron's DDP sums it; its group includes them. Before that
  `gather_embeddings` sums the embeddings' gradients, as every rank's loss depends on every item.
- Over replicas `EncoderReplicas.finalizer` (parallel/placement.py) sums it, once an iteration.
- Non-colocated encoders get their embeddings' gradients over a bridge (parallel/placement.py),
  summed over the context-parallel ranks by `NonColocatedMimoModel.encode`. DDP sums the weights'
  over an encoder's own replicas, `finalize_noncolocated` divides by the tokens of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from examples.mimo.configs.schema import InputModality, LanguageConfig, MimoConfig
from examples.mimo.data.batch import Placeholders
from examples.mimo.modalities.values import is_count, upload
from examples.mimo.model.layers import block_submodules, device, split_over
from examples.mimo.model.parts import (
    ENCODER,
    FreshParts,
    LanguageModel,
    LastLayer,
    check_count,
)
from examples.mimo.parallel.context import (
    encode_shares,
    pack_for_engine,
    pack_sequence,
    shard_sequence,
)

if TYPE_CHECKING:
    from examples.mimo.parallel.placement import EncoderReplicas

# Input name -> (N, ...): N inputs of one modality's encoder.
Inputs = dict[str, torch.Tensor]


class Modality(ModalitySubmodules):
    """One encoder and its projector; `num_tokens` of encoder inputs is known without them."""

    num_tokens: Callable[[Inputs], int]

    @classmethod
    def from_spec(cls, module_spec: ModuleSpec, *stages: Any, **named_stages: Any) -> Modality:
        """Build what the configs describe; Megatron's own builds a spec for each module."""
        names = ("modality", "transformer_config", "pg_collection")
        modality, transformer_config, groups = (module_spec.params[name] for name in names)
        encoder = modality.encoder.build(transformer_config, groups)
        projector = modality.projector.build(
            modality.encoder.output_size, transformer_config, groups
        )
        built = cls({ENCODER: encoder}, input_projections=[projector], pg_collection=groups)
        built.num_tokens = modality.encoder.num_tokens
        return built

    def decode(self, embeddings: torch.Tensor, data_batch: dict) -> torch.Tensor:
        """Never called: outputs are codes, which the language model's head says as tokens."""
        raise ValueError("outputs are tokens of the language model: there is no decoder to run")


class StageMimoModel(FreshParts, MimoModel):
    """What one pipeline stage holds of the model, encoders colocated with the language model.

    `dummy_inputs` are one input of each encoder; see parallel/placement.py for `encoder_replicas`.
    """

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        pg_collection: Any,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        dummy_inputs: dict[str, Inputs],
        encoder_replicas: EncoderReplicas | None = None,
    ) -> None:
        super().__init__(mimo_config, cp_group=pg_collection.cp, tp_group=pg_collection.tp)
        self.pg_collection = pg_collection
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.dummy_inputs = dummy_inputs
        self.encoder_replicas = encoder_replicas
        if encoder_replicas:
            encoder_replicas.tie(self.modality_submodules.parameters())
        self.share_embeddings_and_output_weights = (
            self.language_model is not None
            and self.language_model.share_embeddings_and_output_weights
        )

    @property
    def needs(self) -> frozenset[str]:
        """The text tensors and the modalities of a batch that this stage works on.

        Labels go to the last stage: the loss is computed beside the head, where the logits are.
        """
        first = ["input_ids", "media_positions", *self.special_token_ids]
        last = ["labels", "loss_mask", "target_positions"]
        return frozenset(first * self.pre_process + last * self.post_process)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied weight, where this stage has one; Megatron sums its gradients."""
        if self.language_model is None:
            return None
        return self.language_model.shared_embedding_or_output_weight()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """What a checkpoint holds of this stage: of an encoder's replicas the first."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.encoder_replicas:
            inside = f"{prefix}modality_submodules."
            self.encoder_replicas.mark({k: v for k, v in state.items() if inside in k})
        return self.in_checkpoint(state, prefix, bool(self.config.fp8))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, Inputs] | None = None,
        cu_seqlens: list[int] | None = None,
        placeholders: Placeholders | None = None,
        target_positions: torch.Tensor | None = None,
        features: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, S) ids -> per-token loss (B, S) with labels, else logits (B, S, V / TP).

        Under context parallelism labels, loss and logits are shards of the sequence, S / CP.
        Stages before the last return hidden states (S, B, H). `modality_inputs` maps modality ->
        input name -> tensor with the inputs of all items, in the order of the placeholders.
        `cu_seqlens` are the starts of the samples in a packed sequence, and its end.
        With `target_positions` (n,) the last stage works on these alone, and labels are (1, n).
        Without `placeholders` the ids are searched for them, for which the host waits. `features`
        are what frozen encoders made of this rank's share of the inputs already.
        """
        embeddings, packed = None, None
        if cu_seqlens:
            has_engine = self.config.transformer_impl == "transformer_engine"
            pack = pack_for_engine if has_engine else pack_sequence
            packed = pack(cu_seqlens, self.pg_collection.cp, device())
        if self.pre_process:
            embeddings = self.embed(input_ids, modality_inputs or {}, placeholders, features)
            # Here and not in GPTModel, which would scatter the text's embeddings before the media's
            # are among them. Megatron's adapter packs with Transformer Engine only.
            embeddings = shard_sequence(embeddings, 0, self.pg_collection.cp, cu_seqlens)
            if self.config.sequence_parallel:
                tp_group = self.pg_collection.tp
                embeddings = scatter_to_sequence_parallel_region(embeddings, group=tp_group)
        return self.language_model(
            input_ids=None,  # embedded above, with the media
            position_ids=None,  # rotary positions follow from the sequence
            attention_mask=None,  # the layer spec is causal
            decoder_input=embeddings,
            labels=labels,
            packed_seq_params=packed,
            output_processor_context=target_positions,
        )

    def embed(
        self,
        input_ids: torch.Tensor | None,
        modality_inputs: dict[str, Inputs],
        placeholders: Placeholders | None = None,
        features: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, S) -> (S, B, H): the text's embeddings with the media's at their placeholders."""
        assert input_ids is not None, "the first stage needs ids"
        media = self.encode(modality_inputs, features)
        text = self.language_model.embedding(input_ids=input_ids, position_ids=None)
        placeholders = placeholders or Placeholders.of(input_ids, self.special_token_ids)
        for name in self.special_token_ids:
            check_count(name, media.setdefault(name, text[:0, 0]), placeholders)
        if placeholders.positions is None:
            return text
        rows = torch.cat([media[name].to(text.dtype) for name in self.special_token_ids])
        return text.flatten(0, 1).index_copy(0, placeholders.positions, rows).view_as(text)

    @property
    def encoder_groups(self) -> list[dist.ProcessGroup]:
        """Groups of ranks that each encode a share of a micro-batch's media."""
        replicas = [self.encoder_replicas.replicas] if self.encoder_replicas else []
        return [self.pg_collection.cp, *replicas]

    def encode(
        self, modality_inputs: dict[str, Inputs], features: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Each modality's inputs (N, ...) -> (tokens, H); the only place where encoders run.

        Always in the order of the config: a batch's own order differs between ranks, and encoders
        that run in another order bring other collectives and other gradients first. In training a
        modality without an item runs too, on a dummy input.
        """
        groups, cp_group = self.encoder_groups, self.pg_collection.cp
        embeddings: dict[str, torch.Tensor] = {}
        for name in self.special_token_ids:
            if name in modality_inputs:
                run = functools.partial(self.run_encoder, name)
                if features and name in features:
                    run = functools.partial(run, features=features[name])
                count = self.modality_submodules[name].num_tokens
                inputs = modality_inputs[name]
                embeddings[name] = encode_shares(run, count, inputs, groups, cp_group)
            elif self.training and torch.is_grad_enabled():
                embeddings[name] = self.run_encoder(name, {})
        return embeddings

    def run_encoder(
        self, name: str, inputs: Inputs, features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One modality's inputs (N, ...) -> (tokens, H), on this rank alone.

        Without inputs a dummy input goes through all weights and none of its embeddings are kept.
        The weights' gradients are then zeros that exist: DDP waits for every gradient of a bucket
        before it reduces it, and another rank may have items where this one has none.
        """
        encoder = self.modality_submodules[name]
        if features is not None:
            return encoder(hidden_states=features)
        if inputs and len(next(iter(inputs.values()))):
            return encoder(encoder_inputs={ENCODER: inputs})
        dummy = self.dummy_inputs[name]
        return encoder(encoder_inputs={ENCODER: dummy})[:0]  # empty, but in the graph


def build_mimo_model(
    config: MimoConfig,
    transformer_config: TransformerConfig,
    pg_collection: Any,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    encoder_replicas: EncoderReplicas | None = None,
) -> StageMimoModel:
    """This rank's stage of the model that `config` describes.

    `transformer_config` is Megatron's, of the language model; encoders take from it how to compute.
    """
    modalities = config.inputs if pre_process else {}  # encoders live on the first stage
    encoder_groups = encoder_replicas.layers if encoder_replicas else pg_collection
    encoder_config = split_over(transformer_config, encoder_groups.tp.size())
    mimo_config = MimoModelConfig(
        language_model_spec=language_spec(
            *(config.built_language, transformer_config, pg_collection),
            *(pre_process, post_process, vp_stage),
        ),
        modality_submodules_spec={
            name: modality_spec(modality, encoder_config, encoder_groups)
            for name, modality in modalities.items()
        },
        special_token_ids={name: m.token_id for name, m in config.inputs.items()},
    )
    dummies = {name: dummy_input(modality) for name, modality in modalities.items()}
    return StageMimoModel(
        mimo_config, pg_collection, pre_process, post_process, vp_stage, dummies, encoder_replicas
    )


def language_spec(
    language: LanguageConfig,
    transformer_config: TransformerConfig,
    pg_collection: Any,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> ModuleSpec:
    """The spec of this stage's part of the language model."""
    num_layers = get_num_layers_to_build(transformer_config, vp_stage, pg_collection.pp.rank())
    impl, qk_norm = transformer_config.transformer_impl, transformer_config.qk_layernorm
    layers = block_submodules(impl, AttnMaskType.causal, num_layers, qk_norm)
    if post_process and num_layers and LastLayer.fits(transformer_config):
        layers.layer_specs[-1] = ModuleSpec(LastLayer, submodules=layers.layer_specs[-1].submodules)
    return ModuleSpec(
        module=LanguageModel,
        params={
            "config": transformer_config,
            "transformer_layer_spec": layers,
            "vocab_size": language.vocab_size,
            "max_sequence_length": language.seq_length,
            "pre_process": pre_process,
            "post_process": post_process,
            "share_embeddings_and_output_weights": language.tie_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": language.rotary_base,
            "rope_scaling": language.rope_scaling_factor is not None,
            "rope_scaling_factor": language.rope_scaling_factor or 1.0,
            # `StageMimoModel.forward` scatters text and media together.
            "scatter_embedding_sequence_parallel": False,
            "pg_collection": pg_collection,
            "vp_stage": vp_stage,
        },
    )


def modality_spec(
    modality: InputModality, transformer_config: TransformerConfig, pg_collection: Any
) -> ModuleSpec:
    """An encoder and its projector; `transformer_config` says how they compute."""
    params = {"modality": modality, "transformer_config": transformer_config}
    return ModuleSpec(module=Modality, params={**params, "pg_collection": pg_collection})


def dummy_input(modality: InputModality) -> Inputs:
    """A single random input of a modality's encoder, where a batch has it."""
    item = modality.encoder.mock_inputs(torch.Generator().manual_seed(0))
    one = {name: tensor[:1] for name, tensor in item.items()}
    return {name: x if is_count(name) else upload(x, device()) for name, x in one.items()}
