"""Parallel layouts, and the comparison of what each computes with one process.

Each layout trains ten iterations from the same checkpoint on the same mock batches, which mix
samples with pictures, recordings, both and neither. A parameter's first gradient is read from
the first moment of Adam that is saved after one iteration: (1 - beta1) times the gradient,
which the checkpoint holds whole whatever the layout. After the last iteration all copies of every
weight must be equal to the bit (measured_train.py).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tests.helpers import ranks
from tests.helpers.commands import PP2, TP2

ITERATIONS = 10
FIRST_LOSS_BOUND, GRADIENT_BOUND, TEN_LOSSES_BOUND = 1e-6, 1e-5, 1e-5
BF16_BOUND = 2e-2

COMMON = (
    *("--model-provider", "tiny_avlm", "--dataset-provider", "mock", "--seed", "11"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--lr", "1e-3", "--clip-grad", "0"),
)
PACKED = ("--pack-sequences",)
ENCODERS_TP1 = ("--encoder-tensor-model-parallel-size", "1")
CP2 = ("--context-parallel-size", "2")
SP = ("--sequence-parallel",)
PP4 = ("--pipeline-model-parallel-size", "4")
NO_LAYER_FIRST = ("--pipeline-model-parallel-layout", "E|ttttL")
BALANCED = ("--balance-stages",)
VPP2 = ("--num-layers-per-virtual-pipeline-stage", "1")
UNEVEN = ("--decoder-first-pipeline-num-layers", "1")
FULL_RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer",)
# A tiny model fits one of Megatron's usual buckets, and several have an order to be reduced in.
SMALL_BUCKETS = ("--ddp-bucket-size", "20000")
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather", *SMALL_BUCKETS)
BF16 = ("--bf16",)
NONCOLOCATED = ("--encoder-ranks", "images=0", "audios=1")
NONCOLOCATED_TP2 = (
    *("--encoder-ranks", "images=0-1", "audios=2"),
    *("--encoder-tensor-model-parallel-size", "images=2"),
)
NONCOLOCATED_DP2 = ("--encoder-ranks", "images=0-1", "audios=2-3")
IMAGES_DP4 = ("--encoder-ranks", "images=0-3", "audios=4")
# A micro-batch is one sample.
ONE_EACH = ("--micro-batch-size", "1")
IMAGES_FROZEN = ("--freeze", "images.encoder", "images.projector")
PROJECTORS_ONLY = ("--freeze", "images.encoder", "audios.encoder", "language")
ENCODERS_FROZEN = ("--freeze", "images.encoder", "audios.encoder")
# Replicas that see the first half of a batch have nothing to encode.
TEXT_FIRST = ("--variant", "text-first")
EMBEDDING_FROZEN = ("--variant", "embedding-frozen")
LAYERS_FROZEN = ("--variant", "layers-frozen")
LOSS_IN_PIECES = ("--variant", "loss-in-pieces")
SHORT_DESCRIPTIONS = ("--variant", "short-descriptions")
AHEAD = ("--run-encoders-ahead",)
ROUNDED = ("--pad-to-multiple-of", "48")
TIED = ("--model-provider", "tests.helpers.models:tied_embeddings")


@dataclass(frozen=True)
class Layout:
    """A name, a number of processes, and the flags that spread the model over them.

    `shared` are flags that change what is computed: one process with them is the reference.
    `model` are those that change the model, which then starts from a checkpoint of its own.
    """

    name: str
    processes: int
    flags: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    model: tuple[str, ...] = ()

    @property
    def bf16(self) -> bool:
        """Whether it computes in 16 bits, whose rounding depends on the layout."""
        return "--bf16" in self.shared


ONE = Layout("one process", 1)
TIED_SHARED = {
    "": (),
    ", language frozen": PROJECTORS_ONLY,
    ", encoders frozen": ENCODERS_FROZEN,
    ", embedding frozen": EMBEDDING_FROZEN,
    ", layers frozen": LAYERS_FROZEN,
}
TIED_LAYOUTS = (
    ("PP 2", 2, PP2),
    ("PP 4", 4, PP4),
    ("PP 2 x DP 2, distributed optimizer, overlap", 4, PP2 + DISTRIBUTED_OPTIMIZER + OVERLAP),
    ("PP 4, distributed optimizer", 4, PP4 + DISTRIBUTED_OPTIMIZER),
)
LAYOUTS = (
    Layout("TP 2", 2, TP2),
    Layout("TP 2, sequence parallel", 2, TP2 + SP),
    Layout("PP 2", 2, PP2),
    Layout("PP 4", 4, PP4),
    Layout("PP 2, 2 virtual stages", 2, PP2 + VPP2),
    Layout("DP 2", 2),
    Layout("DP 2, distributed optimizer", 2, DISTRIBUTED_OPTIMIZER),
    Layout("DP 2, distributed optimizer, overlap", 2, DISTRIBUTED_OPTIMIZER + OVERLAP),
    Layout("CP 2", 2, CP2),
    Layout("TP 2 x PP 2", 4, TP2 + PP2),
    Layout("TP 2 x PP 2, sequence parallel", 4, TP2 + PP2 + SP),
    Layout("TP 2 x PP 2, 2 virtual stages", 4, TP2 + PP2 + VPP2),
    Layout("TP 2 x DP 2, distributed optimizer", 4, TP2 + DISTRIBUTED_OPTIMIZER),
    Layout("PP 2 x DP 2, overlap", 4, PP2 + DISTRIBUTED_OPTIMIZER + OVERLAP),
    Layout("TP 2 x PP 2 x DP 2", 8, TP2 + PP2),
    Layout(
        "TP 2 x PP 2 x DP 2, sequence parallel, 2 virtual stages, distributed optimizer",
        8,
        TP2 + PP2 + SP + VPP2 + DISTRIBUTED_OPTIMIZER,
    ),
    Layout("CP 2 x PP 2", 4, CP2 + PP2),
    Layout("CP 2 x PP 2, 2 virtual stages", 4, CP2 + PP2 + VPP2),
    Layout("TP 2 x CP 2, sequence parallel", 4, TP2 + CP2 + SP),
    Layout("CP 2 x DP 2, distributed optimizer, overlap", 4, CP2 + DISTRIBUTED_OPTIMIZER + OVERLAP),
    Layout("TP 2 x CP 2 x PP 2, sequence parallel", 8, TP2 + CP2 + PP2 + SP),
    Layout("TP 2, encoders TP 1", 2, TP2 + ENCODERS_TP1),
    Layout("TP 2 x PP 2, encoders TP 1", 4, TP2 + PP2 + ENCODERS_TP1),
    Layout("TP 2 x CP 2, encoders TP 1, sequence parallel", 4, TP2 + CP2 + SP + ENCODERS_TP1),
    Layout(
        "TP 2 x DP 2, encoders TP 1, distributed optimizer, overlap",
        4,
        TP2 + ENCODERS_TP1 + DISTRIBUTED_OPTIMIZER + OVERLAP,
    ),
    Layout("packed, TP 2, encoders TP 1", 2, PACKED + TP2 + ENCODERS_TP1),
    Layout("non-colocated: encoders 1 + 1, language 1", 3, NONCOLOCATED),
    Layout("non-colocated: encoders 1 + 1, language PP 2", 4, NONCOLOCATED + PP2),
    Layout("non-colocated: images TP 2, audios 1, language TP 2", 5, NONCOLOCATED_TP2 + TP2),
    Layout("non-colocated: encoders 1 + 1, language DP 2", 4, NONCOLOCATED),
    Layout("non-colocated: encoders DP 2, language 1", 5, NONCOLOCATED_DP2),
    Layout(
        "non-colocated: encoders DP 2, language DP 2, distributed optimizer, overlap",
        6,
        NONCOLOCATED_DP2 + DISTRIBUTED_OPTIMIZER + OVERLAP,
    ),
    Layout(
        "non-colocated: images TP 2, audios 1, language TP 2 x PP 2, sequence parallel",
        7,
        NONCOLOCATED_TP2 + TP2 + PP2 + SP,
    ),
    Layout("non-colocated: encoders DP 2, language TP 2 x PP 2", 8, NONCOLOCATED_DP2 + TP2 + PP2),
    Layout("non-colocated: encoders 1 + 1, language CP 2", 4, NONCOLOCATED + CP2),
    Layout(
        "non-colocated: encoders DP 2, language PP 2, packed", 6, NONCOLOCATED_DP2 + PP2 + PACKED
    ),
    Layout("non-colocated: encoders 1 + 1, language DP 2, packed", 4, NONCOLOCATED + PACKED),
    Layout(
        "non-colocated: language PP 2 first, encoders last",
        4,
        (*("--encoder-ranks", "images=3", "audios=2"), *PP2),
    ),
    Layout("non-colocated, full recompute: language PP 2", 4, NONCOLOCATED + PP2 + FULL_RECOMPUTE),
    Layout("non-colocated, uneven: language PP 2", 4, NONCOLOCATED + PP2 + UNEVEN),
    Layout("non-colocated, projectors only: language PP 2", 4, NONCOLOCATED + PP2, PROJECTORS_ONLY),
    Layout("non-colocated, images frozen: language TP 2", 4, NONCOLOCATED + TP2, IMAGES_FROZEN),
    Layout("non-colocated, bf16: language PP 2", 4, NONCOLOCATED + PP2, BF16),
    Layout("PP 2, uneven: 1 and 3 layers", 2, PP2 + UNEVEN),
    Layout("PP 2, no layer beside the encoders", 2, PP2 + NO_LAYER_FIRST),
    Layout("PP 4, balanced stages", 4, PP4 + BALANCED),
    Layout("full recompute", 1, FULL_RECOMPUTE),
    Layout("selective recompute", 1, ("--recompute-granularity", "selective")),
    Layout("TP 2 x PP 2, full recompute", 4, TP2 + PP2 + FULL_RECOMPUTE),
    Layout("packed", 1, PACKED),
    Layout("packed, PP 2", 2, PACKED + PP2),
    Layout("packed, CP 2", 2, PACKED + CP2),
    Layout("packed, CP 2 x PP 2", 4, PACKED + CP2 + PP2),
    Layout("packed, PP 4", 4, PACKED + PP4),
    Layout("packed, CP 2 x PP 4", 8, PACKED + CP2 + PP4),
    Layout("packed, PP 2, 2 virtual stages", 2, PACKED + PP2 + VPP2),
    Layout("packed, CP 2 x PP 2, 2 virtual stages", 4, PACKED + CP2 + PP2 + VPP2),
    Layout(
        "packed, TP 2 x PP 2, sequence parallel, 2 virtual stages",
        4,
        PACKED + TP2 + PP2 + SP + VPP2,
    ),
    Layout("packed, PP 4, non-colocated: encoders 1 + 1", 6, PACKED + PP4 + NONCOLOCATED),
    Layout("packed, TP 2, sequence parallel", 2, PACKED + TP2 + SP),
    Layout("packed, TP 2 x CP 2, sequence parallel", 4, PACKED + TP2 + CP2 + SP),
    Layout("projectors only, TP 2", 2, TP2, PROJECTORS_ONLY),
    Layout("projectors only, PP 2", 2, PP2, PROJECTORS_ONLY),
    Layout("projectors only, PP 4", 4, PP4, PROJECTORS_ONLY),
    Layout("projectors only, TP 2 x PP 2", 4, TP2 + PP2, PROJECTORS_ONLY),
    Layout("projectors only, CP 2 x PP 2", 4, CP2 + PP2, PROJECTORS_ONLY),
    Layout(
        "projectors only, TP 2 x DP 2, distributed optimizer, overlap",
        4,
        TP2 + DISTRIBUTED_OPTIMIZER + OVERLAP,
        PROJECTORS_ONLY,
    ),
    Layout("encoders ahead, projectors only", 1, AHEAD, PROJECTORS_ONLY),
    Layout("encoders ahead, images frozen: DP 2", 2, AHEAD, IMAGES_FROZEN),
    Layout(
        "encoders ahead, projectors only: TP 2 x PP 2, encoders TP 1",
        4,
        AHEAD + TP2 + PP2 + ENCODERS_TP1,
        PROJECTORS_ONLY,
    ),
    Layout(
        "encoders ahead, projectors only, packed: CP 2 x PP 2, 2 virtual stages",
        4,
        AHEAD + PACKED + CP2 + PP2 + VPP2,
        PROJECTORS_ONLY,
    ),
    Layout(
        "encoders ahead, text first: TP 2",
        2,
        AHEAD + TP2,
        TEXT_FIRST + ENCODERS_FROZEN,
    ),
    Layout("lengths rounded", 1, ROUNDED),
    Layout("lengths rounded: TP 2, sequence parallel", 2, ROUNDED + TP2 + SP),
    Layout("lengths rounded, packed: CP 2", 2, ROUNDED + PACKED + CP2),
    Layout("description in two messages: TP 2", 2, SHORT_DESCRIPTIONS + TP2),
    Layout("loss in pieces", 1, LOSS_IN_PIECES),
    Layout("loss in pieces: TP 2 x PP 2, sequence parallel", 4, LOSS_IN_PIECES + TP2 + PP2 + SP),
    Layout("loss in pieces, tied embeddings: CP 2 x PP 2", 4, LOSS_IN_PIECES + CP2 + PP2, (), TIED),
    Layout("text first: DP 2, overlap", 2, DISTRIBUTED_OPTIMIZER + OVERLAP, TEXT_FIRST),
    Layout("text first: DP 4", 4, ONE_EACH, TEXT_FIRST),
    Layout("text first: CP 2", 2, CP2, TEXT_FIRST),
    Layout("text first: TP 2, encoders TP 1", 2, TP2 + ENCODERS_TP1, TEXT_FIRST),
    Layout(
        "text first: TP 2 x DP 2, encoders TP 1, distributed optimizer, overlap",
        4,
        TP2 + ENCODERS_TP1 + DISTRIBUTED_OPTIMIZER + OVERLAP,
        TEXT_FIRST,
    ),
    Layout("text first, packed: DP 2", 2, PACKED, TEXT_FIRST),
    Layout("text first, non-colocated: encoders DP 2, language 1", 5, NONCOLOCATED_DP2, TEXT_FIRST),
    Layout(
        "text first, non-colocated: encoders DP 2, language DP 2, overlap",
        6,
        NONCOLOCATED_DP2 + DISTRIBUTED_OPTIMIZER + OVERLAP,
        TEXT_FIRST,
    ),
    Layout("text first, non-colocated: encoders 1 + 1, language DP 4", 6, NONCOLOCATED, TEXT_FIRST),
    Layout(
        "text first, non-colocated: images DP 4, audios 1, language 1", 6, IMAGES_DP4, TEXT_FIRST
    ),
    Layout(
        "text first, non-colocated: images DP 4, audios 1, language DP 4",
        9,
        IMAGES_DP4 + ONE_EACH,
        TEXT_FIRST,
    ),
    Layout(
        "text first, non-colocated, packed: encoders DP 2, language DP 2",
        6,
        NONCOLOCATED_DP2 + PACKED,
        TEXT_FIRST,
    ),
    *(
        Layout(f"tied embeddings{what}: {name}", processes, flags, shared, TIED)
        for what, shared in TIED_SHARED.items()
        for name, processes, flags in TIED_LAYOUTS
    ),
    Layout(
        "tied embeddings, language frozen: PP 2, bf16",
        2,
        PP2,
        (*PROJECTORS_ONLY, *BF16),
        TIED,
    ),
    Layout("tied embeddings: TP 2 x PP 2, sequence parallel", 4, TP2 + PP2 + SP, (), TIED),
    Layout("tied embeddings: PP 2, 2 virtual stages", 2, PP2 + VPP2, (), TIED),
    Layout("tied embeddings: CP 2 x PP 2", 4, CP2 + PP2, (), TIED),
    Layout("tied embeddings, non-colocated: language PP 4", 6, NONCOLOCATED + PP4, (), TIED),
    Layout("bf16, TP 2, sequence parallel", 2, TP2 + SP, BF16),
    Layout("bf16, PP 2", 2, PP2, BF16),
    Layout("bf16, CP 2", 2, CP2, BF16),
    Layout("bf16, DP 2, distributed optimizer, overlap", 2, DISTRIBUTED_OPTIMIZER + OVERLAP, BF16),
    Layout("bf16, TP 2 x PP 2", 4, TP2 + PP2, BF16),
)


VIRTUAL = PP2 + VPP2
# What cannot run, and is refused before anything is built.
REFUSED = (
    Layout("non-colocated, 2 virtual stages", 4, NONCOLOCATED + VIRTUAL),
    Layout(
        "non-colocated: 3 replicas of an encoder, 2 of the language model",
        6,
        ("--encoder-ranks", "images=0-2", "audios=3"),
    ),
    Layout(
        "non-colocated: one rank for both encoders", 2, ("--encoder-ranks", "images=0", "audios=0")
    ),
    Layout("colocated, encoders TP 2, language TP 1", 2, (ENCODERS_TP1[0], "2")),
    Layout(
        "2 virtual stages, 3 micro-batches",
        2,
        (*VIRTUAL, "--micro-batch-size", "2", "--global-batch-size", "6"),
    ),
    Layout("TP 2, communication overlap", 2, (*TP2, *SP, "--tp-comm-overlap")),
    Layout("Megatron FSDP", 2, ("--use-megatron-fsdp",)),
    Layout("torch FSDP 2", 2, ("--use-torch-fsdp2",)),
)


@dataclass(frozen=True)
class Run:
    """What one layout computed: losses per iteration, and each parameter's first gradient."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of a layout from one process."""

    first_loss: float
    gradient: float
    worst_parameter: str
    ten_losses: float

    def within_bounds(self, bf16: bool) -> bool:
        """Whether the layout computes the same, as far as its numbers reach."""
        if bf16:
            return max(self.first_loss, self.gradient, self.ten_losses) <= BF16_BOUND
        return (
            self.first_loss <= FIRST_LOSS_BOUND
            and self.gradient <= GRADIENT_BOUND
            and self.ten_losses <= TEN_LOSSES_BOUND
        )


def train(layout: Layout, *flags: str, script: str = "examples/mimo/train.py") -> None:
    """One training run; CalledProcessError when it fails, after what it printed."""
    all_flags = (*COMMON, *layout.model, *layout.flags, *layout.shared, *flags)
    done = ranks.run(script, *all_flags, processes=layout.processes)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()


def start_checkpoint(folder: Path, model: tuple[str, ...] = ()) -> Path:
    """Two iterations on one process: weights that are not at a special point."""
    alone = replace(ONE, model=model)
    train(alone, "--train-iters", "2", "--save", str(folder), "--save-interval", "2")
    return folder


def measure(layout: Layout, start: Path, work: Path) -> Run:
    """Ten iterations of a layout from `start`; files go under `work`."""
    saved, metrics = work / "saved", work / "metrics.jsonl"
    load = ("--load", str(start), "--finetune", "--train-iters", str(ITERATIONS))
    save = ("--save", str(saved), "--save-interval", "1", "--metrics-file", str(metrics))
    train(layout, *load, *save, script="tests/helpers/measured_train.py")
    iterations = [json.loads(line) for line in metrics.read_text().splitlines()]
    return Run(
        [iteration["loss"] for iteration in iterations], first_gradients(saved / "iter_0000001")
    )


def first_gradients(weights: Path) -> dict[str, torch.Tensor]:
    """Parameter name -> whole gradient of the first iteration, up to Adam's constant."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    metadata = FileSystemReader(weights).read_metadata().state_dict_metadata
    prefix = "optimizer.state.exp_avg."
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(prefix)
    }
    _load_state_dict(state, FileSystemReader(weights), no_dist=True)
    whole = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return {name: tensor for key in whole for name, tensor in _by_layer(key, whole[key])}


def _by_layer(key: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Megatron saves a weight of all layers as one tensor, the layer its first dimension."""
    if ".layers." not in key:
        return [(key, tensor)]
    return [(key.replace(".layers.", f".layers.{i}."), part) for i, part in enumerate(tensor)]


def compare(run: Run, reference: Run) -> Difference:
    """Relative differences; a gradient's is the norm of the difference over its own norm."""
    assert run.gradients.keys() == reference.gradients.keys(), (
        "the layouts train different parameters"
    )
    losses = [abs(a - b) / abs(b) for a, b in zip(run.losses, reference.losses, strict=True)]
    gradients = {
        name: float((run.gradients[name] - expected).norm() / expected.norm().clamp(min=1e-30))
        for name, expected in reference.gradients.items()
    }
    worst = max(gradients, key=lambda name: gradients[name])
    return Difference(losses[0], gradients[worst], worst, max(losses))


class References:
    """What one process computes, for each model and set of flags that a layout shares with it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.starts: dict[tuple[str, ...], Path] = {}
        self.runs: dict[Layout, Run] = {}

    def difference(self, layout: Layout, work: Path) -> Difference:
        """How far a layout is from its reference; files go under `work`."""
        reference = self.run(layout.shared, layout.model)
        return compare(measure(layout, self.start(layout.model), work), reference)

    def run(self, shared: tuple[str, ...] = (), model: tuple[str, ...] = ()) -> Run:
        """One process with these flags, run once."""
        alone = replace(ONE, shared=shared, model=model)
        if alone not in self.runs:
            folder = self.work / f"run-{len(self.runs)}"
            self.runs[alone] = measure(alone, self.start(model), folder)
        return self.runs[alone]

    def start(self, model: tuple[str, ...] = ()) -> Path:
        """The checkpoint that all runs of a model begin with."""
        if model not in self.starts:
            folder = self.work / f"start-{len(self.starts)}"
            self.starts[model] = start_checkpoint(folder, model)
        return self.starts[model]


def refusal(layout: Layout) -> str:
    """The line that `train.py` ends with; AssertionError if it accepts the layout."""
    plan = ("--dry-run", str(layout.processes), *layout.flags)
    done = ranks.run("examples/mimo/train.py", *plan)
    assert done.returncode == 2, f"{layout.name} is not refused: {done.stdout}"
    return done.stderr.strip().removeprefix("train.py: error: ")
