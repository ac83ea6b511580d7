"""python -m benchmarks.communication: what every rank sends in an iteration, counted and computed.

Two cores that simulate eight processes say nothing about speed; what they send can be counted.
tests/helpers/counted_train.py records every operation of `torch.distributed` in a training run, and
traffic.py computes the same from the sizes of model, micro-batches and layout. The bubble is
counted too: a run's passes, sends and receives, in the order they began on each rank, are laid out
in slots of equal length.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the page is about CPUs

from benchmarks.traffic import (
    BATCH,
    BRIDGE,
    COMMON,
    CONTEXT,
    COUNTED,
    DATA,
    GLOBAL_BATCH_SIZE,
    HEADS,
    KINDS,
    LAYERS,
    LAYOUTS,
    MICRO_BATCH_SIZE,
    PIPELINE,
    REST,
    TENSOR,
    Layout,
    Traffic,
    computed,
    ring,
)
from tests.helpers import ranks

BOUND = 0.02
# A part of a caller's name -> what it sends; the first that fits. Else the group says it.
CALLERS = {
    "bridge_communicator.py": BRIDGE,
    "p2p_communication.py": PIPELINE,
    "context.py:broadcast_batch": BATCH,
    "context.py:_broadcast_description": BATCH,
    "param_and_grad_buffer.py": DATA,
    "finalize_model_grads.py": REST,
}
GROUPS = {"TENSOR_MODEL_PARALLEL_GROUP": TENSOR, "CONTEXT_PARALLEL_GROUP": CONTEXT}
# How much of what a rank puts into an operation over n ranks it sends.
SENT = {
    "allreduce": lambda n: 2 * ring(n),
    "allreduce_coalesced": lambda n: 2 * ring(n),
    "broadcast": ring,
    "allgather": lambda n: n - 1,
    "allgather_into_tensor_coalesced": lambda n: n - 1,
    "reduce_scatter": lambda n: n - 1,
    "reduce_scatter_tensor_coalesced": lambda n: n - 1,
    "send": lambda n: 1,
    "barrier": lambda n: 0,
}
# A pass -> the slots it takes: the gradients of inputs and those of weights cost a product each.
SLOTS = {"forward": 1, "backward": 2}
Events = list[dict[str, Any]]


def record(layout: Layout) -> list[Events]:
    """What each rank of a run did in the counted iteration."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (*COMMON, *layout.flags())
        script = "tests/helpers/counted_train.py"
        done = ranks.run(script, folder, *flags, processes=layout.processes)
        assert done.returncode == 0, f"{layout.name}: {done.stderr}"
        files = [Path(folder, f"{rank}.json") for rank in range(layout.processes)]
        return [json.loads(file.read_text(encoding="utf-8"))[COUNTED] for file in files]


def counted(events: Events) -> Traffic:
    """What a rank sent; operations of a group of one send nothing."""
    sent = Traffic()
    for event in events:
        if event["operation"] not in (*SLOTS, "recv") and event["size"] > 1:
            sent.add(_kind(event), 1, SENT[event["operation"]](event["size"]) * event["bytes"])
    return sent


def _kind(event: dict[str, Any]) -> str:
    named = (kind for part, kind in CALLERS.items() if part in event["caller"])
    return next(named, GROUPS.get(event["group"], REST))


def counted_bubble(layout: Layout, run: Sequence[Events]) -> float:
    """The idle share of the slots of all stages, from the order in which their ranks did things.

    Between two passes a rank posts all it sends at once, and waits for all it receives. One rank
    stands for a stage, and for an encoder; the others of a stage do the same.
    """
    stage = (layout.processes - layout.encoder_ranks) // layout.pp
    firsts = range(layout.encoder_ranks, layout.processes, stage)
    chosen = [*range(layout.encoder_ranks), *firsts]
    waiting = {rank: _phases(run[rank]) for rank in chosen}
    clock = dict.fromkeys(chosen, 0)
    posted: dict[tuple[int, int], list[int]] = defaultdict(list)
    read: dict[tuple[int, int], int] = defaultdict(int)
    while any(waiting.values()):
        moved = False
        for rank, phases in waiting.items():
            if not phases:
                continue
            sends, receives, slots = phases[0]
            for peer in sends:
                posted[rank, peer].append(clock[rank])
                moved = True
            phases[0] = ([], receives, slots)
            needed = {peer: receives.count(peer) for peer in receives}
            if any(len(posted[p, rank]) < read[p, rank] + n for p, n in needed.items()):
                continue
            for peer in receives:
                clock[rank] = max(clock[rank], posted[peer, rank][read[peer, rank]])
                read[peer, rank] += 1
            clock[rank] += slots
            phases.pop(0)
            moved = True
        assert moved, "the ranks wait for one another"
    busy = sum(SLOTS.get(event["operation"], 0) for rank in chosen for event in run[rank])
    return 1 - busy / (max(clock.values()) * len(chosen))


def _phases(events: Iterable[dict[str, Any]]) -> list[tuple[list[int], list[int], int]]:
    """Peers to send to, peers to receive from, and the slots of the pass that follows."""
    phases: list[tuple[list[int], list[int], int]] = [([], [], 0)]
    for event in events:
        sends, receives, slots = phases[-1]
        if event["operation"] in SLOTS:
            phases[-1] = (sends, receives, slots + SLOTS[event["operation"]])
            phases.append(([], [], 0))
        elif event["operation"] in ("send", "recv"):
            (sends if event["operation"] == "send" else receives).append(event["peer"])
    return phases


def computed_bubble(layout: Layout) -> float:
    """(p - 1) / (v m + p - 1) for p stages, v groups of layers on each and m micro-batches.

    Non-colocated encoders are a stage of their own, ahead of the others.
    """
    others = layout.pp - 1 + bool(layout.encoders)
    return others / (layout.virtual * layout.num_micro_batches + others)


@dataclass(frozen=True)
class Result:
    """A layout, counted and computed, by rank."""

    layout: Layout
    counted: list[Traffic]
    computed: list[Traffic]
    bubble: float

    @property
    def most(self) -> int:
        """The rank that sends most."""
        return max(range(self.layout.processes), key=lambda rank: self.counted[rank].total)

    @property
    def differences(self) -> dict[tuple[int, str], float]:
        """How far the formula is from the count, by rank and kind; "total" is all of a rank's."""
        result = {}
        for rank, (count, formula) in enumerate(zip(self.counted, self.computed, strict=True)):
            for kind in KINDS:
                if kind != REST and count.bytes[kind] + formula.bytes[kind]:
                    result[rank, kind] = _difference(formula.bytes[kind], count.bytes[kind])
            if formula.total:
                result[rank, "total"] = _difference(formula.total, count.total)
        return result

    @property
    def other_operations(self) -> dict[tuple[int, str], tuple[int, int]]:
        """Where the number of operations is not the formula's: counted and computed."""
        pairs = enumerate(zip(self.counted, self.computed, strict=True))
        return {
            (rank, kind): (count.operations[kind], formula.operations[kind])
            for rank, (count, formula) in pairs
            for kind in KINDS
            if kind != REST and count.operations[kind] != formula.operations[kind]
        }

    @property
    def is_within_bound(self) -> bool:
        """Whether bytes agree within the bound, the bubble too, and operations exactly."""
        bubbles = abs(self.bubble - computed_bubble(self.layout)) <= BOUND
        worst = max(self.differences.values(), default=0.0)
        return worst <= BOUND and bubbles and not self.other_operations


def _difference(formula: float, count: float) -> float:
    return abs(formula / count - 1) if count else float("inf")


def measure(layout: Layout) -> Result:
    """Run a layout and compute the same."""
    run = record(layout)
    bubble = counted_bubble(layout, run)
    return Result(layout, [counted(events) for events in run], computed(layout), bubble)


def main() -> None:
    """Measure all layouts, print and write the tables; status 1 if one is out of bounds."""
    parser = argparse.ArgumentParser(description="What every rank sends in an iteration.")
    parser.add_argument("--output", type=Path, help="write the tables to this Markdown file")
    parser.add_argument("--only", default="", help="only layouts whose name holds this")
    options = parser.parse_args()
    chosen = [layout for layout in LAYOUTS if options.only in layout.name]
    results, begun = [], time.monotonic()
    for number, layout in enumerate(chosen, start=1):
        results.append(measure(layout))
        left = (time.monotonic() - begun) / number * (len(chosen) - number)
        print(f"{summary(results[-1])} {left / 60:.0f} min left", file=sys.stderr, flush=True)
        if not results[-1].is_within_bound:
            print(f"    {results[-1].differences}", file=sys.stderr)
            print(f"    {results[-1].other_operations}", file=sys.stderr)
    page = _PAGE.format(summary=table(results), kinds=kinds(results), words=words())
    print(page)
    if options.output:
        options.output.write_text(page, encoding="utf-8")
    sys.exit(0 if all(result.is_within_bound for result in results) else 1)


def table(results: Sequence[Result]) -> str:
    """A line a layout."""
    head = [
        "| layout | processes | operations | bytes sent, counted | formula | ratio "
        "| bubble, counted | formula |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    return "\n".join(head + [summary(result) for result in results])


def summary(result: Result) -> str:
    """The line of a layout: the rank that sends most."""
    layout, rank = result.layout, result.most
    count, formula = result.counted[rank], result.computed[rank]
    ratio = f"{formula.total / count.total:.4f}" if count.total else "-"
    bubbles = [f"{bubble:.1%}" for bubble in (result.bubble, computed_bubble(layout))]
    return (
        f"| {layout.name} | {layout.processes} | {sum(count.operations.values()):,} "
        f"| {count.total:,.0f} | {formula.total:,.0f} | {ratio} | {bubbles[0]} | {bubbles[1]} |"
    )


def kinds(results: Sequence[Result]) -> str:
    """A line for each kind of what the ranks of a layout send; like ranks share theirs."""
    lines = [
        "| layout | ranks | sent | operations | bytes sent, counted | formula |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for result in results:
        numbers = range(result.layout.processes)
        for _, alike in groupby(numbers, key=lambda rank, result=result: _roles(result, rank)):
            same = list(alike)
            most = max(same, key=lambda rank, result=result: result.counted[rank].total)
            count, formula = result.counted[most], result.computed[most]
            named = str(same[0]) if len(same) == 1 else f"{same[0]}-{same[-1]}"
            lines += [
                f"| {result.layout.name} | {named} | {kind} | {count.operations[kind]:,} "
                f"| {count.bytes[kind]:,.0f} | {formula.bytes[kind]:,.0f} |"
                for kind in sorted(KINDS, key=lambda kind, count=count: -count.bytes[kind])
                if count.operations[kind] and kind != REST
            ]
    return "\n".join(lines)


def _roles(result: Result, rank: int) -> tuple[int, ...]:
    return tuple(result.counted[rank].operations[kind] for kind in KINDS)


def words() -> str:
    """What the kinds are."""
    return "\n".join(f"- *{kind}*: {what}" for kind, what in KINDS.items())


_PAGE = f"""# What every rank sends in an iteration

`python -m benchmarks.communication --output benchmarks/communication.md` wrote this: `tiny_avlm` in
fp32 with {LAYERS} layers and {HEADS} heads, {GLOBAL_BATCH_SIZE} samples of mock data an iteration
in micro-batches of {MICRO_BATCH_SIZE}, ranks on CPUs. The counts are those of iteration {COUNTED};
the formula is [traffic.py](traffic.py). Bytes are those that a rank sends where the ranks of a
group form a ring: 2 (n - 1) / n of a tensor that is summed, (n - 1) / n of one that is gathered,
scattered or broadcast, all of a message. On one machine they may take another way.

This is the rank that sends most, in each layout. For every rank and every kind of what it sends,
formula and count are within {BOUND:.0%}, and the numbers of operations are equal. The bubble is the
idle share of all stages, a backward pass counting as two forward passes; its formula is
(p - 1) / (v m + p - 1) for p stages, v groups of layers on each and m micro-batches.

{{summary}}

## By kind

{{words}}

Of ranks with the same operations the one that sends most; *rest* is below a kilobyte, or of norms.

{{kinds}}
"""


if __name__ == "__main__":
    main()
