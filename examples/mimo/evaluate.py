"""python examples/mimo/evaluate.py --ckpt DIR --data DIR

Asks the model every held-out question and writes how many answers match as `eval.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.mimo import command

if TYPE_CHECKING:
    from examples.mimo.inference.answerer import Answerer


def main() -> None:
    """Parse, load, score, write."""
    args = _parser().parse_args()
    command.prepare_environment()
    command.alone_unless_launched()
    from examples.mimo import host

    host.install()
    with command.stdout_to(os.devnull):
        scores = evaluate(args)
    if int(os.environ["RANK"]) == 0:
        output = args.output or args.ckpt / "eval.json"
        output.write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
        print(_table(scores))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Exact match per split, and on the first split with each modality blanked."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.data.datasets import read_records
    from examples.mimo.inference.answerer import Answerer

    checkpoint = open_checkpoint(args.ckpt)
    if not args.data.is_dir():
        raise ValueError(f"--data {args.data}: no such folder; prepare_data.py makes one")
    records = {s: read_records(args.data / f"{s}.jsonl")[: args.samples] for s in args.splits}
    answerer = Answerer(checkpoint, args.tp, args.pp)
    scores: dict[str, Any] = {"checkpoint": str(checkpoint.weights), "scores": {}}
    first = args.splits[0]
    for split in args.splits:
        scores["scores"][split] = _score(answerer, records[split], args.data, split)
    for name, modality in answerer.config.modalities.items():
        title = f"{first}, {modality.noun} blanked"
        asked = [record for record in records[first] if record.get(name)]
        if asked:
            scores["scores"][title] = _score(answerer, asked, args.data, title, blank=[name])
    example = records[first][0]
    scores["example"] = {**example, "answer": scores["scores"][first].pop("first_answer")}
    for score in scores["scores"].values():
        score.pop("first_answer", None)
    return scores


def _score(
    answerer: Answerer,
    records: list[dict[str, Any]],
    root: Path,
    title: str,
    blank: list[str] | None = None,
) -> dict[str, Any]:
    reader = answerer.reader(blank or [])
    clock = _Clock(title, len(records))
    samples, wanted = [], []
    for record in records:
        question, answer = record["conversations"][:-1], record["conversations"][-1]
        samples.append(reader.read({**record, "conversations": question}, root))
        wanted.append(answer.get("value", answer.get("content")))
    answers = answerer.answer(samples, max_new_tokens=24, progress=clock)
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for record, answer, right in zip(records, answers, wanted, strict=True):
        by_kind[record.get("kind") or "all"].append(answer.text == right)
    hits = [hit for found in by_kind.values() for hit in found]
    return {
        "samples": len(hits),
        "exact_match": sum(hits) / len(hits),
        "by_kind": {kind: sum(found) / len(found) for kind, found in sorted(by_kind.items())},
        "first_answer": answers[0].text,
    }


class _Clock:
    """Progress with an estimate on stderr, every five seconds."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.spoken = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self.spoken > 5 and done < self.total and int(os.environ["RANK"]) == 0:
            self.spoken = now
            left = (now - self.started) / done * (self.total - done)
            print(f"  {self.title}: {done} of {self.total}, {left:.0f} s left", file=sys.stderr)


def _table(scores: dict[str, Any]) -> str:
    rows = [
        (n, f"{s['samples']:,}", f"{s['exact_match']:.3f}") for n, s in scores["scores"].items()
    ]
    rows.insert(0, ("held out", "samples", "exact match"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{n:<{widths[0]}}  {c:>{widths[1]}}  {m:>{widths[2]}}" for n, c, m in rows]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="evaluate.py", description="Exact match of greedy answers on held-out samples."
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="what train.py --save wrote")
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["heldout", "heldout_pairs"],
        help="JSON-lines files; the first is also scored with each modality blanked",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="only the first N of each split")
    parser.add_argument("--output", type=Path, help="default CKPT/eval.json")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size, under torchrun")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages, under torchrun")
    return parser


if __name__ == "__main__":
    command.run("evaluate.py", main)
