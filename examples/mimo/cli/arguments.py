"""From a command line to validated Megatron arguments and a resolved model config.

A preset's sizes are defaults of Megatron's own flags, so a size is written once, in the
config, and the command line still overrides it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.training import arguments as megatron_arguments
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)

from examples.mimo.checkpoint.description import FILE_NAME, open_checkpoint
from examples.mimo.checkpoint.loading import HAS_FUSED_GRADIENTS
from examples.mimo.cli.command import Parser, refuse
from examples.mimo.cli.flags import (
    NEEDS,
    ONLY_VALUES,
    OTHERWISE,
    RANGES,
    REFUSED_FLAGS,
    REFUSED_GROUPS,
    SHARDED,
    add_own_flags,
    flags_on,
)
from examples.mimo.cli.overrides import (
    whisper_assignments,
    with_fields,
    with_preprocessing,
    with_token_ids,
)
from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import LanguageConfig, MimoConfig
from examples.mimo.model.layers import has_transformer_engine
from examples.mimo.model.parts import check_freeze, part_names
from examples.mimo.planner.pipeline import even_split, layout_flag
from examples.mimo.training.inputs import check_schedule, check_shapes, starting_point, with_codecs
from examples.mimo.training.layout import (
    check_encoder_layout,
    check_layout,
    language_processes,
    run_shape,
)

# LanguageConfig field -> Megatron argument.
LANGUAGE_ARGUMENTS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "vocab_size": "vocab_size",
    "seq_length": "seq_length",
    "rotary_base": "rotary_base",
    "norm_epsilon": "layernorm_epsilon",
    "init_method_std": "init_method_std",
    "head_dim": "kv_channels",
    "qkv_bias": "add_qkv_bias",
    "qk_norm": "qk_layernorm",
}

# What a Llama-shaped model and this package's data path ask of Megatron.
MODEL_DEFAULTS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "tokenizer_type": "NullTokenizer",
    "calculate_per_token_loss": True,
    "dataloader_type": "external",
    "micro_batch_size": 4,
    "train_iters": 20,
    "lr": 1e-4,
    "eval_interval": 1000,
    "save_interval": 1000,
    "eval_iters": 0,
    "log_interval": 1,
    "exit_on_missing_checkpoint": False,
    "dist_ckpt_optim_fully_reshardable": True,
    "log_loss_scale_to_tensorboard": False,
}

WITHOUT_TRANSFORMER_ENGINE = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}

WITHOUT_CUDA = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "num_workers": 0,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "pad_to_multiple_of": 1,
}

# Megatron's flags that choose the split over pipeline stages, as --balance-stages does.
OTHER_SPLITS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "num_layers_per_virtual_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, MimoConfig]:
    """Validated arguments and the config with the command line laid over it.

    ValueError, one line, for a flag that would do nothing and for a layout that cannot run. With
    --balance-stages the layers are split evenly until `balance_stages` has seen the data.
    """
    own = own_flags(argv)
    preset = get_model_config(own.model_provider)
    preset = with_token_ids(preset, own.hf_assign_unused_tokens)
    sizes = whisper_assignments(preset, own.audio_encoder_model)
    preset = with_fields(preset, [*sizes, *own.config_fields])
    args = parse_with_preset(preset, argv)
    start = starting_point(args)
    if start is not None and (start / FILE_NAME).is_file():
        flag = "--load" if str(start) == args.load else "--pretrained-checkpoint"
        preset = with_preprocessing(preset, open_checkpoint(start, flag), own.config_fields)
    check_freeze(args.freeze, preset)
    args.fresh = expand_fresh(args, preset)
    check_layout(args, resolve(preset, args))
    check_encoder_layout(args, preset)
    _check_batch_sizes(args)
    check_schedule(args)
    check_shapes(args)
    if args.balance_stages:
        _split_evenly(args)
    config = with_codecs(args, resolve(preset, args))
    if config.outputs:  # of the whole table Megatron counts operations and memory
        args.padded_vocab_size = config.vocab_size
    _validate(args)
    return args, config


def balance_stages(args: argparse.Namespace, config: MimoConfig) -> None:
    """Split the layers as --balance-stages asks, if it does; reads the first training samples."""
    if not args.balance_stages:
        return
    from examples.mimo.planner.pipeline import COUNTED_SAMPLES, balanced_split, workload
    from examples.mimo.training.inputs import first_batches

    work = workload(config, first_batches(args, config, COUNTED_SAMPLES))
    split = balanced_split(config, run_shape(args), work)
    args.pipeline_model_parallel_layout = layout_flag(split.layers)


def _split_evenly(args: argparse.Namespace) -> None:
    for name in OTHER_SPLITS:
        if getattr(args, name):
            raise ValueError(
                f"--balance-stages and --{name.replace('_', '-')} both choose the split; drop one "
                "(virtual stages: --num-virtual-stages-per-pipeline-rank)"
            )
    virtual_stages = args.num_virtual_stages_per_pipeline_rank or 1
    chunks = args.pipeline_model_parallel_size * virtual_stages
    args.pipeline_model_parallel_layout = layout_flag(even_split(args.num_layers, chunks))
    # The layout says how many virtual stages there are, and Megatron takes one or the other.
    args.num_virtual_stages_per_pipeline_rank = None


def parse_with_preset(preset: MimoConfig, argv: Sequence[str]) -> argparse.Namespace:
    """Megatron's and the package's flags, with the preset's values as defaults."""
    actions: list[argparse.Action] = []

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        setattr(parser, "error", functools.partial(refuse, parser))
        add_own_flags(parser)
        defaults = preset_defaults(preset, uses_local_layers(argv))
        unknown = set(defaults) - {action.dest for action in parser._actions}
        assert not unknown, f"Megatron has no arguments {unknown}"
        if "--packing-buffer-size" in flags_on(argv):
            # A micro-batch is then one packed sequence.
            defaults["micro_batch_size"] = 1
        parser.set_defaults(**defaults)
        refuse_unknown_groups(parser, argv)
        actions.extend(parser._actions)
        return parser

    # Megatron's parser reads sys.argv and nothing else.
    saved = sys.argv
    sys.argv = [saved[0], *argv]
    try:
        args = megatron_arguments.parse_args(provider)
    finally:
        sys.argv = saved
    refuse_numbers_out_of_range(actions, args, argv)
    refuse_idle_flags(args, preset, argv)
    args.tokenizer_type = MODEL_DEFAULTS["tokenizer_type"]
    if args.encoder_seq_length:
        # Megatron's older name.
        args.seq_length, args.encoder_seq_length = args.encoder_seq_length, None
    _complete_data_flags(args)
    # Rotary positions have no end, but Megatron wants one that --seq-length does not pass.
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    return args


def refuse_numbers_out_of_range(
    actions: Sequence[argparse.Action], args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """ValueError for a number that its flag, of the parser's `actions`, cannot have."""
    typed = flags_on(argv)
    ranges = {name: allowed for allowed in RANGES for name in allowed.arguments}
    for action in actions:
        value = getattr(args, action.dest, None)
        # Some of Megatron's defaults, such as -1, mean that there is no number.
        if action.type not in (int, float) or value is None or value == action.default:
            continue
        allowed = ranges.get(action.dest, OTHERWISE)
        for number in value if isinstance(value, list) else [value]:
            if not (math.isfinite(number) and allowed.holds(number)):
                flag = min(typed.intersection(action.option_strings), default=None)
                raise ValueError(f"{flag or action.option_strings[0]} {number:g}: {allowed.text}")


def refuse_unknown_groups(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """ValueError for a flag of Megatron's that no run of this package would notice."""
    typed = flags_on(argv)
    for group in parser._action_groups:
        for action in group._group_actions:
            used = typed.intersection(action.option_strings)
            reason = REFUSED_GROUPS.get(group.title or "") or REFUSED_FLAGS.get(action.dest)
            if used and reason:
                raise ValueError(f"{min(used)} would do nothing here: {reason}")


def refuse_idle_flags(args: argparse.Namespace, config: Any, argv: Sequence[str]) -> None:
    """ValueError for a typed flag, or a value of one, that this run would not notice."""
    for name, (values, reason) in ONLY_VALUES.items():
        if getattr(args, name) not in values:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ValueError(f"{flag} would do nothing here: {reason}")
    typed = flags_on(argv)
    for need in NEEDS:
        for flag in need.flags:
            if flag in typed and not need.met(args, config):
                raise ValueError(f"{flag} {need.consequence}: {need.remedy}")
    if len(args.data_path or ()) > 1:
        raise ValueError(
            f"--data-path {' '.join(args.data_path)}: one folder, or one mixture of folders, is "
            "read; write a mixture to train on several"
        )
    if args.optimizer_cpu_offload and not has_transformer_engine():
        raise ValueError(
            "--optimizer-cpu-offload needs Transformer Engine, whose Adam it resumes; "
            "install it, or split the optimizer's state over ranks with --use-distributed-optimizer"
        )
    if args.wandb_project:
        _check_wandb(args)


def _check_wandb(args: argparse.Namespace) -> None:
    """ValueError, before anything is loaded, for what Megatron misses on the last rank alone."""
    if not args.wandb_exp_name:
        raise ValueError(f"--wandb-project {args.wandb_project} needs --wandb-exp-name NAME")
    if not (args.wandb_save_dir or args.save):
        raise ValueError(
            f"--wandb-project {args.wandb_project} needs a folder: add --save or --wandb-save-dir"
        )
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--wandb-project {args.wandb_project} needs wandb: pip install wandb")


def _complete_data_flags(args: argparse.Namespace) -> None:
    """Fill in what was not typed; ValueError for flags that contradict each other."""
    sharded = args.dataset_provider in SHARDED
    args.valid_split = args.valid_split or ("val" if sharded else "heldout")
    if args.tokenizer_model and not Path(args.tokenizer_model).exists():
        raise ValueError(
            f"--tokenizer-model {args.tokenizer_model}: no such file or folder; name a "
            "tokenizer.model, or a folder with tokenizer.json"
        )
    args.total_seq_length = args.total_seq_length or args.seq_length
    if sharded and args.save:
        args.dataloader_save = args.save
    if args.packing_buffer_size is None:
        return
    if args.micro_batch_size != 1:
        raise ValueError(
            f"--micro-batch-size {args.micro_batch_size} with --packing-buffer-size: a micro-batch "
            "is one packed sequence; leave it at 1 and choose --total-seq-length"
        )
    args.pack_sequences = True


def uses_local_layers(argv: Sequence[str]) -> bool:
    """Whether the run's layers are Megatron's own; ValueError for others where there are none."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--transformer-impl")
    typed = parser.parse_known_args(argv)[0].transformer_impl
    if typed == "transformer_engine" and not has_transformer_engine():
        raise ValueError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed, does not "
            "import, or sees no GPU; drop the flag to use local layers"
        )
    return typed == "local" or not has_transformer_engine()


def preset_defaults(preset: MimoConfig, local_layers: bool) -> dict[str, Any]:
    """Argument defaults: the model's sizes, and what local layers and this machine lack."""
    defaults = dict(MODEL_DEFAULTS)
    for field, argument in LANGUAGE_ARGUMENTS.items():
        defaults[argument] = getattr(preset.language, field)
    defaults["freeze"] = list(preset.frozen)
    defaults["use_rope_scaling"] = preset.language.rope_scaling_factor is not None
    defaults["rope_scaling_factor"] = preset.language.rope_scaling_factor or 8.0
    defaults["untie_embeddings_and_output_weights"] = not preset.language.tie_embeddings
    defaults["gradient_accumulation_fusion"] = HAS_FUSED_GRADIENTS
    if local_layers:
        defaults |= WITHOUT_TRANSFORMER_ENGINE
    if not torch.cuda.is_available():
        defaults |= WITHOUT_CUDA
    return defaults


def expand_fresh(args: argparse.Namespace, config: MimoConfig) -> list[str]:
    """The parts that `--fresh` names, a modality's both; ValueError for what would do nothing."""
    known = part_names(config)
    parts: dict[str, None] = {}
    for name in args.fresh:
        modality = [f"{name}.encoder", f"{name}.projector"]
        named = modality if name in config.inputs else [name]
        if named[0] not in known:
            raise ValueError(
                f"--fresh {name}: {config.name} has the modalities {', '.join(config.inputs)} "
                f"and the parts {', '.join(known)}"
            )
        parts |= dict.fromkeys(named)
    if parts and not args.pretrained_checkpoint and not (args.load and args.finetune):
        raise ValueError(
            f"--fresh {args.fresh[0]} would do nothing here: it needs --pretrained-checkpoint, or "
            "--load with --finetune"
        )
    return list(parts)


def _check_batch_sizes(args: argparse.Namespace) -> None:
    parallel = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    replicas = language_processes(args) // (parallel * args.context_parallel_size)
    if args.global_batch_size and args.global_batch_size % (args.micro_batch_size * replicas):
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is not divisible by --micro-batch-size "
            f"{args.micro_batch_size} x {replicas} data-parallel replicas; choose a multiple of "
            f"{args.micro_batch_size * replicas}"
        )


def _validate(args: argparse.Namespace) -> None:
    """Megatron's own checks, on the processes that hold the language model."""
    world_size = args.world_size
    args.world_size = language_processes(args)
    with megatron_refusals():
        megatron_arguments.validate_args(args)
        core_transformer_config_from_args(args)
        pretrain_cfg_container_from_args(args)
    args.world_size = world_size
    if args.virtual_pipeline_model_parallel_size:
        _check_virtual_stages(args)


def _check_virtual_stages(args: argparse.Namespace) -> None:
    if args.encoder_ranks:
        raise ValueError(
            "--encoder-ranks runs without virtual stages: Megatron's schedule for non-colocated "
            'modules is not interleaved ("MimoModel does not support virtual pipeline parallelism")'
        )
    stages, count = args.pipeline_model_parallel_size, run_shape(args).num_micro_batches
    left = count % (args.microbatch_group_size_per_vp_stage or stages)
    if 0 < left < stages:
        raise ValueError(
            f"virtual stages take micro-batches in rounds of {stages}, and an iteration has "
            f"{count}; choose a --global-batch-size that is a multiple of "
            f"{args.global_batch_size // count * stages}"
        )


def resolve(preset: MimoConfig, args: argparse.Namespace) -> MimoConfig:
    """The preset with the command line's sizes: what the checkpoint remembers."""
    sizes = {field: getattr(args, argument) for field, argument in LANGUAGE_ARGUMENTS.items()}
    if args.kv_channels == args.hidden_size // args.num_attention_heads:
        sizes["head_dim"] = preset.language.head_dim
    sizes["rope_scaling_factor"] = args.rope_scaling_factor if args.use_rope_scaling else None
    sizes["tie_embeddings"] = not args.untie_embeddings_and_output_weights
    language: LanguageConfig = dataclasses.replace(preset.language, **sizes)
    return dataclasses.replace(preset, language=language)


def own_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The package's flags alone; Megatron's are left for later."""
    parser = Parser(add_help=False, allow_abbrev=False)
    return add_own_flags(parser).parse_known_args(argv)[0]


@contextlib.contextmanager
def megatron_refusals() -> Iterator[None]:
    """Turn whatever Megatron's checks of its flags raise, or end with, into a ValueError."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, AssertionError) and str(error):
            message = str(error)
            named = "" if "--" in message else "Megatron refuses these flags: "
            raise ValueError(f"{named}{message}") from None
        # Many assertions have no message, and other errors are none that names a flag.
        line = traceback.extract_tb(error.__traceback__)[-1].line
        kind = "" if isinstance(error, AssertionError) else f" ({type(error).__name__}: {error})"
        raise ValueError(f"Megatron refuses these flags: {line}{kind}") from None


def print_megatron_help() -> None:
    """List every flag of Megatron's."""
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False)
    megatron_arguments.add_megatron_arguments(parser)
    for action in parser._actions:
        try:
            parser._get_formatter()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            # Some of Megatron's texts hold a bare per cent sign.
            action.help = str(action.help).replace("%", "%%")
    parser.print_help()
