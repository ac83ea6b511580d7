"""Dry run: memory and compute of every rank of a run, without allocating weights."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from examples.mimo.cli.arguments import (
    WITHOUT_TRANSFORMER_ENGINE,
    balance_stages,
    own_flags,
    parse_arguments,
)
from examples.mimo.cli.output import (
    PartSize,
    aligned,
    describe_data,
    is_split,
    layout_name,
    numerics,
    part_sizes,
    parts_table,
    span,
)
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.modalities.base import EncoderConfig
from examples.mimo.model.mimo import StageMimoModel, build_mimo_model
from examples.mimo.model.parts import freeze_parts, part_names, parts
from examples.mimo.parallel.noncolocated import (
    build_noncolocated_model,
    initialize_module_parallel,
)
from examples.mimo.parallel.placement import create_encoder_replicas, create_grids, here
from examples.mimo.planner.flops import Workload
from examples.mimo.planner.pipeline import (
    COUNTED_SAMPLES,
    Split,
    describe_pipeline,
    predicted_split,
    workload,
)
from examples.mimo.training.inputs import first_batches
from examples.mimo.training.layout import RankGroup, RunShape, rank_groups, run_shape
from examples.mimo.training.pretrain import transformer_config

MIB = 2**20
# More micro-batches than this make a drawing that shows nothing.
DRAWN_ROUNDS = 3
# Per trained parameter: two moments in fp32.
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


def group_memory(
    config: MimoConfig,
    shape: RunShape,
    transformer_config: TransformerConfig,
    group: RankGroup,
) -> StageMemory:
    """What the first rank of `group` holds, built as the run would build it in a fake world."""
    with _fake_world(shape, group) as pg_collection, FakeTensorMode():
        build = _build_noncolocated if shape.placements else _build_colocated
        chunks = build(config, shape, transformer_config, pg_collection, group.stage)
        for chunk in chunks:
            _prepare_as_trained(chunk, shape)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        sizes: dict[str, list[PartSize]] = {}
        for chunk in chunks:
            for name, size in part_sizes(chunk, shape.tp, shape.encoder_tp).items():
                sizes.setdefault(name, []).append(size)
        return StageMemory(
            parts=sizes,
            parameters=sum(p.numel() * p.element_size() for p in parameters),
            gradients=trained * _gradient_bytes(shape),
            optimizer=round(trained * _optimizer_bytes(shape, pg_collection.dp_cp.size())),
            activations=[_activation_bytes(config, shape, chunk) for chunk in chunks],
        )


@contextlib.contextmanager
def _fake_world(shape: RunShape, group: RankGroup) -> Iterator[ProcessGroupCollection]:
    dist.init_process_group(
        "fake", rank=group.ranks[0], world_size=shape.world_size, store=FakeStore()
    )
    placed = shape.placements
    if placed:
        initialize_module_parallel(here(placed, group.ranks[0]), create_gloo_process_groups=False)
    else:
        mpu.initialize_model_parallel(
            shape.tp,
            shape.pp,
            shape.virtual_stages,
            context_parallel_size=shape.cp,
            create_gloo_process_groups=False,
        )
    # The training tracker compares generator states, which tensors without memory do not have.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    try:
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def _build_noncolocated(
    config: MimoConfig,
    shape: RunShape,
    transformer_config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    stage: int,
) -> list[StageMimoModel]:
    """The encoder, or the stage of the language model, that the rank holds."""
    model = build_noncolocated_model(
        config,
        transformer_config,
        pg_collection,
        shape.placements,
        create_grids(shape.placements),
        pre_process=stage == 0,
        post_process=stage == pg_collection.pp.size() - 1,
    )
    return [model]


def _build_colocated(
    config: MimoConfig,
    shape: RunShape,
    transformer_config: TransformerConfig,
    pg_collection: ProcessGroupCollection,
    stage: int,
) -> list[StageMimoModel]:
    """The chunks of a pipeline stage, one for each of its virtual stages."""
    num_chunks = shape.virtual_stages or 1
    encoder_tp = next(iter(shape.encoder_tp.values()), shape.tp)
    replicas = create_encoder_replicas(encoder_tp, pg_collection)
    return [
        build_mimo_model(
            config,
            copy.copy(transformer_config),
            pg_collection,
            pre_process=stage == 0 and number == 0,
            post_process=stage == shape.pp - 1 and number == num_chunks - 1,
            vp_stage=number if shape.virtual_stages else None,
            encoder_replicas=replicas,
        )
        for number in range(num_chunks)
    ]


def _prepare_as_trained(model: StageMimoModel, shape: RunShape) -> None:
    freeze_parts(model, sorted(shape.frozen))
    # As Megatron's Float16Module does; torch's own layers begin in 32 bits.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(shape.params_dtype)
    model.train()


def _gradient_bytes(shape: RunShape) -> int:
    """Per trained parameter: Megatron's gradient buffer."""
    return 4 if shape.gradients_in_fp32 else shape.params_dtype.itemsize


def _optimizer_bytes(shape: RunShape, replicas: int) -> float:
    """Per trained parameter: Adam's two moments, and an fp32 copy of a parameter in 16 bits."""
    whole = ADAM_BYTES + (FP32_COPY_BYTES if shape.params_dtype.itemsize < 4 else 0)
    return whole / replicas if shape.distributed_optimizer else whole


def _activation_bytes(config: MimoConfig, shape: RunShape, chunk: StageMimoModel) -> int:
    """What layers, projectors and head keep of one micro-batch for the backward pass."""
    modules = parts(chunk)
    kept = _kept_by_language(config, shape, chunk) if "language" in modules else 0
    for name in chunk.modality_submodules:
        encoder, projector = modules[f"{name}.encoder"], modules[f"{name}.projector"]
        encoder_config = config.inputs[name].encoder
        inputs = _inputs_of_a_rank(name, encoder_config.max_inputs, shape)
        kept += _kept_by_modality(encoder_config, shape.params_dtype, encoder, projector, inputs)
    return kept


def _inputs_of_a_rank(name: str, max_inputs: int, shape: RunShape) -> int:
    """Encoder inputs of a micro-batch on a rank, if every sample has one item of the largest."""
    inputs = shape.micro_batch_size * max_inputs
    if shape.placements:
        encoder = next(placement for placement in shape.placements if placement.name == name)
        return math.ceil(inputs * shape.placements[-1].dp / encoder.dp)
    replicas = shape.tp // shape.encoder_tp[name]
    return math.ceil(inputs / (shape.cp * replicas))


def _kept_by_language(config: MimoConfig, shape: RunShape, chunk: StageMimoModel) -> int:
    context_length = shape.seq_length // shape.cp
    length = context_length // shape.tp if shape.sequence_parallel else context_length
    # A frozen language model keeps what its inputs' gradients need, unless nothing trains.
    passes_on = shape.frozen != set(part_names(config)) or bool(shape.placements)
    hidden = torch.empty(
        (length, shape.micro_batch_size, config.language.hidden_size),
        dtype=shape.params_dtype,
        requires_grad=passes_on,
    )
    if not chunk.pre_process:
        chunk.set_input_tensor([hidden])
    labels = torch.empty((shape.micro_batch_size, context_length), dtype=torch.long)
    return _kept_by(
        chunk.language_model,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=hidden if chunk.pre_process else None,
        labels=labels if chunk.post_process else None,
    )


def _kept_by_modality(
    config: EncoderConfig,
    params_dtype: torch.dtype,
    encoder: torch.nn.Module,
    projector: torch.nn.Module,
    inputs: int,
) -> int:
    """Of an encoder its transformer blocks are counted, which is nearly all of it."""
    trains = any(p.requires_grad for p in encoder.parameters())

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=params_dtype, requires_grad=trains)

    kept = _kept_by(projector, empty(inputs * config.max_tokens, config.output_size))
    for block in encoder.modules():
        if isinstance(block, TransformerBlock):
            width = block.config.hidden_size
            hidden = empty(config.sequence_length, inputs, width)
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


def plan(argv: Sequence[str]) -> str:
    """The report on the run that `argv` describes; ValueError says why it could not run."""
    processes = own_flags(argv).dry_run
    if processes < 1:
        raise ValueError(f"--dry-run {processes}: name a number of processes, 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--dry-run plans any number of processes from one; start without torchrun")
    os.environ["WORLD_SIZE"] = str(processes)
    args, config = parse_arguments(argv)
    balance_stages(args, config)
    # Transformer Engine's layers hold the same, but need memory to be built.
    vars(args).update(WITHOUT_TRANSFORMER_ENGINE)
    args.perform_initialization = False
    shape = run_shape(args)
    memory = {
        group: group_memory(config, shape, transformer_config(args), group)
        for group in rank_groups(args)
    }
    work = workload(config, first_batches(args, config, COUNTED_SAMPLES))
    split = predicted_split(config, shape, transformer_config(args), work)
    return "\n".join(
        [
            f"{config.name}: {layout_name(args)} on {processes} "
            f"process{'es' * (processes > 1)}, {numerics(args)}",
            _data(describe_data(args), shape, work),
            *parts_table(config, {p.label: m.parts for p, m in memory.items()}, is_split(args)),
            "",
            "memory of a rank in MiB; activations: sequences of --seq-length, an item of each "
            "modality a sample",
            *_memory_table(memory, split),
            "",
            *_compute(split, memory),
            "",
            *_pipeline(shape, split),
        ]
    )


def _data(source: str, shape: RunShape, work: Workload) -> str:
    inputs = [
        f"{count / shape.micro_batch_size:.1f} for {name}" for name, count in work.inputs.items()
    ]
    of_a_sample = f"; encoder inputs of a sample: {', '.join(inputs)}" if inputs else ""
    return (
        f"data: {source}; {shape.global_batch_size} samples an iteration in "
        f"micro-batches of {shape.micro_batch_size}; {COUNTED_SAMPLES} samples counted: "
        f"{work.batch_size:.0f} sequences of {work.seq_length:.0f} tokens{of_a_sample}"
    )


def _memory_table(memory: Mapping[RankGroup, StageMemory], split: Split) -> list[str]:
    lines = [["held by", "ranks", "parameters", "gradients", "optimizer", "activations", "total"]]
    for group, held in memory.items():
        # All non-colocated encoders together are the timeline's first rank.
        rank = group.stage + (bool(split.cost.ahead) and group.label not in split.cost.ahead)
        kept = sum(
            activations * split.timeline.in_flight(rank, number * split.num_stages + rank)
            for number, activations in enumerate(held.activations)
        )
        counts = [held.parameters, held.gradients, held.optimizer, kept]
        numbers = [f"{count / MIB:,.1f}" for count in [*counts, sum(counts)]]
        lines.append([group.label, span(group.ranks), *numbers])
    return aligned(lines)


def _compute(split: Split, held_by: Iterable[RankGroup]) -> list[str]:
    """Floating-point operations of an iteration, and how they fall on the ranks."""
    cost, ranks = split.cost, {group.label: len(group.ranks) for group in held_by}
    ranks_per_stage = ranks[list(ranks)[-1]]
    parts = {
        "encoders and projectors": cost.first.both * ranks_per_stage
        + sum(encoder.both * ranks[name] for name, encoder in cost.ahead.items()),
        "layers": cost.layer.both * sum(split.layers) * ranks_per_stage,
        "head": cost.last.both * ranks_per_stage,
    }
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in parts.items())
    count = total * split.num_micro_batches
    lines = [f"floating-point operations of an iteration: {count:.3g} ({shares})"]
    if len(ranks) == 1:
        return lines
    stages = [0.0] * split.num_stages
    for number, chunk in enumerate(replace(cost, ahead={}).chunks(split.layers)):
        stages[number % split.num_stages] += chunk.both
    per_rank = [*(encoder.both for encoder in cost.ahead.values()), *stages]
    most = max(per_rank)
    relative = [f"{name} {work / most:.2f}" for name, work in zip(ranks, per_rank, strict=True)]
    return [*lines, f"a rank's share, the busiest's being 1: {', '.join(relative)}"]


def _pipeline(shape: RunShape, split: Split) -> list[str]:
    if len(split.timeline.ranks) == 1:
        return ["no pipeline: every rank runs the whole model"]
    schedule = "interleaved 1F1B" if shape.virtual_stages else "1F1B"
    lines = [f"pipeline ({schedule}): {describe_pipeline(split)}"]
    drawn = split.shortened(DRAWN_ROUNDS * shape.pp).timeline.draw()
    labels = ["encoders"] * bool(split.cost.ahead) + [str(i) for i in range(split.num_stages)]
    width = max(3, *map(len, labels))
    lines += [f"  {label:>{width}} {line}" for label, line in zip(labels, drawn, strict=True)]
    lines.append(
        " " * (width + 3)
        + "digits: a micro-batch's forward pass, letters: its backward pass, .: waits"
    )
    return lines
