"""Strict loading of checkpoint weights: for inference, and to start or resume training.

`load_model` sets up torch.distributed and Megatron's parallel state by itself, so answering needs
neither the training loop nor its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as linear_layers
from megatron.core.transformer import TransformerConfig
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn import functional

from examples.mimo.checkpoint.description import Checkpoint, latest_weights
from examples.mimo.checkpoint.integrity import begin_check, finish_check, first_line
from examples.mimo.configs.schema import LanguageConfig, MimoConfig
from examples.mimo.modalities.base import EncoderConfig
from examples.mimo.model.layers import has_transformer_engine
from examples.mimo.model.mimo import StageMimoModel, build_mimo_model
from examples.mimo.model.parts import part_config_of, part_names, part_prefix

SEED = 1234
# Apex's extension, which Megatron's own linear layers need to add gradients to those before; a
# model has some beside Transformer Engine's layers: the projectors and the head.
HAS_FUSED_GRADIENTS = linear_layers._grad_accum_fusion_available
# Of an encoder's sequence: 16 GiB in fp32.
MAX_POSITIONS = 2**32
TIMEOUT = timedelta(minutes=10)

# What a training checkpoint holds beside the model.
NOT_THE_MODEL = ("optimizer", "chained", "rerun_state_machine_state")
# Non-colocated encoders put their name in front.
RANDOM_STATE = "rng_state"
EXTRA_STATE = "._extra_state"

# Sizes that tensor parallelism divides, in the configs of all parts.
DIVIDED_FIELDS = (
    *("num_attention_heads", "num_query_groups"),
    *("ffn_hidden_size", "vocab_size"),
)

# torch's is a BaseException: a plain `except Exception` lets it pass.
CHECKPOINT_ERRORS = (CheckpointingException, CheckpointException)

OPTIMIZER_STATE = "optimizer.state."
# Only the distributed optimizer saves weights of its own in this place.
DISTRIBUTED_STATE = f"{OPTIMIZER_STATE}param."


def load_model(checkpoint: Checkpoint, tp: int = 1, pp: int = 1) -> StageMimoModel:
    """This rank's part of the model in evaluation mode; fp32 on CPUs, bf16 on GPUs.

    Sets up Megatron's parallel state, once a process. ValueError when the layout does not fit
    the model or the world, or when the weights are not exactly the model's.
    """
    config = checkpoint.config
    check_layout(config, tp, pp)
    check_size(checkpoint)
    if checkpoint.verify:  # while the model is built
        begin_check(checkpoint.weights, checkpoint.named)
    start_parallel(tp, pp)
    on_cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_cuda else torch.float32
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = build_mimo_model(
        config,
        language_transformer_config(config.language, tp, pp, dtype),
        groups,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == pp - 1,
    )
    model.to(device=device, dtype=dtype).eval()
    finish_check(checkpoint.weights)
    load_weights(model, checkpoint)
    return model


def check_layout(config: MimoConfig, tp: int, pp: int) -> None:
    """ValueError unless tp x pp processes run and every part divides into them."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        world_size = dist.get_world_size()
    if world_size != tp * pp:
        raise ValueError(
            f"--tp {tp} x --pp {pp} needs {tp * pp} processes, but {world_size} run; start "
            f"with torchrun --nproc-per-node {tp * pp}"
        )
    for part in reversed(part_names(config)):  # the language model first
        for path, size in tensor_parallel_sizes(config, part).items():
            if size % tp:
                raise ValueError(
                    f"{path} {size} is not divisible by --tp {tp}; choose a divisor of {size}"
                )
    if config.language.num_layers % pp:
        raise ValueError(
            f"language.num_layers {config.language.num_layers} is not divisible by --pp {pp}; "
            f"choose a divisor of {config.language.num_layers}"
        )


def check_size(checkpoint: Checkpoint) -> None:
    """ValueError where the config describes a model that the files are too small for.

    A description of elsewhere must not make this process allocate what its weights cannot fill. The
    products of layers and widths are less than the parameters, which take a byte each at least.
    """
    config = checkpoint.config
    language = config.language
    least = config.vocab_size * language.hidden_size
    least += 2 * language.num_layers * language.hidden_size * language.ffn_hidden_size
    for name, modality in config.inputs.items():
        encoder = modality.encoder
        if encoder.sequence_length * encoder.hidden_size > MAX_POSITIONS:
            raise ValueError(
                f"{checkpoint.named}: {name}.encoder has {encoder.sequence_length:,} positions of "
                f"hidden_size {encoder.hidden_size:,}, but {MAX_POSITIONS:,} numbers fit; its "
                "description is damaged"
            )
        if type(encoder).build is EncoderConfig.build:  # the shared transformer
            least += 2 * encoder.built_layers * encoder.hidden_size * encoder.ffn_hidden_size
    size = sum(path.stat().st_size for path in checkpoint.weights.glob("*.distcp"))
    if least > size:
        raise ValueError(
            f"{checkpoint.named}: the model described has more than {least:,} parameters, but "
            f"the weights take {size:,} bytes; the description is damaged, or another model's"
        )


def tensor_parallel_sizes(config: MimoConfig, part: str) -> dict[str, int]:
    """The sizes of a part that tensor parallelism divides: `part.field` -> size."""
    part_config = part_config_of(config, part)
    sizes = {f"{part}.{field}": getattr(part_config, field, None) for field in DIVIDED_FIELDS}
    return {path: size for path, size in sizes.items() if size is not None}


def start_parallel(tp: int, pp: int) -> None:
    """Process group, parallel state and seeds, unless the process has them already."""
    if parallel_state.model_parallel_is_initialized():
        return
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    parallel_state.initialize_model_parallel(tp, pp)
    torch.manual_seed(SEED)
    # The layers' random states must exist, though answering draws nothing from them.
    tensor_parallel.model_parallel_cuda_manual_seed(SEED)


def language_transformer_config(
    language: LanguageConfig,
    tp: int,
    pp: int,
    params_dtype: torch.dtype,
    local_layers: bool = False,
) -> TransformerConfig:
    """The TransformerConfig that training derives from Megatron's arguments for this model.

    Only fields that say how to train differ; a test names them. `local_layers` are used without
    Transformer Engine, and beside it.
    """
    on_cuda = torch.cuda.is_available()
    has_engine = has_transformer_engine() and not local_layers
    config = TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.head_dim,
        layernorm_epsilon=language.norm_epsilon,
        init_method_std=language.init_method_std,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        normalization="RMSNorm",
        activation_func=functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=False,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        use_cpu_initialization=not on_cuda,
        transformer_impl="transformer_engine" if has_engine else "local",
        persist_layer_norm=has_engine,
        masked_softmax_fusion=has_engine,
        gradient_accumulation_fusion=has_engine and HAS_FUSED_GRADIENTS,
        apply_rope_fusion=has_engine,
        bias_activation_fusion=True,
        bias_dropout_fusion=on_cuda,
        deallocate_pipeline_outputs=True,
        cp_comm_type="p2p",
    )
    # Prompts differ in length, so stages tell each other how long a tensor is. Set afterwards:
    # the constructor checks it against expert routing, which this model has none of.
    config.variable_seq_lengths = pp > 1
    return config


def sharding_metadata() -> dict[str, Any]:
    """How a model's weights are named and split in a checkpoint, as Megatron's training saves them.

    Of `_build_sharded_state_dict_metadata` in megatron/training/checkpointing.py, what is not
    about the optimizer.
    """
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def load_weights(
    model: StageMimoModel, checkpoint: Checkpoint, fresh_parts: Collection[str] = ()
) -> None:
    """Fill `model` from `checkpoint`; ValueError unless both hold exactly the same tensors.

    `fresh_parts`, such as `sensors.encoder`, keep the weights they have and may be absent.
    """
    # torch would log two lines of its own for an index that it cannot read.
    tensor_names(checkpoint.weights, checkpoint.named)
    prefixes = tuple(part_prefix(part) for part in fresh_parts)
    expected = model.sharded_state_dict(metadata=sharding_metadata())
    expected = {key: value for key, value in expected.items() if not key.startswith(prefixes)}
    try:
        # Megatron calls missing what the checkpoint has and the model does not ask for.
        state, unused, absent = dist_checkpointing.load(
            {"model": expected}, str(checkpoint.weights), strict="return_all"
        )
    except (*CHECKPOINT_ERRORS, Exception) as error:  # damaged pickles raise what they like
        raise ValueError(f"{checkpoint.named}: the weights do not load ({reason(error)})") from None
    # Extra states hold what FP8 needs in training, and older checkpoints hold empty ones.
    unknown = {
        key
        for key in unused
        if not key.startswith((*NOT_THE_MODEL, *prefixes))
        and not key.endswith(RANDOM_STATE)
        and EXTRA_STATE not in key
    }
    for problem, keys in (("lacks", absent), ("holds, unknown to the model,", unknown)):
        if keys:
            raise ValueError(
                f"{checkpoint.named}: the checkpoint {problem} {len(keys)} tensors, such "
                f"as {sorted(keys)[0]}; it is not {checkpoint.config.name}'s"
            )
    missing, unexpected = model.load_state_dict(state["model"], strict=False)
    missing = [k for k in missing if not k.startswith(prefixes) and EXTRA_STATE not in k]
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint.named}: the weights are not exactly those of "
            f"{checkpoint.config.name}: missing {missing}, unexpected {unexpected}"
        )


def reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return first_line(error)


def check_same_optimizer(folder: Path, distributed: bool) -> None:
    """ValueError when `folder` holds optimizer state of the other kind, which does not load."""
    names = tensor_names(latest_weights(folder, "--load"), f"--load {folder}")
    if not any(name.startswith(OPTIMIZER_STATE) for name in names):
        return
    saved = any(name.startswith(DISTRIBUTED_STATE) for name in names)
    if saved != distributed:
        with_or_without, change = ("with", "add") if saved else ("without", "drop")
        raise ValueError(
            f"--load {folder}: saved {with_or_without} the distributed optimizer; {change} "
            "--use-distributed-optimizer, or start its state afresh with --no-load-optim"
        )


def has_random_states(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether `folder` holds the random states of non-colocated encoders.

    `sizes` are their tensor-parallel sizes. Megatron checks those of the language model.
    """
    names = tensor_names(latest_weights(folder, "--load"), f"--load {folder}")
    return all(f"{name}.{RANDOM_STATE}/shard_0.0_1.{size}" in names for name, size in sizes.items())


def tensor_names(weights: Path, where: str) -> Collection[str]:
    """What the index of an iteration lists; ValueError, which begins with `where`, if it cannot."""
    try:
        return FileSystemReader(weights).read_metadata().state_dict_metadata
    except Exception as error:  # damaged pickles raise what they like
        raise ValueError(
            f"{where}: {weights.name}/.metadata is damaged ({first_line(error)})"
        ) from None


def schedule_mismatch(error: AssertionError) -> str | None:
    """One line for Megatron's refusal of another learning-rate schedule; None for other errors."""
    words = " ".join(str(error).split())
    if not words.startswith("OptimizerParamScheduler"):
        return None
    return (
        f"the checkpoint was trained on another schedule ({words.partition(': ')[2]}); "
        "--override-opt_param-scheduler takes this run's, --use-checkpoint-opt_param-scheduler "
        "the checkpoint's"
    )
