"""What every rank sends in a training iteration, by formula; communication.py counts the same.

The formula knows the sizes of the model, the shapes of the micro-batches and the layout, and
nothing of a run. Bytes are those that a rank sends where n ranks form a ring, as NCCL's do for
large tensors: an all-reduce sends 2 (n - 1) / n of the tensor; an all-gather, a reduce-scatter and
a broadcast (n - 1) / n of the whole, a broadcast on average over the ranks; a message its size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import InputModality, MimoConfig
from examples.mimo.data.batch import collate
from examples.mimo.modalities.values import is_count
from examples.mimo.parallel.context import DESCRIPTION_BYTES
from examples.mimo.training.inputs import MockDataset

SEED, MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE, LAYERS, HEADS = 11, 2, 16, 8, 8
# The first iteration and the last do more than one in the middle of a run.
ITERATIONS, COUNTED = 3, 2
NUMBER, INTEGER = 4, 8  # bytes: fp32, and 64 bits

# What is sent, by the ranks it is sent between.
TENSOR, PIPELINE, CONTEXT, DATA = "tensor", "pipeline", "context", "data"
BRIDGE, BATCH, REST = "bridge", "batch", "rest"
KINDS = {
    TENSOR: "activations and their gradients, between tensor-parallel ranks",
    PIPELINE: "activations and their gradients, between stages",
    CONTEXT: "keys, values, features and their gradients, between context-parallel ranks",
    DATA: "weights' gradients and, with the distributed optimizer, weights, between replicas",
    BRIDGE: "features and their gradients, between non-colocated modules",
    BATCH: "micro-batches, from the tensor-parallel rank that reads them to the others",
    REST: "norms' gradients under sequence parallelism, and numbers that ranks agree on",
}


@dataclass(frozen=True)
class Layout:
    """How many ranks of each kind; `encoders` are ranks of non-colocated ones, at TP 1."""

    name: str
    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    virtual: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    encoders: dict[str, int] = field(default_factory=dict)

    @property
    def encoder_ranks(self) -> int:
        """How many ranks hold non-colocated encoders; they come first."""
        return sum(self.encoders.values())

    @property
    def processes(self) -> int:
        """All ranks."""
        return self.encoder_ranks + self.tp * self.cp * self.dp * self.pp

    @property
    def num_micro_batches(self) -> int:
        """Of one replica, in an iteration."""
        return GLOBAL_BATCH_SIZE // MICRO_BATCH_SIZE // self.dp

    @property
    def padding_multiple(self) -> int:
        """What sequences are padded to: context parallelism cuts two chunks a rank."""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    def flags(self) -> list[str]:
        """For train.py."""
        flags = ["--tensor-model-parallel-size", self.tp, "--context-parallel-size", self.cp]
        flags += ["--pipeline-model-parallel-size", self.pp]
        if self.virtual > 1:
            layers = LAYERS // self.pp // self.virtual
            flags += ["--num-layers-per-virtual-pipeline-stage", layers]
        flags += ["--sequence-parallel"] * self.sequence_parallel
        flags += ["--use-distributed-optimizer"] * self.distributed_optimizer
        flags += ["--encoder-ranks"] * bool(self.encoders)
        first = 0
        for name, count in self.encoders.items():
            flags.append(f"{name}={first}-{first + count - 1}")
            first += count
        return [str(flag) for flag in flags]


ONE_EACH, TWO_EACH = {"images": 1, "audios": 1}, {"images": 2, "audios": 2}
LAYOUTS = (
    Layout("one process"),
    Layout("TP 2", tp=2),
    Layout("TP 4", tp=4),
    Layout("TP 8", tp=8),
    Layout("TP 2, sequence parallel", tp=2, sequence_parallel=True),
    Layout("TP 4, sequence parallel", tp=4, sequence_parallel=True),
    Layout("PP 2", pp=2),
    Layout("PP 4", pp=4),
    Layout("PP 8", pp=8),
    Layout("PP 2, 2 virtual stages", pp=2, virtual=2),
    Layout("PP 4, 2 virtual stages", pp=4, virtual=2),
    Layout("CP 2", cp=2),
    Layout("CP 4", cp=4),
    Layout("DP 2", dp=2),
    Layout("DP 4", dp=4),
    Layout("DP 8", dp=8),
    Layout("DP 2, distributed optimizer", dp=2, distributed_optimizer=True),
    Layout("DP 8, distributed optimizer", dp=8, distributed_optimizer=True),
    Layout("TP 2 x PP 2", tp=2, pp=2),
    Layout("TP 2 x CP 2, sequence parallel", tp=2, cp=2, sequence_parallel=True),
    Layout("TP 2 x PP 2 x DP 2", tp=2, pp=2, dp=2),
    Layout("non-colocated: encoders 1 + 1, language 1", encoders=ONE_EACH),
    Layout("non-colocated: encoders 1 + 1, language TP 2", tp=2, encoders=ONE_EACH),
    Layout("non-colocated: encoders DP 2, language TP 2 x PP 2", tp=2, pp=2, encoders=TWO_EACH),
)
# Eight ranks divide these sizes.
COMMON = (
    *("--model-provider", "tiny_avlm", "--dataset-provider", "mock", "--seed", str(SEED)),
    *("--num-layers", str(LAYERS), "--num-attention-heads", str(HEADS)),
    *("--num-query-groups", str(HEADS), "--micro-batch-size", str(MICRO_BATCH_SIZE)),
    *("--set", f"images.encoder.num_attention_heads={HEADS}"),
    f"audios.encoder.num_attention_heads={HEADS}",
    *("--global-batch-size", str(GLOBAL_BATCH_SIZE), "--train-iters", str(ITERATIONS)),
)


@functools.cache
def model() -> MimoConfig:
    """The model that `COMMON` trains; no formula depends on the encoders' heads."""
    config = get_model_config("tiny_avlm")
    sizes = {"num_layers": LAYERS, "num_attention_heads": HEADS, "num_query_groups": HEADS}
    return dataclasses.replace(config, language=dataclasses.replace(config.language, **sizes))


@dataclass(frozen=True)
class Rank:
    """A rank of the language model, by its numbers in Megatron's order of groups."""

    layout: Layout
    tp: int
    cp: int
    dp: int
    stage: int

    @classmethod
    def of(cls, layout: Layout, number: int) -> Rank:
        """The rank with this number among those of the language model."""
        rest, tp = divmod(number, layout.tp)
        rest, cp = divmod(rest, layout.cp)
        stage, dp = divmod(rest, layout.dp)
        return cls(layout, tp, cp, dp, stage)

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding, and the encoders where these are colocated."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.stage == self.layout.pp - 1

    @property
    def modalities(self) -> dict[str, InputModality]:
        """Those whose encoders it holds."""
        return model().inputs if self.is_first and not self.layout.encoders else {}


@dataclass(frozen=True)
class MicroBatch:
    """B sequences of S positions, the last axis split over context-parallel ranks.

    `targets[r]` are the positions with loss of context-parallel rank r; `tokens[modality]` those
    of each encoder input, `carried[modality]` the bytes of all of these inputs.
    """

    batch_size: int
    seq_length: int
    targets: list[int]
    tokens: dict[str, list[int]]
    carried: dict[str, int]


@functools.cache
def micro_batch(first: int, multiple: int, cp: int) -> MicroBatch:
    """The one that begins with sample `first`, padded to a `multiple`, split over `cp` ranks."""
    config = model()
    data = MockDataset(config, config.language.seq_length, first + MICRO_BATCH_SIZE, SEED)
    samples = [data[first + i] for i in range(MICRO_BATCH_SIZE)]
    batch = collate(samples, multiple)
    parts = batch.tensors["loss_mask"].chunk(2 * cp, dim=1)
    targets = [int(parts[r].sum() + parts[2 * cp - 1 - r].sum()) for r in range(cp)]
    tokens, carried = {}, {}
    for name, modality in config.inputs.items():
        items = [inputs for sample in samples for inputs in sample.media.get(name, [])]
        tokens[name] = [modality.encoder.num_tokens(inputs) for inputs in items]
        sent = [tensor for item in items for key, tensor in item.items() if not is_count(key)]
        carried[name] = sum(tensor.numel() * tensor.element_size() for tensor in sent)
    return MicroBatch(batch.batch_size, batch.seq_length, targets, tokens, carried)


def micro_batches(layout: Layout, replica: int) -> list[MicroBatch]:
    """Those of one replica of the language model in the counted iteration."""
    numbers = range((COUNTED - 1) * layout.num_micro_batches, COUNTED * layout.num_micro_batches)
    firsts = [(number * layout.dp + replica) * MICRO_BATCH_SIZE for number in numbers]
    return [micro_batch(first, layout.padding_multiple, layout.cp) for first in firsts]


class Traffic:
    """Operations of a rank in an iteration, and the bytes it sends, by kind."""

    def __init__(self) -> None:
        self.operations: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, float] = defaultdict(float)

    def add(self, kind: str, operations: int, size: float) -> None:
        """So many operations that send `size` bytes each."""
        self.operations[kind] += operations
        self.bytes[kind] += operations * size

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return sum(self.bytes.values())


def ring(ranks: int) -> float:
    """The part of a whole that each rank sends when it is gathered, scattered or broadcast."""
    return (ranks - 1) / ranks


def computed(layout: Layout) -> list[Traffic]:
    """What each rank sends, in their order."""
    encoders = [
        encoder_traffic(layout, name, replica)
        for name, replicas in layout.encoders.items()
        for replica in range(replicas)
    ]
    own = range(layout.processes - layout.encoder_ranks)
    return encoders + [language_traffic(Rank.of(layout, number)) for number in own]


def language_traffic(rank: Rank) -> Traffic:
    """What a rank of the language model sends, with colocated encoders if it has any."""
    layout, sent = rank.layout, Traffic()
    for batch in micro_batches(layout, rank.dp):
        if layout.tp > 1:
            add_tensor_parallel(sent, batch, rank)
            add_batch(sent, batch, rank)
        if layout.cp > 1:
            add_context_parallel(sent, batch, rank)
        add_pipeline(sent, batch, rank)
        if rank.is_first and layout.encoders:
            add_bridges(sent, batch, rank)
    add_weights(sent, rank_parameters(rank), layout.dp * layout.cp, layout)
    if layout.sequence_parallel:
        # Each rank sees a part of the sequence, so the norms' gradients are parts of a sum.
        norms = 2 * LAYERS // layout.pp + rank.is_last
        sent.add(REST, 1, 2 * ring(layout.tp) * norms * model().language.hidden_size * NUMBER)
    return sent


def hidden_bytes(batch: MicroBatch, layout: Layout) -> float:
    """The hidden states of one context-parallel rank: B * S / CP * H numbers."""
    slots = batch.batch_size * batch.seq_length / layout.cp
    return slots * model().language.hidden_size * NUMBER


def add_tensor_parallel(sent: Traffic, batch: MicroBatch, rank: Rank) -> None:
    """Layers, embedding, head and loss; encoders and projectors where they are colocated."""
    layout, width = rank.layout, model().language.hidden_size
    hidden, part = hidden_bytes(batch, layout), ring(layout.tp)
    layers, targets = LAYERS // layout.pp, batch.targets[rank.cp]
    if layout.sequence_parallel:
        # Around attention and around the MLP: forward a gather and a scatter, backward the same,
        # and a gather of the input once more for the gradients of the first matrix.
        sent.add(TENSOR, 2 * 5 * layers, part * hidden)
    else:
        # Of attention and of the MLP: a sum behind the second matrix, and backward one of what
        # the first matrix passes on. The last MLP works on the positions with loss.
        sent.add(TENSOR, 2 * 2 * layers - 2 * rank.is_last, 2 * part * hidden)
        last = targets * width * NUMBER if targets else hidden
        sent.add(TENSOR, 2 * rank.is_last, 2 * part * last)
    if rank.is_first:
        # Each has a part of the embedding's rows; context-parallel ranks embed the whole sequence.
        sent.add(TENSOR, 1, 2 * part * hidden * layout.cp)
        sent.add(TENSOR, int(layout.sequence_parallel), part * hidden)  # then scattered
    if rank.is_last:
        sent.add(TENSOR, int(layout.sequence_parallel), part * hidden)  # gathered for the head
        sent.add(TENSOR, 1, 2 * part * targets * width * NUMBER)  # what the head passes on
        # Each has a part of the logits: their maximum, the sum of exponentials, the target's.
        sent.add(TENSOR, 3, 2 * part * targets * NUMBER)
    for name, modality in rank.modalities.items():
        encoder = modality.encoder
        tokens = shares(batch.tokens[name], layout.cp)[rank.cp] or dummy_tokens(modality)
        states = len(tokens) * encoder.sequence_length * encoder.hidden_size * NUMBER
        sent.add(TENSOR, 2 * 2 * encoder.built_layers, 2 * part * states)
        sent.add(TENSOR, 1, 2 * part * sum(tokens) * width * NUMBER)  # behind the projector
        sent.add(TENSOR, 1, 2 * part * sum(tokens) * encoder.output_size * NUMBER)  # backward


def dummy_tokens(modality: InputModality) -> list[int]:
    """Of the input that an encoder works on where a micro-batch has none for it."""
    item = modality.encoder.mock_inputs(torch.Generator().manual_seed(0))
    return [modality.encoder.num_tokens({name: tensor[:1] for name, tensor in item.items()})]


def shares(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Encoder inputs as ranks divide them: runs that differ by one at most."""
    ends = [len(tokens) * number // ranks for number in range(ranks + 1)]
    return [list(tokens[start:end]) for start, end in pairwise(ends)]


def add_batch(sent: Traffic, batch: MicroBatch, rank: Rank) -> None:
    """What this stage needs: a message describes it, and one for each kind of number holds it."""
    integers = numbers = 0
    if rank.is_first:
        placeholders = sum(map(sum, batch.tokens.values()))
        integers += batch.batch_size * batch.seq_length + placeholders  # ids, and where media go
        numbers += sum(batch.carried[name] for name in rank.modalities)
    if rank.is_last:
        integers += 2 * batch.targets[rank.cp]  # labels, and where they are
        numbers += batch.targets[rank.cp] * NUMBER  # the loss mask
    if integers:
        part = ring(rank.layout.tp)
        sent.add(BATCH, 1, part * (INTEGER + DESCRIPTION_BYTES))
        sent.add(BATCH, 1, part * integers * INTEGER)
        sent.add(BATCH, int(numbers > 0), part * numbers)


def add_context_parallel(sent: Traffic, batch: MicroBatch, rank: Rank) -> None:
    """Keys and values of each layer, features of colocated encoders; and the gradients of both."""
    layout, language = rank.layout, model().language
    keys = batch.batch_size * batch.seq_length * language.kv_projection_size / layout.tp * NUMBER
    sent.add(CONTEXT, 2 * 2 * LAYERS // layout.pp, ring(layout.cp) * keys)
    for name in rank.modalities:
        if batch.tokens[name]:
            # The ranks' shares are padded to the longest.
            longest = max(map(sum, shares(batch.tokens[name], layout.cp)))
            sent.add(CONTEXT, 2, (layout.cp - 1) * longest * language.hidden_size * NUMBER)


def add_pipeline(sent: Traffic, batch: MicroBatch, rank: Rank) -> None:
    """The hidden states to the next chunk, their gradients to the last; shapes go ahead."""
    layout = rank.layout
    message = hidden_bytes(batch, layout) / (layout.tp if layout.sequence_parallel else 1)
    for chunk in range(rank.stage, layout.pp * layout.virtual, layout.pp):
        neighbours = (chunk > 0) + (chunk < layout.pp * layout.virtual - 1)
        sent.add(PIPELINE, neighbours, message)
        sent.add(PIPELINE, neighbours, 3 * INTEGER)


def add_bridges(sent: Traffic, batch: MicroBatch, rank: Rank) -> None:
    """The features' gradients to all replicas of each encoder, from the first tensor-parallel rank.

    What this one receives, it broadcasts to the others. Shapes go ahead.
    """
    for name, replicas in rank.layout.encoders.items():
        features = sum(batch.tokens[name]) * model().language.hidden_size * NUMBER
        if rank.tp == 0:
            sent.add(BRIDGE, replicas, features / replicas)
            sent.add(BRIDGE, replicas, 2 * INTEGER)
        if rank.layout.tp > 1:
            sent.add(BRIDGE, 1, ring(rank.layout.tp) * features)
            sent.add(BRIDGE, 1, ring(rank.layout.tp) * 2 * INTEGER)


def encoder_traffic(layout: Layout, name: str, replica: int) -> Traffic:
    """What a replica of a non-colocated encoder sends: features, and its weights' gradients."""
    sent, replicas, config = Traffic(), layout.encoders[name], model()
    for batch in micro_batches(layout, 0):
        tokens = sum(shares(batch.tokens[name], replicas)[replica])
        sent.add(BRIDGE, 1, tokens * config.language.hidden_size * NUMBER)
        sent.add(BRIDGE, 1, 2 * INTEGER)
    add_weights(sent, encoder_parameters(config.inputs[name], 1), replicas, layout)
    return sent


def add_weights(sent: Traffic, parameters: float, replicas: int, layout: Layout) -> None:
    """Gradients are summed over the replicas; with the distributed optimizer each sums a part.

    It then updates that part of the weights, which the others gather.
    """
    if replicas > 1:
        operations, times = (2, 1) if layout.distributed_optimizer else (1, 2)
        sent.add(DATA, operations, times * ring(replicas) * parameters * NUMBER)


def rank_parameters(rank: Rank) -> float:
    """The parameters that a rank of the language model holds, its encoders' included."""
    language, tp = model().built_language, rank.layout.tp
    width, middle = language.hidden_size, language.ffn_hidden_size
    heads = 2 * language.query_projection_size + 2 * language.kv_projection_size
    layer = width * (heads + 3 * middle) / tp + 2 * width  # all ranks have the two norms
    table = language.vocab_size * width / tp
    total = LAYERS / rank.layout.pp * layer
    total += rank.is_first * table + rank.is_last * (table + width)  # and the last norm
    return total + sum(encoder_parameters(m, tp) for m in rank.modalities.values())


def encoder_parameters(modality: InputModality, tp: int) -> float:
    """An encoder's and its projector's, on one of `tp` ranks."""
    encoder, width = modality.encoder, modality.encoder.hidden_size
    middle = encoder.ffn_hidden_size
    split = 4 * width**2 + 2 * width * middle + 3 * width + middle  # with the first ones' biases
    copied = 2 * width + 2 * 2 * width  # the second ones' biases, and two norms
    norms = 2 * width * (encoder.pre_norm + encoder.final_norm)
    stem = sum(parameter.numel() for parameter in encoder.stem().parameters())
    between, out = modality.projector.ffn_hidden_size, model().language.hidden_size
    projector = between * (encoder.output_size + 1 + out) / tp + out
    return encoder.built_layers * (split / tp + copied) + norms + stem + projector
