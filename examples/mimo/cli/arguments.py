"""From a command line to validated Megatron arguments and a resolved model config.

A preset's sizes are defaults of Megatron's own flags, so a size is written once, in the
config, and the command line still overrides it.

What the flags about data say of one another.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from megatron.training import arguments as megatron_arguments

from examples.mimo.cli.command import Parser, refuse
from examples.mimo.cli.flags import SHARDED, add_own_flags
from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import LanguageConfig, MimoConfig, with_fields, with_token_ids
from examples.mimo.modalities.audio import whisper_fields
from examples.mimo.modalities.base import MLPProjectorConfig
from examples.mimo.model.layers import has_transformer_engine
from examples.mimo.model.mimo import check_freeze, part_names
from examples.mimo.planner.stages import balance_stages, num_micro_batches
from examples.mimo.training.layout import (
    check_world,
    colocated_encoder_tp,
    encoder_tensor_parallel,
    language_processes,
    padding_multiple,
    placements,
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
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
}

# Megatron's flags for models and data this package does not build: by argument group ...
REFUSED_GROUPS = {
    "vision": "pictures are described by the model's config",
    "biencoder": "there is no biencoder here",
    "rl": "there is no reinforcement learning here",
    "sft": "conversations come from --dataset-provider",
    "mla": "the language model uses grouped queries",
    "moe": "the language model is dense",
    "heterogeneous architecture": "all layers of the language model are alike",
    "experimental_attention_variant": "the language model uses softmax attention",
    "Logits Distillation": "there is no teacher here",
    "inference": "avlm_inference.py has flags of its own",
}

# ... and by name.
REFUSED_FLAGS = {
    "encoder_num_layers": "an encoder's size is in the model's config",
    "decoder_num_layers": "use --num-layers",
    "decoder_seq_length": "use --seq-length",
    "split": "use --train-split and --valid-split",
    "train_data_path": "use --data-path and --train-split",
    "valid_data_path": "use --data-path and --valid-split",
    "test_data_path": "use evaluate.py",
    "data_args_path": "use --data-path",
    "data_cache_path": "nothing is cached",
    "mock_data": "use --dataset-provider mock",
    "vocab_file": "use --tokenizer-model",
    "merge_file": "use --tokenizer-model",
    "make_vocab_size_divisible_by": "use --vocab-size, the size of the embedding table",
    "chat_template": "the chat template is in the model's config",
    "eod_mask_loss": "an answer's end is always learned",
    "reset_position_ids": "a row holds one conversation",
    "reset_attention_mask": "a row holds one conversation",
    "mtp_num_layers": "the language model predicts one token at a time",
    "hybrid_layer_pattern": "all layers of the language model are alike",
    "multi_latent_attention": "the language model uses grouped queries",
    "use_checkpoint_args": "pass --model-provider; sizes are checked when weights load",
    "yaml_cfg": "use flags",
    "full_validation": "use --eval-iters",
    "multiple_validation_sets": "use --valid-split",
    "expert_model_parallel_size": "the language model is dense",
    "freeze_all_layers": "use --freeze",
}

# Flags with the values that say what is the case anyway, as Megatron's own example passes them.
ONLY_VALUES = {
    "dataloader_type": (("external",), "the order of samples is --seed's"),
    "position_embedding_type": (("rope",), "the language model uses rotary positions"),
    "tokenizer_type": (
        ("HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"),
        "the tokenizer comes with the data or from --tokenizer-model",
    ),
}


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, MimoConfig]:
    """Validated arguments and the config with the command line laid over it.

    ValueError, one line, for a flag that would do nothing and for a layout that cannot run.
    """
    own = own_flags(argv)
    preset = get_model_config(own.model_provider)
    preset = with_token_ids(preset, own.hf_assign_unused_tokens)
    sizes = whisper_fields(preset, own.audio_encoder_model)
    preset = with_fields(preset, [*sizes, *own.config_fields])
    args = parse_with_preset(preset, argv)
    check_freeze(args.freeze, preset)
    args.fresh = expand_fresh(args, preset)
    check_layout(args, preset)
    check_encoder_layout(args, preset)
    if args.balance_stages:
        balance_stages(args, resolve(preset, args))
    _validate(args)
    return args, resolve(preset, args)


def parse_with_preset(preset: MimoConfig, argv: Sequence[str]) -> argparse.Namespace:
    """Megatron's and the package's flags, with the preset's values as defaults."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        setattr(parser, "error", functools.partial(refuse, parser))
        add_own_flags(parser)
        defaults = preset_defaults(preset)
        unknown = set(defaults) - {action.dest for action in parser._actions}
        assert not unknown, f"Megatron has no arguments {unknown}"
        if any(word.split("=")[0] == "--packing-buffer-size" for word in argv):
            defaults["micro_batch_size"] = 1
        parser.set_defaults(**defaults)
        refuse_idle_flags(parser, argv)
        return parser

    saved = sys.argv
    sys.argv = [saved[0], *argv]
    try:
        args = megatron_arguments.parse_args(provider)
    finally:
        sys.argv = saved
    for name, (values, why) in ONLY_VALUES.items():
        if getattr(args, name) not in values:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise ValueError(f"{flag} would do nothing here: {why}")
    args.tokenizer_type = MODEL_DEFAULTS["tokenizer_type"]
    if args.encoder_seq_length:
        # Megatron's older name.
        args.seq_length, args.encoder_seq_length = args.encoder_seq_length, None
    complete_data_flags(args)
    # Rotary positions have no end, but Megatron wants one that --seq-length does not pass.
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    return args


def preset_defaults(preset: MimoConfig) -> dict[str, Any]:
    """Argument defaults: the model's sizes, and what this machine lacks."""
    defaults = dict(MODEL_DEFAULTS)
    for field, argument in LANGUAGE_ARGUMENTS.items():
        defaults[argument] = getattr(preset.language, field)
    defaults["freeze"] = list(preset.frozen)
    defaults["use_rope_scaling"] = preset.language.rope_scaling_factor is not None
    defaults["rope_scaling_factor"] = preset.language.rope_scaling_factor or 8.0
    defaults["untie_embeddings_and_output_weights"] = not preset.language.tie_embeddings
    if not has_transformer_engine():
        defaults |= WITHOUT_TRANSFORMER_ENGINE
    if not torch.cuda.is_available():
        defaults |= WITHOUT_CUDA
    return defaults


def refuse_idle_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """ValueError for a flag on the command line that the chosen model would not notice."""
    given = {word.split("=")[0] for word in argv if word.startswith("--")}
    for group in parser._action_groups:
        for action in group._group_actions:
            used = given.intersection(action.option_strings)
            why = REFUSED_GROUPS.get(group.title or "") or REFUSED_FLAGS.get(action.dest)
            if used and why:
                raise ValueError(f"{used.pop()} would do nothing here: {why}")


def expand_fresh(args: argparse.Namespace, config: MimoConfig) -> list[str]:
    """The parts that `--fresh` names, a modality's both; ValueError for what would do nothing."""
    known = part_names(config)
    parts: dict[str, None] = {}
    for name in args.fresh:
        modality = [f"{name}.encoder", f"{name}.projector"]
        named = modality if name in config.modalities else [name]
        if named[0] not in known:
            raise ValueError(
                f"--fresh {name}: {config.name} has the modalities {', '.join(config.modalities)} "
                f"and the parts {', '.join(known)}"
            )
        parts |= dict.fromkeys(named)
    if parts and not args.pretrained_checkpoint and not (args.load and args.finetune):
        raise ValueError(
            f"--fresh {args.fresh[0]} would do nothing here: it needs --pretrained-checkpoint, or "
            "--load with --finetune"
        )
    return list(parts)


def check_layout(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError unless every part divides into the layout and the world holds it."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if not args.encoder_ranks:
        check_world(args.world_size, args)
    widths = {
        "--num-attention-heads": args.num_attention_heads,
        "--num-query-groups": args.num_query_groups,
        "--ffn-hidden-size": args.ffn_hidden_size,
        "--vocab-size": args.vocab_size,
    }
    _check_widths(widths, "--tensor-model-parallel-size", tp)
    uneven = args.decoder_first_pipeline_num_layers or args.decoder_last_pipeline_num_layers
    if args.num_layers % pp and not uneven and not args.pipeline_model_parallel_layout:
        raise ValueError(
            f"--num-layers {args.num_layers} does not divide by --pipeline-model-parallel-size "
            f"{pp}; choose a divisor, or --decoder-first-pipeline-num-layers"
        )
    if args.tp_comm_overlap and not has_transformer_engine():
        raise ValueError("--tp-comm-overlap needs Transformer Engine, which is not installed")
    if args.sequence_parallel and args.seq_length % tp:
        raise ValueError(f"--seq-length {args.seq_length} does not divide by {tp} with SP")
    if args.packing_buffer_size and args.total_seq_length % padding_multiple(args):
        raise ValueError(
            f"--total-seq-length {args.total_seq_length} is not divisible by "
            f"{padding_multiple(args)}, which this layout needs of a packed sequence"
        )


def check_encoder_layout(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError unless the encoders divide into theirs; sizes that are not given are filled in.

    On shared ranks an encoder is split as the language model is, on ranks of its own not at all.
    """
    given = encoder_tensor_parallel(args.encoder_tensor_model_parallel_size, config.modalities)
    default = 1 if args.encoder_ranks else args.tensor_model_parallel_size
    sizes = {name: given.get(name, default) for name in config.modalities}
    args.encoder_tensor_model_parallel_size = sizes
    if args.encoder_ranks:
        _check_noncolocated(args)
    else:
        _check_colocated(args, colocated_encoder_tp(args))
    for name, modality in config.modalities.items():
        encoder = modality.encoder
        widths = {
            f"{name}.encoder.num_attention_heads": encoder.num_attention_heads,
            f"{name}.encoder.ffn_hidden_size": encoder.ffn_hidden_size,
        }
        if isinstance(modality.projector, MLPProjectorConfig):
            widths[f"{name}.projector.ffn_hidden_size"] = modality.projector.ffn_hidden_size
        _check_widths(widths, "--encoder-tensor-model-parallel-size", sizes[name])


def _check_colocated(args: argparse.Namespace, encoder_tp: int) -> None:
    tp = args.tensor_model_parallel_size
    if encoder_tp < 1 or tp % encoder_tp:
        raise ValueError(
            f"--encoder-tensor-model-parallel-size {encoder_tp} does not divide "
            f"--tensor-model-parallel-size {tp}; choose a divisor of it"
        )
    copies = args.world_size // (args.pipeline_model_parallel_size * encoder_tp)
    if args.encoder_data_parallel_size not in (None, copies):
        raise ValueError(
            f"--encoder-data-parallel-size {args.encoder_data_parallel_size}, but "
            f"{args.world_size} processes hold {copies} copies of the encoders at "
            f"--encoder-tensor-model-parallel-size {encoder_tp}; leave the flag away"
        )


def _check_noncolocated(args: argparse.Namespace) -> None:
    for flag in ("use_tp_pp_dp_mapping", "use_sharp"):
        if getattr(args, flag):
            raise ValueError(f"--{flag.replace('_', '-')} would do nothing with --encoder-ranks")
    if args.num_distributed_optimizer_instances > 1:
        raise ValueError(
            '--encoder-ranks runs with one distributed-optimizer instance (Megatron: "MIMO '
            'optimizer does not yet support num_distributed_optimizer_instances > 1")'
        )
    for placement in placements(args)[:-1]:
        if args.encoder_data_parallel_size not in (None, placement.dp):
            raise ValueError(
                f"--encoder-data-parallel-size {args.encoder_data_parallel_size}, but "
                f"the ranks of --encoder-ranks make {placement.dp} of {placement.name}; "
                "leave the flag away"
            )


def _validate(args: argparse.Namespace) -> None:
    """Megatron's own checks, on the processes that hold the language model."""
    world_size = args.world_size
    args.world_size = language_processes(args)
    try:
        megatron_arguments.validate_args(args)
    except AssertionError as error:
        raise ValueError(str(error) or _assertion_source(error)) from None
    args.world_size = world_size
    if args.virtual_pipeline_model_parallel_size:
        _check_virtual_stages(args)


def _check_virtual_stages(args: argparse.Namespace) -> None:
    if args.encoder_ranks:
        raise ValueError(
            "--encoder-ranks runs without virtual stages: Megatron's schedule for modules on ranks "
            'of their own is not interleaved ("MimoModel does not support virtual pipeline '
            'parallelism")'
        )
    if args.dataset_provider in SHARDED:
        raise ValueError(
            f"--dataset-provider {args.dataset_provider} runs without virtual stages: Megatron "
            "saves the place in the data of one iterator a rank, not of one a virtual stage"
        )
    stages, count = args.pipeline_model_parallel_size, num_micro_batches(args)
    left = count % (args.microbatch_group_size_per_vp_stage or stages)
    if 0 < left < stages:
        raise ValueError(
            f"virtual stages take micro-batches in rounds of {stages}, and an iteration has "
            f"{count}; choose a --global-batch-size that is a multiple of "
            f"{args.global_batch_size // count * stages}"
        )


def _check_widths(widths: dict[str, int], flag: str, size: int) -> None:
    for name, width in widths.items():
        if width % size:
            raise ValueError(
                f"{name} {width} does not divide by {flag} {size}; choose a size that divides it"
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


def _assertion_source(error: AssertionError) -> str:
    """Megatron asserts without words in places; the line says more than nothing."""
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron refuses these flags: {frame.line}"


def complete_data_flags(args: argparse.Namespace) -> None:
    """Fill in what was not given; ValueError for flags that contradict or would do nothing."""
    sharded = args.dataset_provider in SHARDED
    args.valid_split = args.valid_split or ("val" if sharded else "heldout")
    if args.total_seq_length and not args.packing_buffer_size:
        raise ValueError("--total-seq-length would do nothing without --packing-buffer-size")
    args.total_seq_length = args.total_seq_length or args.seq_length
    if sharded and args.save:
        args.dataloader_save = args.save
    if args.packing_buffer_size is None:
        return
    if not sharded:
        raise ValueError("--packing-buffer-size packs what --dataset-provider energon reads")
    if args.packing_buffer_size < 1:
        raise ValueError(f"--packing-buffer-size {args.packing_buffer_size}: at least 1")
    if args.micro_batch_size != 1:
        raise ValueError(
            f"--micro-batch-size {args.micro_batch_size} with --packing-buffer-size: a micro-batch "
            "is one packed row; leave it at 1 and choose --total-seq-length"
        )
    args.pack_sequences = True
