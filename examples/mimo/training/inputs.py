"""Inputs of a training run: starting checkpoint, fresh parts, data sets, tokenizer, shards."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core import mpu
from torch.utils.data import Dataset

from examples.mimo.checkpoint.description import (
    TOKENIZER,
    TRACKER,
    check_description,
    check_same_model,
    latest_weights,
)
from examples.mimo.checkpoint.integrity import begin_check
from examples.mimo.checkpoint.loading import check_same_optimizer, has_random_states
from examples.mimo.configs import holds_codecs, with_codec_folder
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, ConversationDataset, collate, collate_packed
from examples.mimo.data.conversation import Sample, SampleEncoder, TokenSequence
from examples.mimo.data.tokenizer import holds_tokenizer, load_tokenizer
from examples.mimo.parallel.placement import LANGUAGE
from examples.mimo.training.layout import cp_multiple, module_of_rank, padding_multiple, run_shape

# The package that reads shards needs energon; the example names it nowhere else.
SHARDS = "examples.mimo.shards.resume"

Collate = Callable[[Sequence[Sample]], Batch]
# Training and validation samples.
Datasets = tuple[Dataset, Dataset | None]


class MockDataset(Dataset[Sample]):
    """Random conversations of any size without files.

    A sample holds zero, one or two items of each modality as far as they fit, at random positions
    in random text: inputs in its first half, outputs in the second, which carries loss.
    """

    def __init__(self, config: MimoConfig, seq_length: int, num_samples: int, seed: int) -> None:
        self.config = config
        self.seq_length = seq_length
        self.num_samples = num_samples
        self.seed = seed
        special = {m.token_id for m in config.inputs.values()}
        self.words = [i for i in range(1, config.language.vocab_size) if i not in special]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        numbers = np.random.default_rng([self.seed, index, 2])
        noise = torch.Generator().manual_seed(int(numbers.integers(2**62)))
        length = int(numbers.integers(self.seq_length // 2, self.seq_length + 1))
        media: dict[str, list[dict[str, torch.Tensor]]] = {}
        spans: list[list[int]] = []
        room = length // 2  # for inputs
        for name, modality in self.config.inputs.items():
            for _ in range(numbers.integers(3)):
                item = modality.encoder.mock_inputs(noise)
                tokens = modality.tokens_of(item)
                if len(tokens) <= room:
                    room -= len(tokens)
                    media.setdefault(name, []).append(item)
                    spans.append(tokens)
        outputs: dict[str, list[list[int]]] = {}
        room = length // 4
        for name, output in self.config.outputs.items():
            for _ in range(numbers.integers(3)):
                count = output.codec.unit * int(numbers.integers(1, 9))
                allowed = map(output.allowed, range(count))
                full = itertools.takewhile(len, allowed)  # an output may have a longest length
                tokens = output.tokens([r[int(numbers.integers(len(r)))] for r in full])
                if len(tokens) <= room:
                    room -= len(tokens)
                    outputs.setdefault(name, []).append(tokens)
        said = [tokens for items in outputs.values() for tokens in items]
        text = numbers.choice(self.words, length - sum(map(len, spans + said))).tolist()
        question = len(text) // 2
        ids = _spread(spans, text[:question], numbers)
        answer = _spread(said, text[question:], numbers)
        is_target = [0] * len(ids) + [1] * len(answer)
        ids += answer
        sequence = TokenSequence(ids, [*ids[1:], 0], [*is_target[1:], 0])
        sources, said_by = (
            {name: ["mock"] * len(items) for name, items in sides.items()}
            for sides in (media, outputs)
        )
        return Sample(f"mock-{index}", sequence, media, sources, said_by)


def _spread(spans: Sequence[list[int]], text: list[int], numbers: np.random.Generator) -> list[int]:
    """Spans at random places of a text, in their order."""
    cuts = sorted(numbers.integers(0, len(text) + 1, len(spans)).tolist())
    ids: list[int] = []
    for start, stop, span in zip([0, *cuts], [*cuts, len(text)], [*spans, []], strict=True):
        ids += text[start:stop] + span
    return ids


def mock_datasets(
    args: argparse.Namespace, config: MimoConfig, num_train: int, num_valid: int
) -> Datasets:
    """Random samples of any model, without files."""
    return (
        MockDataset(config, args.seq_length, num_train, args.seed),
        MockDataset(config, args.seq_length, num_valid, args.seed + 1),
    )


def conversation_datasets(
    args: argparse.Namespace, config: MimoConfig, num_train: int, num_valid: int
) -> Datasets:
    """A JSON-lines file a split in `--data-path`; without evaluation no validation split."""
    encoder = sample_encoder(args, config)
    root, bad = Path(args.data_path[0]), args.max_bad_samples
    varied = dataclasses.replace(encoder, augment=args.augment)
    split, seed = args.train_split, args.seed
    train = ConversationDataset(root, split, varied, num_train, seed, True, bad)
    if not args.eval_iters:
        return train, None
    split = args.valid_split
    return train, ConversationDataset(root, split, encoder, num_valid, seed, False, bad)


DATASETS: dict[str, Any] = {
    "mock": mock_datasets,
    "conversations": conversation_datasets,
    "spoken_questions": conversation_datasets,
    "energon": SHARDS,
    # Upstream's names for its own data in shards.
    "llava_avlm": SHARDS,
    "llava_vlm": SHARDS,
    "video_llava_vlm": SHARDS,
}


def is_sharded(args: argparse.Namespace) -> bool:
    """Whether samples come out of shards, which megatron-energon reads."""
    return DATASETS[args.dataset_provider] == SHARDS


def collate_function(args: argparse.Namespace) -> Collate:
    """What makes a training batch of samples: padded sequences, or one that packs them all."""
    if not args.pack_sequences:
        return functools.partial(collate, multiple=padding_multiple(args))
    # Sequences that are filled from a buffer all have one length.
    multiple = args.total_seq_length if args.packing_buffer_size else padding_multiple(args)
    return functools.partial(collate_packed, multiple=multiple, sample_multiple=cp_multiple(args))


def check_data(args: argparse.Namespace, config: MimoConfig) -> None:
    """ValueError for data that is not there, before anything is built."""
    if not is_sharded(args):
        DATASETS[args.dataset_provider](args, config, 1, 1)
        return
    read_mixture = from_shards(args, "read_mixture")
    sample_encoder(args, config)
    for split in (args.train_split, args.valid_split)[: 2 if args.eval_iters else 1]:
        read_mixture(Path(args.data_path[0]), split)


def first_batches(args: argparse.Namespace, config: MimoConfig, num_samples: int) -> list[Batch]:
    """The first samples of the training data in micro-batches, without a process group."""
    size = args.micro_batch_size
    if is_sharded(args):
        read_first, encoder = from_shards(args, "first_shard_batches"), sample_encoder(args, config)
        options = shard_options(args, range(1))
        return read_first(options, encoder, collate_function(args), max(1, num_samples // size))
    dataset, _ = DATASETS[args.dataset_provider](args, config, num_samples, 0)
    starts = range(0, max(size, num_samples - size + 1), size)
    return [collate_function(args)([dataset[start + i] for i in range(size)]) for start in starts]


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


def with_codecs(args: argparse.Namespace, config: MimoConfig) -> MimoConfig:
    """`config` with the codecs of the weights, else those of the data folder.

    As with the tokenizer, trained weights know only the codes that they were trained with.
    """
    start = starting_point(args)
    if start and LANGUAGE not in fresh_parts(args) and holds_codecs(config, start):
        return with_codec_folder(config, start)
    if not args.data_path:
        return config
    data = Path(args.data_path[0])
    return with_codec_folder(config, data if data.is_dir() else data.parent)


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
