"""`MimoModel` on pipeline stages: encoders and embedding on the first, the head on the last.

Parts of a model: what they are called, and which do not train.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.base import ModalitySubmodules
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from examples.mimo.configs.schema import LanguageConfig, MimoConfig, ModalityConfig
from examples.mimo.data.batch import Needs, share_of
from examples.mimo.model.encoder import split_over
from examples.mimo.model.layers import block_submodules
from examples.mimo.parallel.context import gather_rows, shard_sequence
from examples.mimo.parallel.replicas import EncoderGroups

ENCODER = "encoder"


class Modality(ModalitySubmodules):
    """One encoder and its projector."""

    @classmethod
    def from_spec(cls, module_spec: ModuleSpec, *stages: Any, **named_stages: Any) -> Modality:
        """Build what the configs describe; Megatron's own builds a spec for each module."""
        modality, transformer_config = (
            module_spec.params[name] for name in ("modality", "transformer_config")
        )
        groups = module_spec.params["pg_collection"]
        encoder = modality.encoder.build(transformer_config, groups)
        projector = modality.projector.build(
            modality.encoder.output_size, transformer_config, groups
        )
        return cls({ENCODER: encoder}, input_projections=[projector], pg_collection=groups)

    def decode(self, embeddings: torch.Tensor, data_batch: dict) -> torch.Tensor:
        """This package's modalities are inputs only."""
        raise ValueError("modalities are inputs only: there is no decoder to run")


class MediaCountError(ValueError):
    """An encoder gave another number of rows than its placeholders take."""

    def __init__(self, modality: str, placeholders: int, rows: int, width: int) -> None:
        self.modality = modality
        self.numbers = (
            f"{modality}: num_tokens counted {placeholders} placeholder tokens, but the encoder "
            f"returned {rows} rows of width {width}; make num_tokens of its config agree"
        )
        super().__init__(self.numbers)

    def explain(self, items: dict[str, list[tuple[str, str]]]) -> str:
        """The numbers with the samples and files they come from."""
        found = [f"{key} ({file})" for key, file in items.get(self.modality, [])]
        return f"{self.numbers}; samples: {', '.join(found)}"


def check_count(name: str, rows: torch.Tensor, input_ids: torch.Tensor, token_id: int) -> None:
    """MediaCountError unless there is a row for every placeholder."""
    placeholders = int((input_ids == token_id).sum())
    if len(rows) != placeholders:
        raise MediaCountError(name, placeholders, len(rows), rows.shape[-1])


class StageMimoModel(MimoModel):
    """`MimoModel` for pipelines on shared ranks.

    The first stage holds the encoders, the projectors and the token embedding, the last one
    the head; every stage holds its share of the language model's layers.
    """

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        pg_collection: Any,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        dummy_inputs: dict[str, dict[str, torch.Tensor]],
        encoder_groups: EncoderGroups | None = None,
    ) -> None:
        super().__init__(mimo_config, cp_group=pg_collection.cp, tp_group=pg_collection.tp)
        self.pg_collection = pg_collection
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.dummy_inputs = dummy_inputs
        self.encoder_groups = encoder_groups
        # Parts that a checkpoint to start from need not have, and whether they are left out now.
        self.fresh_parts: tuple[str, ...] = ()
        self.hides_fresh_parts = False
        if encoder_groups:
            encoder_groups.tie(self.modality_submodules.parameters())
        self.share_embeddings_and_output_weights = (
            self.language_model is not None
            and self.language_model.share_embeddings_and_output_weights
        )

    @property
    def needs(self) -> Needs:
        """Ids and media go to the first stage, labels to the last."""
        modalities = frozenset(self.special_token_ids if self.pre_process else ())
        return Needs(ids=self.pre_process, labels=self.post_process, modalities=modalities)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied weight, where this stage has one; Megatron sums its gradients."""
        if self.language_model is None:
            return None
        return self.language_model.shared_embedding_or_output_weight()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """What a checkpoint holds of this stage: of an encoder's copies the first."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.encoder_groups:
            inside = f"{prefix}modality_submodules."
            self.encoder_groups.mark_copies({k: v for k, v in state.items() if inside in k})
        if self.hides_fresh_parts:
            hidden = tuple(prefix + part_prefix(part) for part in self.fresh_parts)
            state = {
                key: LocalNonpersistentObject(value.data) if key.startswith(hidden) else value
                for key, value in state.items()
            }
        return state

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

    def forward(
        self,
        input_ids: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        modality_inputs: dict[str, dict[str, Any]] | None = None,
        inference_context: Any = None,
        cu_seqlens: list[int] | None = None,
    ) -> torch.Tensor:
        """(B, S) ids -> per-token loss (B, S) with labels, else logits (B, S, V / TP).

        Under context parallelism labels, loss and logits are shards of the sequence, S / CP.
        With `inference_context`, keys and values are kept in it, and the logits are the last
        position's over the whole vocabulary (B, 1, V). Stages before the last return hidden
        states (S, B, H). `modality_inputs` maps modality -> input name -> tensor with the rows of
        all items, in the order of the placeholders. `bounds` are the starts of the sequences in a
        packed row, and its end.
        """
        embeddings = self.embed(input_ids, modality_inputs or {}) if self.pre_process else None
        if embeddings is not None:
            embeddings = self._shard(embeddings, cu_seqlens)
        return self.language_model(
            input_ids=None,
            position_ids=None,
            attention_mask=None,
            decoder_input=embeddings,
            labels=labels,
            inference_context=inference_context,
            runtime_gather_output=True if inference_context else None,
            packed_seq_params=packed_params(cu_seqlens) if cu_seqlens else None,
        )

    def _shard(self, embeddings: torch.Tensor, cu_seqlens: list[int] | None) -> torch.Tensor:
        """(S, B, H) -> (S / CP, B, H), and a part of it for every rank under sequence parallelism.

        Megatron's adapter does the same, but packed rows only with Transformer Engine.
        """
        embeddings = shard_sequence(embeddings, 0, self.pg_collection.cp, cu_seqlens)
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(embeddings, group=self.pg_collection.tp)
        return embeddings

    def embed(
        self, input_ids: torch.Tensor | None, modality_inputs: dict[str, dict[str, Any]]
    ) -> torch.Tensor:
        """(B, S) -> (S, B, H): the text's embeddings with the media's in their places."""
        assert input_ids is not None, "the first stage needs ids"
        embeddings = self._encode_media(modality_inputs, input_ids.device)
        for name, rows in embeddings.items():
            check_count(name, rows, input_ids, self.special_token_ids[name])
        embeddings["text"] = self.get_text_embeddings(input_ids, None, self.special_token_ids)
        return self.align_embeddings_by_token_positions(
            modality_embeddings=embeddings,
            input_ids=input_ids,
            special_token_ids=self.special_token_ids,
        )

    def _encode_media(
        self, modality_inputs: dict[str, dict[str, Any]], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """(tokens, H) of each modality; in training also of those that have no item.

        Always in the order of the config: a batch's own order differs between ranks, and encoders
        that run in another order bring other collectives and other gradients first.
        """
        learns = self.training and torch.is_grad_enabled()
        rows: dict[str, torch.Tensor] = {}
        for name in self.special_token_ids:
            if name in modality_inputs:
                rows[name] = self._encode(name, modality_inputs[name])
            elif learns:
                rows[name] = self._encode_dummy(name, device)
        return rows

    def _encode(self, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, ...) inputs -> (tokens, H); ranks that hold the same encoder share the rows out."""
        mine = inputs
        for group in self._sharing_groups():
            share = share_of(len(next(iter(mine.values()))), group.rank(), group.size())
            mine = {key: tensor[share] for key, tensor in mine.items()}
        first = next(iter(mine.values()))
        rows = (
            self._run_encoder(name, mine) if len(first) else self._encode_dummy(name, first.device)
        )
        for group in reversed(self._sharing_groups()):
            rows = gather_rows(rows, group, partial_gradients=group is self.pg_collection.cp)
        return rows

    def _sharing_groups(self) -> list[dist.ProcessGroup]:
        copies = [self.encoder_groups.copies] if self.encoder_groups else []
        return [group for group in [self.pg_collection.cp, *copies] if group.size() > 1]

    def _run_encoder(self, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.modality_submodules[name](encoder_inputs={ENCODER: inputs})

    def _encode_dummy(self, name: str, device: torch.device) -> torch.Tensor:
        """No rows of a modality that this rank has no item of, on a graph through all its weights.

        Their gradients are then zeros that exist, as overlapped gradient reduction needs.
        """
        inputs = {key: tensor.to(device) for key, tensor in self.dummy_inputs[name].items()}
        return self._run_encoder(name, inputs)[:0]


def packed_params(cu_seqlens: list[int]) -> PackedSeqParams:
    """What Megatron's rotary positions and attention ask about a packed row."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    starts = torch.tensor(cu_seqlens, dtype=torch.int32, device=where)
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def build_mimo_model(
    config: MimoConfig,
    language: TransformerConfig,
    pg_collection: Any,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    encoder_groups: EncoderGroups | None = None,
) -> StageMimoModel:
    """The part of `config` that a rank holds; `language` says how it is computed."""
    modalities = config.modalities if pre_process else {}
    encoding_groups = encoder_groups.layers if encoder_groups else pg_collection
    encoding = split_over(language, encoding_groups.tp.size())
    mimo_config = MimoModelConfig(
        language_model_spec=language_spec(
            config.language, language, pg_collection, pre_process, post_process, vp_stage
        ),
        modality_submodules_spec={
            name: modality_spec(modality, encoding, encoding_groups)
            for name, modality in modalities.items()
        },
        special_token_ids={name: m.token_id for name, m in config.modalities.items()},
    )
    idle = {name: dummy_input(modality) for name, modality in modalities.items()}
    return StageMimoModel(
        mimo_config, pg_collection, pre_process, post_process, vp_stage, idle, encoder_groups
    )


def build_part(
    config: MimoConfig, part: str, transformer_config: TransformerConfig, pg_collection: Any
) -> torch.nn.Module:
    """One part by its name (`images.encoder`, `images.projector`, `language`), whole."""
    if part == "language":
        spec = language_spec(config.language, transformer_config, pg_collection, True, True, None)
        return build_module(spec)
    name, side = part.split(".")
    modality = config.modalities[name]
    if side == "encoder":
        return modality.encoder.build(transformer_config, pg_collection)
    return modality.projector.build(modality.encoder.output_size, transformer_config, pg_collection)


def part_prefix(part: str) -> str:
    """What the names of a part's weights begin with in a checkpoint."""
    if part == "language":
        return "language_model."
    name, side = part.split(".")
    inside = "input_projections.0" if side == "projector" else f"encoders.{ENCODER}"
    return f"modality_submodules.{name}.{inside}."


def dummy_input(modality: ModalityConfig) -> dict[str, torch.Tensor]:
    """A single random input of a modality's encoder."""
    item = modality.encoder.mock_inputs(torch.Generator().manual_seed(0))
    return {name: tensor[:1] for name, tensor in item.items()}


def language_spec(
    sizes: LanguageConfig,
    config: TransformerConfig,
    pg_collection: Any,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> ModuleSpec:
    """A stage of the GPT."""
    num_layers = get_num_layers_to_build(config, vp_stage, pg_collection.pp.rank())
    layers = block_submodules(
        config.transformer_impl, AttnMaskType.causal, num_layers, config.qk_layernorm
    )
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": layers,
            "vocab_size": sizes.vocab_size,
            "max_sequence_length": sizes.seq_length,
            "pre_process": pre_process,
            "post_process": post_process,
            "share_embeddings_and_output_weights": sizes.tie_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": sizes.rotary_base,
            "rope_scaling": sizes.rope_scaling_factor is not None,
            "rope_scaling_factor": sizes.rope_scaling_factor or 1.0,
            # MimoModel shards text and media together, after it has put them in order.
            "scatter_embedding_sequence_parallel": False,
            "pg_collection": pg_collection,
            "vp_stage": vp_stage,
        },
    )


def modality_spec(
    modality: ModalityConfig, language: TransformerConfig, pg_collection: Any
) -> ModuleSpec:
    """An encoder and its projector; `language` says how they are computed."""
    params = {"modality": modality, "transformer_config": language}
    return ModuleSpec(module=Modality, params={**params, "pg_collection": pg_collection})


def part_names(config: MimoConfig) -> list[str]:
    """`images.encoder`, `images.projector`, ..., `language`."""
    sides = [f"{name}.{side}" for name in config.modalities for side in ("encoder", "projector")]
    return [*sides, "language"]


def check_freeze(names: Iterable[str], config: MimoConfig) -> None:
    """ValueError for a name that is no part of the model."""
    known = part_names(config)
    for name in names:
        if name not in known:
            raise ValueError(f"--freeze {name}: {config.name} has the parts {', '.join(known)}")


def parts(model: StageMimoModel) -> dict[str, torch.nn.Module]:
    """The parts that this stage holds."""
    found: dict[str, torch.nn.Module] = {}
    for name, modality in model.modality_submodules.items():
        found[f"{name}.encoder"] = modality.encoders[ENCODER]
        found[f"{name}.projector"] = modality.input_projections[0]
    if model.language_model is not None:
        found["language"] = model.language_model
    return found


def freeze_parts(model: StageMimoModel, names: Iterable[str]) -> None:
    """Stop the named parts from training; gradients still flow through them."""
    held = parts(model)
    for name in names:
        if name in held:
            held[name].requires_grad_(False)
