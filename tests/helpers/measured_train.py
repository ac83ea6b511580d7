"""Run by layouts.py on every rank: `train.py` as the comparison of layouts needs it.

It saves after the first iteration alone, and after the last one it compares all copies of every
weight. `--variant NAME` changes what is trained in a way for which there is no flag.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.utils import unwrap_model
from megatron.training import get_args, training

from examples.mimo.checkpoint.loading import sharding_metadata
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.model import parts
from examples.mimo.model.mimo import StageMimoModel
from examples.mimo.parallel import context
from examples.mimo.train import main
from examples.mimo.training import inputs
from examples.mimo.training import pretrain as providers
from tests.helpers.mock_variants import TextFirst

save = training.save_checkpoint_and_time


@functools.wraps(save)
def save_first(iteration: int, model: Any, optimizer: Any, *rest: Any, **named: Any) -> None:
    """Saving costs more than an iteration, and the comparison reads one checkpoint."""
    if iteration == 1:
        save(iteration, model, optimizer, *rest, **named)
    if iteration == get_args().train_iters:
        if training.should_disable_forward_pre_hook(get_args()):
            training.force_param_sync(model, optimizer=optimizer)
        check_copies(unwrap_model(model))


def check_copies(chunks: Sequence[StageMimoModel]) -> None:
    """AssertionError unless all ranks that hold a piece of a weight hold the same bytes.

    What a checkpoint calls by one name and place is one piece: on data-parallel replicas, of a
    norm on tensor-parallel ones, of tied embeddings on the first and the last stage.
    """
    mine: dict[tuple[str, tuple[int, ...]], str] = {}
    for chunk in chunks:
        for entry in chunk.sharded_state_dict(metadata=sharding_metadata()).values():
            if isinstance(entry, ShardedTensor):
                content = entry.data.detach().contiguous().view(torch.uint8).numpy().tobytes()
                mine[entry.key, entry.global_offset] = hashlib.sha256(content).hexdigest()
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    copies: dict[tuple[str, tuple[int, ...]], set[str]] = {}
    for pieces in of_ranks:
        for piece, digest in pieces.items():
            copies.setdefault(piece, set()).add(digest)
    differing = [piece for piece, digests in copies.items() if len(digests) > 1]
    assert not differing, f"copies of {differing} differ"


def text_first() -> None:
    """Train on `TextFirst` in place of mock data."""

    def datasets(args: Namespace, config: MimoConfig, num_train: int, num_valid: int) -> Any:
        return TextFirst(config, args.seq_length, num_train, args.seed), None

    inputs.DATASETS["mock"] = datasets


def freeze_embedding() -> None:
    """Freeze the tied embedding, on both stages that have it, and train the layers."""

    def freeze(model: StageMimoModel) -> None:
        weight = model.shared_embedding_or_output_weight()
        if weight is not None:
            weight.requires_grad_(False)

    _freeze_too(freeze)


def freeze_layers() -> None:
    """Freeze the language model's layers, and train the tied embedding."""

    def freeze(model: StageMimoModel) -> None:
        if model.language_model is not None:
            model.language_model.decoder.requires_grad_(False)

    _freeze_too(freeze)


def _freeze_too(freeze: Callable[[StageMimoModel], None]) -> None:
    """`freeze` follows what `--freeze` names."""
    freeze_parts = providers.freeze_parts

    def freeze_more(model: StageMimoModel, names: Sequence[str]) -> None:
        freeze_parts(model, names)
        freeze(model)

    providers.freeze_parts = freeze_more


def loss_in_pieces() -> None:
    """Compute head and loss for about 20 positions at a time."""
    parts.MAX_LOGITS = 20 * 512


def short_descriptions() -> None:
    """Send what describes a batch in two messages."""
    context.DESCRIPTION_BYTES = 100


VARIANTS = {
    "short-descriptions": short_descriptions,
    "loss-in-pieces": loss_in_pieces,
    "text-first": text_first,
    "embedding-frozen": freeze_embedding,
    "layers-frozen": freeze_layers,
}

if __name__ == "__main__":
    if "--variant" in sys.argv:
        flag = sys.argv.index("--variant")
        VARIANTS[sys.argv[flag + 1]]()
        del sys.argv[flag : flag + 2]
    training.save_checkpoint_and_time = save_first
    command.run("train.py", main)
