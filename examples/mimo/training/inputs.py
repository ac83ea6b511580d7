"""Inputs of a training run: starting checkpoint, fresh parts, tokenizer, shards, encoders ahead."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from examples.mimo.checkpoint.description import (
    TOKENIZER,
    TRACKER,
    check_description,
    check_same_model,
    latest_weights,
)
from examples.mimo.checkpoint.integrity import begin_check
from examples.mimo.checkpoint.loading import check_same_optimizer, has_random_states
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.data.tokenizer import holds_tokenizer, load_tokenizer
from examples.mimo.model.mimo import Inputs, StageMimoModel
from examples.mimo.model.parts import ENCODER
from examples.mimo.parallel.context import share_inputs
from examples.mimo.parallel.placement import LANGUAGE
from examples.mimo.training.layout import cp_multiple, module_of_rank, run_shape

# The package that reads shards needs energon; the example names it nowhere else.
SHARDS = "examples.mimo.shards.resume"


def check_inputs(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError for a folder that is not there, before anything is built."""
    if starting_point(args) is None:
        if start := args.pretrained_checkpoint:
            raise ValueError(f"--pretrained-checkpoint {start}: no checkpoint in this folder")
        if args.load and args.load != args.save:
            raise ValueError(f"--load {args.load}: no checkpoint in this folder")
    for flag in ("load", "pretrained_checkpoint", "save"):
        folder = getattr(args, flag)
        if folder:
            # A run that resumes, or saves into what is there, has all parts of the checkpoint.
            may_lack = flag == "pretrained_checkpoint" or (flag == "load" and args.finetune)
            fresh = args.fresh if may_lack else ()
            check_same_model(f"--{flag.replace('_', '-')}", Path(folder), config, fresh)
    args.verify_integrity &= args.ckpt_format == "torch_dist"  # as Megatron's --verify-integrity
    if (start := starting_point(args)) and args.verify_integrity:
        check_description(start, _flag_of(start, args))
    if resumes(args) and not args.no_load_optim:
        check_same_optimizer(Path(args.load), args.use_distributed_optimizer)
    if args.run_encoders_ahead and run_shape(args).num_micro_batches < 2:
        raise ValueError(
            "--run-encoders-ahead would do nothing here: an iteration has one micro-batch; choose "
            f"a --global-batch-size above {args.global_batch_size}"
        )
    if resumes(args) and args.encoder_ranks:
        sizes = args.encoder_tensor_model_parallel_size
        if not has_random_states(Path(args.load), sizes):
            args.no_load_rng = True


class Observer(Protocol):
    """What a run is told of a step; the commands' observer shows it to a person."""

    def enter(self, phase: str) -> None:
        """From here on this rank does this; `{iteration}` stands for the iteration."""

    def add_batch(self, batch: Batch, wait_seconds: float) -> None:
        """A micro-batch of training, and how long this rank waited for it."""

    def add_loss(self, loss: torch.Tensor, keys: Sequence[str]) -> None:
        """A micro-batch's summed loss, on the device, and its samples."""


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


def begin_integrity_check(args: argparse.Namespace) -> None:
    """Start to check the files of the weights that this run loads, while the model is built."""
    start = starting_point(args)
    if start and args.verify_integrity:
        begin_check(latest_weights(start), f"{_flag_of(start, args)} {start}")


def _flag_of(start: Path, args: argparse.Namespace) -> str:
    return "--load" if str(start) == args.load else "--pretrained-checkpoint"


def check_schedule(args: argparse.Namespace) -> None:
    """ValueError for a schedule of learning rate or weight decay that contradicts itself.

    Megatron's scheduler asserts the same without a word, after the model is built.
    """
    unit = "samples" if args.train_samples else "iters"
    name = f"lr_decay_{unit}" if getattr(args, f"lr_decay_{unit}") else f"train_{unit}"
    decay, length = f"--{name.replace('_', '-')}", getattr(args, name)
    warmup = getattr(args, f"lr_warmup_{unit}")
    if warmup >= length:
        raise ValueError(
            f"--lr-warmup-{unit} {warmup} leaves nothing of {decay} {length} to decay in; at most "
            f"{length - 1}"
        )
    annealing = getattr(args, f"lr_wsd_decay_{unit}")
    if args.lr_decay_style == "WSD" and not 1 <= (annealing or 0) <= length:
        raise ValueError(
            f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}, the length of the last part, from "
            f"1 to {decay} {length}" + f", not {annealing}" * (annealing is not None)
        )
    for flag, lower in (("min-lr", args.min_lr), ("lr-warmup-init", args.lr_warmup_init)):
        if lower > args.lr:
            raise ValueError(f"--{flag} {lower:g} is more than --lr {args.lr:g}")
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        raise ValueError(
            "--use-checkpoint-opt_param-scheduler and --override-opt_param-scheduler do not go "
            "together: the schedule is the checkpoint's or this run's"
        )
    start, end = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style == "constant":
        if (start, end) != (None, None):
            raise ValueError(
                "--start-weight-decay and --end-weight-decay would do nothing here: add "
                "--weight-decay-incr-style linear or cosine"
            )
    elif start is None or end is None or start > end:
        raise ValueError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay "
            "and an --end-weight-decay that is no smaller"
        )


def check_shapes(args: argparse.Namespace) -> None:
    """ValueError for what needs batches of one shape: a batch is as long as its longest sample."""
    packed_length = args.packing_buffer_size and (args.total_seq_length or args.seq_length)
    # Its buffers have the shape of a micro-batch of --seq-length; validation is never packed.
    if args.tp_comm_overlap and (packed_length != args.seq_length or args.eval_iters):
        raise ValueError(
            "--tp-comm-overlap does not work here: it needs sequences of one length, and a batch "
            "is as long as its longest sample; pack them with --packing-buffer-size, to "
            "--seq-length, and without --eval-iters"
        )
    # Nor do packed sequences repeat: a graph would replay the bounds of the first one's samples.
    graphs = {
        "cuda_graph_impl": args.cuda_graph_impl != "none",
        "enable_cuda_graph": args.enable_cuda_graph,
        "external_cuda_graph": args.external_cuda_graph,
    }
    if flag := next((name for name, is_on in graphs.items() if is_on), None):
        raise ValueError(
            f"--{flag.replace('_', '-')} does not work here: a graph needs shapes that repeat, and "
            "micro-batches differ in length, or in the bounds of their packed samples; drop the "
            "flag"
        )


def from_shards(args: argparse.Namespace, function: str) -> Any:
    """A function or class of the package that reads shards."""
    try:
        return getattr(importlib.import_module(SHARDS), function)
    except ImportError as error:
        raise ValueError(
            f"--dataset-provider {args.dataset_provider} needs megatron-energon ({error}): "
            "pip install -e '.[data]'"
        ) from None


def shard_options(args: argparse.Namespace, replicas: range) -> Any:
    """The flags about shards as a `ShardOptions`, for a rank that reads for `replicas`."""
    # Megatron sets the iteration when it loads; a dry run has none.
    iteration = getattr(args, "iteration", 0) if resumes(args) else 0
    samples = args.eval_iters * (args.eval_global_batch_size or 0) // args.data_parallel_size
    # Only the language model's first context-parallel rank saves; a dry run has no ranks.
    running = torch.distributed.is_initialized()
    saves = running and mpu.get_context_parallel_rank() == 0
    return from_shards(args, "ShardOptions")(
        data_path=Path(args.data_path[0]),
        train_split=args.train_split,
        valid_split=args.valid_split,
        data_parallel_size=args.data_parallel_size,
        replicas=replicas,
        micro_batch_size=args.micro_batch_size,
        num_workers=args.num_workers,
        shuffle_buffer_size=args.shuffle_buffer_size,
        max_bad_samples=args.max_bad_samples,
        seed=args.seed,
        augment=args.augment,
        packing_buffer_size=args.packing_buffer_size or 0,
        packed_seq_length=args.total_seq_length or 0,
        sample_multiple=cp_multiple(args),
        eval_micro_batch_size=args.eval_micro_batch_size,
        eval_batches=samples // args.eval_micro_batch_size if args.eval_iters else 0,
        checkpoint=Path(args.load) / f"iter_{iteration:07d}" if iteration else None,
        saves_state=saves and module_of_rank(args) in (None, LANGUAGE),
    )


def sample_encoder(args: argparse.Namespace, config: MimoConfig) -> SampleEncoder:
    """What encodes samples of `--data-path`; ValueError without the folder or a tokenizer."""
    if not args.data_path:
        raise ValueError(f"--dataset-provider {args.dataset_provider} needs --data-path FOLDER")
    root = Path(args.data_path[0])
    if not root.exists():
        raise ValueError(f"--data-path {root}: no such folder; prepare_data.py makes one")
    path = tokenizer_path(args)
    if path is None:
        raise ValueError(
            f"--data-path {root}: no tokenizer.model in it; name one with --tokenizer-model"
        )
    return SampleEncoder(config, load_tokenizer(path), args.seq_length)


def tokenizer_path(args: argparse.Namespace) -> Path | None:
    """`--tokenizer-model`, else that of the weights, else the data folder's, else none.

    Trained weights know only the tokens that they were trained with, and a data folder may hold
    the tokenizer of another model.
    """
    if args.tokenizer_model:
        return Path(args.tokenizer_model)
    start = starting_point(args)
    of_weights = start / TOKENIZER if start and (start / TOKENIZER).is_dir() else None
    if of_weights and LANGUAGE not in fresh_parts(args):
        return of_weights
    if args.data_path and holds_tokenizer(Path(args.data_path[0])):
        return Path(args.data_path[0])
    return of_weights


def starting_point(args: argparse.Namespace) -> Path | None:
    """The folder of the weights a run begins with, if it does not begin with random ones."""
    for folder in (args.load, args.pretrained_checkpoint):
        if folder and (Path(folder) / TRACKER).is_file():
            return Path(folder)
    return None


def fresh_parts(args: argparse.Namespace) -> tuple[str, ...]:
    """The parts that keep their random weights when this run loads; none when it resumes."""
    return () if resumes(args) else tuple(args.fresh)


def resumes(args: argparse.Namespace) -> bool:
    """Whether this run goes on from --load with its optimizer, iteration and place in the data."""
    return bool(args.load) and (Path(args.load) / TRACKER).is_file() and not args.finetune
