"""What a rank of each pipeline stage holds, counted on tensors that have shapes and no memory."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.transformer_block import TransformerBlock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from examples.mimo.cli.header import PartSize, part_sizes
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.modalities.base import EncoderConfig
from examples.mimo.model.mimo import (
    StageMimoModel,
    build_mimo_model,
    freeze_parts,
    part_names,
    parts,
)
from examples.mimo.parallel.noncolocated import (
    build_noncolocated_model,
    initialize_module_parallel,
)
from examples.mimo.parallel.placement import Placement, create_grids, here
from examples.mimo.parallel.replicas import create_encoder_replicas
from examples.mimo.training.layout import RankGroup, colocated_encoder_tp, placements
from examples.mimo.training.providers import transformer_config

ADAM_BYTES = 8
FP32_COPY_BYTES = 4


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one rank of a stage; `activations` are one micro-batch's, a number per chunk."""

    parts: dict[str, list[PartSize]]
    parameters: int
    gradients: int
    optimizer: int
    activations: list[int]


def place_memory(config: MimoConfig, args: argparse.Namespace, place: RankGroup) -> StageMemory:
    """Builds what a place holds as a run would, on its first rank of a made-up world."""
    placed = placements(args)
    with _made_up_world(args, place, placed) as pg_collection, FakeTensorMode():
        if placed:
            chunks = _build_alone(config, args, pg_collection, placed)
        else:
            chunks = _build(config, args, pg_collection, place.stage)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        sizes: dict[str, list[PartSize]] = {}
        for chunk in chunks:
            for name, size in part_sizes(chunk, args).items():
                sizes.setdefault(name, []).append(size)
        return StageMemory(
            parts=sizes,
            parameters=sum(p.numel() * p.element_size() for p in parameters),
            gradients=trained * _gradient_bytes(args),
            optimizer=round(trained * _optimizer_bytes(args, pg_collection.dp_cp.size())),
            activations=[_activation_bytes(config, args, chunk) for chunk in chunks],
        )


@contextlib.contextmanager
def _made_up_world(
    args: argparse.Namespace, place: RankGroup, placed: Sequence[Placement]
) -> Iterator[ProcessGroupCollection]:
    dist.init_process_group(
        "fake", rank=place.ranks[0], world_size=args.world_size, store=FakeStore()
    )
    if placed:
        initialize_module_parallel(here(placed, place.ranks[0]), create_gloo_process_groups=False)
    else:
        mpu.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            create_gloo_process_groups=False,
        )
    # The training tracker compares generator states, which tensors without memory do not have.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def _build_alone(
    config: MimoConfig,
    args: argparse.Namespace,
    pg_collection: ProcessGroupCollection,
    placed: Sequence[Placement],
) -> list[StageMimoModel]:
    """The module, or stage of the language model, that has ranks of its own."""
    stage, last = pg_collection.pp.rank(), pg_collection.pp.size() - 1
    model = build_noncolocated_model(
        config,
        transformer_config(args),
        pg_collection,
        placed,
        create_grids(placed),
        pre_process=stage == 0,
        post_process=stage == last,
    )
    return [_as_trained(model, args)]


def _as_trained(model: StageMimoModel, args: argparse.Namespace) -> StageMimoModel:
    freeze_parts(model, args.freeze)
    # As Megatron's Float16Module does; torch's own layers begin in 32 bits.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(args.params_dtype)
    return model.train()


def _build(
    config: MimoConfig, args: argparse.Namespace, pg_collection: Any, stage: int
) -> list[StageMimoModel]:
    virtual = args.virtual_pipeline_model_parallel_size
    last_stage = args.pipeline_model_parallel_size - 1
    replicas = create_encoder_replicas(colocated_encoder_tp(args), pg_collection)
    chunks = []
    for number in range(virtual or 1):
        chunk = build_mimo_model(
            config,
            transformer_config(args),
            pg_collection,
            pre_process=stage == 0 and number == 0,
            post_process=stage == last_stage and number == (virtual or 1) - 1,
            vp_stage=number if virtual else None,
            encoder_replicas=replicas,
        )
        chunks.append(_as_trained(chunk, args))
    return chunks


def _gradient_bytes(args: argparse.Namespace) -> int:
    """Per trained parameter: Megatron's gradient buffer."""
    return 4 if args.accumulate_allreduce_grads_in_fp32 else args.params_dtype.itemsize


def _optimizer_bytes(args: argparse.Namespace, copies: int) -> float:
    """Per trained parameter: Adam's two moments, and an fp32 copy of a parameter in 16 bits."""
    whole = ADAM_BYTES + (FP32_COPY_BYTES if args.params_dtype.itemsize < 4 else 0)
    if not args.use_distributed_optimizer:
        return whole
    return whole / copies


def _activation_bytes(config: MimoConfig, args: argparse.Namespace, chunk: StageMimoModel) -> int:
    """What layers, projectors and head keep of one micro-batch for the backward pass."""
    held = parts(chunk)
    kept = _kept_by_language(config, args, chunk) if "language" in held else 0
    for name in chunk.modality_submodules:
        encoder, projector = held[f"{name}.encoder"], held[f"{name}.projector"]
        sizes = config.modalities[name].encoder
        inputs = _inputs_of_a_rank(name, sizes.max_inputs, args)
        kept += _kept_by_modality(sizes, args, encoder, projector, inputs)
    return kept


def _inputs_of_a_rank(name: str, largest: int, args: argparse.Namespace) -> int:
    """Of a micro-batch with an item a sample, which is `largest` of the encoder's inputs."""
    inputs = args.micro_batch_size * largest
    placed = placements(args)
    if placed:
        copies = next(one.dp for one in placed if one.name == name)
        return math.ceil(inputs * placed[-1].dp / copies)
    copies = args.tensor_model_parallel_size // args.encoder_tensor_model_parallel_size[name]
    return math.ceil(inputs / (args.context_parallel_size * copies))


def _kept_by_language(config: MimoConfig, args: argparse.Namespace, chunk: StageMimoModel) -> int:
    columns = args.seq_length // args.context_parallel_size
    rows = columns // args.tensor_model_parallel_size if args.sequence_parallel else columns
    # A frozen language model keeps what its inputs' gradients need, unless nothing trains.
    passes_on = set(args.freeze) != set(part_names(config)) or bool(args.encoder_ranks)
    size = (rows, args.micro_batch_size, args.hidden_size)
    hidden = torch.empty(size, dtype=args.params_dtype, requires_grad=passes_on)
    if not chunk.pre_process:
        chunk.set_input_tensor([hidden])
    labels = torch.empty((args.micro_batch_size, columns), dtype=torch.long)
    return _kept_by(
        chunk.language_model,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=hidden if chunk.pre_process else None,
        labels=labels if chunk.post_process else None,
    )


def _kept_by_modality(
    sizes: EncoderConfig,
    args: argparse.Namespace,
    encoder: torch.nn.Module,
    projector: torch.nn.Module,
    inputs: int,
) -> int:
    """Of an encoder its transformer blocks are counted, which is nearly all of it."""
    trains = any(p.requires_grad for p in encoder.parameters())

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=args.params_dtype, requires_grad=trains)

    kept = _kept_by(projector, empty(inputs * sizes.max_tokens, sizes.output_size))
    for block in encoder.modules():
        if isinstance(block, TransformerBlock):
            width = block.config.hidden_size
            hidden = empty(sizes.sequence_length, inputs, width)
            kept += _kept_by(block, hidden, attention_mask=None)
    return kept


def _kept_by(module: torch.nn.Module, *inputs: Any, **named: Any) -> int:
    """Bytes that the backward pass of a module needs, its weights not counted, none twice."""
    seen = {p.untyped_storage()._cdata for p in module.parameters()}
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The output holds the graph, and so keeps every counted storage alive.
        output = module(*inputs, **named)
    del output
    return kept
