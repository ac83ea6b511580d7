"""The package's command-line flags, and which of Megatron's a run takes, with which numbers.

Apart from `cli/arguments.py`, so that `--help` imports neither torch nor Megatron.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from examples.mimo.cli.command import Parser, stdout_to
from examples.mimo.configs import MODEL_PROVIDERS

# Other names of energon: those of Megatron's own multimodal example.
SHARDED = ("energon", "llava_avlm", "llava_vlm", "video_llava_vlm")
DATASET_PROVIDERS = ("conversations", "spoken_questions", *SHARDED, "mock")

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
    "make_vocab_size_divisible_by": "use --vocab-size, the size of the text's vocabulary",
    "chat_template": "the chat template is in the model's config",
    "eod_mask_loss": "the end of an answer is always a target token",
    "reset_position_ids": "packed conversations attend to themselves alone",
    "reset_attention_mask": "packed conversations attend to themselves alone",
    "rampup_batch_size": "use --step-batch-size-schedule",
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

# Flags with the values that restate what always holds, as Megatron's own example passes them.
ONLY_VALUES = {
    "dataloader_type": (("external",), "the order of samples is --seed's"),
    "position_embedding_type": (("rope",), "the language model uses rotary positions"),
    "transformer_impl": (("local", "transformer_engine"), "it is of Megatron's own inference"),
    "tokenizer_type": (
        ("HuggingFaceTokenizer", "SentencePieceTokenizer", "NullTokenizer"),
        "the tokenizer comes with the data or from --tokenizer-model",
    ),
}


@dataclass(frozen=True)
class Range:
    """Values that the `arguments` may have; `text` says which."""

    text: str
    holds: Callable[[float], bool]
    arguments: tuple[str, ...] = ()


# Megatron computes with whatever number is typed: a beta of 2 trains without a word, and an
# interval of 0 ends in a division after the model is built. The first range that names an argument
# is its own; all others are `OTHERWISE`.
RANGES = (
    Range(
        "at least 1",
        lambda number: number >= 1,
        (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("context_parallel_size", "hierarchical_context_parallel_sizes"),
            *("expert_tensor_parallel_size", "tensor_parallel_num_weight_shards"),
            *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
            *("microbatch_group_size_per_vp_stage", "num_distributed_optimizer_instances"),
            *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"),
            *("ffn_hidden_size", "kv_channels", "vocab_size", "padded_vocab_size"),
            *("pad_to_multiple_of", "seq_length", "encoder_seq_length", "max_position_embeddings"),
            *("total_seq_length", "rotary_base", "rotary_seq_len_interpolation_factor"),
            *("recompute_num_layers", "micro_batch_size", "global_batch_size"),
            *("eval_micro_batch_size", "eval_global_batch_size", "packing_buffer_size"),
            *("encoder_data_parallel_size", "train_iters", "train_samples", "lr_decay_iters"),
            *("lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples"),
            *("mlp_chunks_for_training", "log_interval", "eval_interval", "save_interval"),
            *("non_persistent_save_interval", "save_retain_interval", "tensorboard_log_interval"),
            *("tensorboard_queue_size", "exit_interval", "exit_duration_in_mins"),
            *("distributed_timeout_minutes", "check_weight_hash_across_dp_replicas_interval"),
            *("train_sync_interval", "ddp_bucket_size", "ddp_num_buckets", "dist_ckpt_workers"),
            *("replication_factor", "hysteresis", "muon_num_ns_steps", "log_memory_interval"),
            *("save_params_interval", "save_wgrads_interval", "save_dgrads_interval"),
            *("save_activations_interval", "save_tokens_per_expert_interval"),
            *("gpu_sniff_test_interval",),
        ),
    ),
    Range(
        "more than 0",
        lambda number: number > 0,
        (
            *("adam_eps", "layernorm_epsilon", "rope_scaling_factor", "loss_scale"),
            *("initial_loss_scale", "min_loss_scale", "loss_scale_window"),
        ),
    ),
    Range(
        "from 0 to less than 1",
        lambda number: 0 <= number < 1,
        (
            *("adam_beta1", "adam_beta2", "lion_beta1", "lion_beta2", "sgd_momentum"),
            *("muon_momentum", "hidden_dropout", "attention_dropout", "lr_warmup_fraction"),
        ),
    ),
    Range(
        "from 0 to 1",
        lambda number: 0 <= number <= 1,
        ("rotary_percent", "optimizer_offload_fraction", "activation_offload_fraction"),
    ),
    # A run adds a little to it for its stages and its validation samples.
    Range("from 1 to 2147483647", lambda number: 1 <= number < 2**31, ("seed",)),
    Range(
        "a finite number",
        math.isfinite,
        ("null_tokenizer_pad_id", "glu_linear_offset", "mup_attn_scale_power"),
    ),
)
OTHERWISE = Range("at least 0, and finite", lambda number: 0 <= number < math.inf)


@dataclass(frozen=True)
class Need:
    """`flags` do something only in runs for which `met` holds; the others are told `remedy`.

    `met` gets the parsed arguments and the model's config.
    """

    flags: tuple[str, ...]
    met: Callable[[argparse.Namespace, Any], bool]
    remedy: str
    consequence: str = "would do nothing here"


# In the order in which a run is told, the most general need first.
NEEDS = (
    Need(
        ("--data-path", "--train-split", "--valid-split", "--augment", "--max-bad-samples"),
        lambda args, config: args.dataset_provider != "mock",
        "--dataset-provider mock draws random data; name conversations or energon",
    ),
    Need(
        ("--shuffle-buffer-size", "--packing-buffer-size"),
        lambda args, config: args.dataset_provider in SHARDED,
        "only --dataset-provider energon fills a buffer from shards",
    ),
    Need(
        ("--valid-split",),
        lambda args, config: args.eval_iters > 0,
        "nothing is evaluated; add --eval-iters N",
    ),
    Need(
        ("--total-seq-length",),
        lambda args, config: args.packing_buffer_size is not None,
        "it is the length of packed sequences; add --packing-buffer-size N",
    ),
    Need(
        ("--tokenizer-model",),
        lambda args, config: args.dataset_provider != "mock" or bool(args.save),
        "random data has no text; add --save DIR, which keeps the tokenizer, or name a "
        "--dataset-provider that reads files",
    ),
    Need(
        (
            "--encoder-ranks",
            "--encoder-tensor-model-parallel-size",
            "--encoder-data-parallel-size",
        ),
        lambda args, config: bool(config.inputs),
        "the model has no encoders; drop the flag",
    ),
    Need(
        ("--run-encoders-ahead",),
        lambda args, config: (
            not args.encoder_ranks and any(part.endswith(".encoder") for part in args.freeze)
        ),
        "it is for encoders that are frozen (--freeze MODALITY.encoder) and colocated",
    ),
    Need(
        ("--balance-stages",),
        lambda args, config: args.pipeline_model_parallel_size > 1,
        "there is one stage; add --pipeline-model-parallel-size 2 or more",
    ),
    Need(
        ("--fp8-format", "--fp4-format", "--tp-comm-overlap"),
        lambda args, config: args.transformer_impl == "transformer_engine",
        "this run's are local; install it, or drop --transformer-impl local",
        "needs Transformer Engine's layers",
    ),
)


def flags_on(argv: Sequence[str]) -> set[str]:
    """The flags that the user typed, without their values."""
    return {word.split("=")[0] for word in argv if word.startswith("--")}


def add_own_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The flags of `examples/mimo/train.py`."""
    group = parser.add_argument_group("mimo")
    group.add_argument(
        "--model-provider",
        default="tiny_avlm",
        metavar="NAME",
        help=f"what the model is: {', '.join(MODEL_PROVIDERS)}, or package.module:function of your "
        "own (default %(default)s); its sizes become the defaults of Megatron's flags",
    )
    group.add_argument(
        "--dataset-provider",
        choices=DATASET_PROVIDERS,
        default="mock",
        help="conversations reads the samples of --data-path, and spoken_questions is another name "
        "for it; energon reads the shards of --data-path, or of a mixture of them, and llava_avlm, "
        "llava_vlm and video_llava_vlm are other names for it; mock draws random data (default)",
    )
    group.add_argument(
        "--train-split",
        default="train",
        metavar="NAME",
        help="train on --data-path/NAME.jsonl, or on this split of its shards (default train)",
    )
    group.add_argument(
        "--valid-split",
        metavar="NAME",
        help="validate on --data-path/NAME.jsonl (default heldout), or on this split of its shards "
        "(default val)",
    )
    group.add_argument(
        "--augment",
        action="store_true",
        help="vary pictures and sound a little in training, as the model's config says",
    )
    group.add_argument(
        "--pack-sequences",
        action="store_true",
        help="pack the samples of a micro-batch into one sequence without padding; each attends to "
        "itself alone",
    )
    group.add_argument(
        "--packing-buffer-size",
        type=int,
        metavar="N",
        help="pack sequences of --total-seq-length from N samples of the shards at a time, none "
        "split; a micro-batch is then one sequence, and batch sizes count sequences",
    )
    group.add_argument(
        "--total-seq-length",
        type=int,
        metavar="TOKENS",
        help="the length of a packed sequence (default --seq-length)",
    )
    group.add_argument(
        "--pad-to-multiple-of",
        type=int,
        default=128,
        metavar="N",
        help="round lengths of batches up, so that shapes repeat (default: 128 with CUDA, else 1)",
    )
    group.add_argument(
        "--shuffle-buffer-size",
        type=int,
        default=100,
        metavar="N",
        help="draw the next sample of the shards from N (default %(default)s)",
    )
    group.add_argument(
        "--max-bad-samples",
        type=int,
        default=100,
        metavar="N",
        help="end the run when more than N samples could not be read "
        "(default %(default)s); bad_samples.jsonl in --save names them",
    )
    group.add_argument(
        "--freeze",
        nargs="*",
        metavar="PART",
        help="parts that do not train: MODALITY.encoder, MODALITY.projector, language; without a "
        "name all parts train (default: what the model's config says)",
    )
    group.add_argument(
        "--run-encoders-ahead",
        action="store_true",
        help="run frozen encoders a micro-batch ahead, on a CUDA stream of their own",
    )
    group.add_argument(
        "--fresh",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts that start with random weights while all others load strictly: a modality, or "
        "MODALITY.encoder, MODALITY.projector, language; with --pretrained-checkpoint, or --load "
        "and --finetune. This adds a modality to a trained model",
    )
    group.add_argument(
        "--balance-stages",
        action="store_true",
        help="give the pipeline's stages as many layers as makes an iteration shortest, with the "
        "encoders on the first and the head on the last",
    )
    group.add_argument(
        "--encoder-ranks",
        nargs="+",
        metavar="MODALITY=RANKS",
        help="non-colocated encoders: the ranks of each, with its projector, such as images=0 "
        "audios=1-2; the others are the language model's (default: colocated with it)",
    )
    group.add_argument(
        "--encoder-tensor-model-parallel-size",
        nargs="+",
        metavar="N",
        help="split encoders and projectors over N ranks. Colocated, those are N of each "
        "tensor-parallel group, which then holds several replicas of the encoders (default: as the "
        "language model). With --encoder-ranks: a number, or images=N audios=N (default 1)",
    )
    group.add_argument(
        "--encoder-data-parallel-size",
        type=int,
        metavar="N",
        help="data-parallel replicas of the encoders; follows from the other sizes, and "
        "is checked against them",
    )
    group.add_argument(
        "--dry-run",
        type=int,
        metavar="PROCESSES",
        help="print what this run would hold and compute on PROCESSES processes, and end; start "
        "it without torchrun",
    )
    group.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        dest="config_fields",
        help="change a field of a modality's config, such as images.encoder.num_layers=2; "
        "Megatron's flags change the language model",
    )
    group.add_argument(
        "--audio-encoder-model",
        metavar="NAME",
        help="give the audio encoder a released Whisper's sizes, such as openai/whisper-small; its "
        "weights come from convert.py",
    )
    group.add_argument(
        "--hf-assign-unused-tokens",
        nargs="+",
        default=[],
        metavar="PLACEHOLDER,ID",
        help="other token ids for placeholders, such as '<audio>,32002'",
    )
    group.add_argument(
        "--no-verify-integrity",
        dest="verify_integrity",
        action="store_false",
        help="load without comparing files with the SHA-256 of what was saved, and save without "
        "writing it",
    )
    # Megatron's --verify-integrity is on unless this says otherwise.
    parser.set_defaults(verify_integrity=True)
    group.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="append a JSON line per iteration: loss, gradient norm, speed, sample keys",
    )
    group.add_argument(
        "--show-megatron-output",
        action="store_true",
        help="print Megatron's arguments and log lines too",
    )
    return parser


def help_parser() -> argparse.ArgumentParser:
    """A parser of the package's flags alone, for `--help`."""
    parser = Parser(
        prog="train.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a model that sees and hears, through megatron.training.pretrain.\n\n"
        "  torchrun --nproc-per-node 2 examples/mimo/train.py --model-provider tiny_avlm_speech\n"
        "      --tensor-model-parallel-size 2 --dataset-provider spoken_questions\n"
        "      --data-path demo/data --save demo/checkpoint",
        epilog="Every Megatron flag works as well; --help-megatron lists them.",
    )
    add_own_flags(parser)
    parser.add_argument(
        "--help-megatron", action="store_true", help="list Megatron's flags (slow) and exit"
    )
    return parser


def is_dry_run(argv: Sequence[str]) -> bool:
    """Whether a run is planned only: that needs no GPU, and has none to be alike everywhere."""
    return "--dry-run" in flags_on(argv)


def print_without_training(argv: Sequence[str]) -> bool:
    """Answer `--help-megatron` or `--dry-run`; False when `argv` asks for a training run."""
    if "--help-megatron" in argv:
        from examples.mimo.cli.arguments import print_megatron_help

        print_megatron_help()
        return True
    if is_dry_run(argv):
        from examples.mimo.planner.dry_run import plan

        with stdout_to(os.devnull):
            report = plan(argv)
        print(report)
        return True
    return False
