"""python examples/mimo/evaluate.py --ckpt DIR --data DIR

Asks the model every held-out question and writes how many answers match as `eval.json`.

An answer is right when it is the sample's, word for word; when the sample has an `ending`, the
answer must end with that instead. `chance` is what guessing would reach. Samples of one `group`
are no independent trials, so the interval is a bootstrap over groups.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.mimo.cli import command

if TYPE_CHECKING:
    from examples.mimo.generation.api import Mimo

BOOTSTRAP_DRAWS = 2_000


def main() -> None:
    """Parse, load, score, write."""
    args = _parser().parse_args()
    command.prepare_environment()
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
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
    from examples.mimo.generation.api import Mimo

    checkpoint = open_checkpoint(args.ckpt)
    if not args.data.is_dir():
        raise ValueError(f"--data {args.data}: no such folder; prepare_data.py makes one")
    records = {s: read_records(args.data / f"{s}.jsonl")[: args.samples] for s in args.splits}
    answerer = Mimo(checkpoint, args.tp, args.pp)
    scores: dict[str, Any] = {"checkpoint": str(checkpoint.weights), "scores": {}}
    first = args.splits[0]
    for split in args.splits:
        scores["scores"][split] = _score(answerer, records[split], args.data, split)
    for name, modality in answerer.config.modalities.items():
        title = f"{first}, {modality.singular} blanked"
        asked = [record for record in records[first] if record.get(name)]
        if asked:
            scores["scores"][title] = _score(answerer, asked, args.data, title, blank=[name])
    example = records[first][0]
    scores["example"] = {**example, "answer": scores["scores"][first].pop("first_answer")}
    for score in scores["scores"].values():
        score.pop("first_answer", None)
    return scores


def _score(
    answerer: Mimo,
    records: list[dict[str, Any]],
    root: Path,
    title: str,
    blank: list[str] | None = None,
) -> dict[str, Any]:
    from examples.mimo.cli.command import ProgressBar
    from examples.mimo.data.conversation import FilesInside
    from examples.mimo.generation.sampling import Options

    reader = answerer.sample_encoder(blank or [])
    samples = [
        reader.encode({**record, "conversations": record["conversations"][:-1]}, FilesInside(root))
        for record in records
    ]
    clock = ProgressBar(title, len(records))
    answers = answerer.answer(samples, Options(max_new_tokens=32), progress=clock)
    hits = [is_right(r, answer.text) for r, answer in zip(records, answers, strict=True)]
    score = {
        "samples": len(hits),
        "exact_match": sum(hits) / len(hits),
        "interval_95": bootstrap(hits, [r.get("group", r.get("key")) for r in records]),
        "by_kind": _by_kind(records, hits),
        "first_answer": answers[0].text,
    }
    chances = [record["chance"] for record in records if "chance" in record]
    return score | ({"chance": sum(chances) / len(chances)} if chances else {})


def is_right(record: dict[str, Any], text: str) -> bool:
    """Whether `text` ends as the record asks, or is its answer word for word."""
    if "ending" in record:
        return text.endswith(record["ending"])
    answer = record["conversations"][-1]
    return text == answer.get("value", answer.get("content"))


def _by_kind(records: list[dict[str, Any]], hits: list[bool]) -> dict[str, float]:
    found: dict[str, list[bool]] = defaultdict(list)
    for record, hit in zip(records, hits, strict=True):
        found[record.get("kind") or "all"].append(hit)
    return {kind: sum(all_hits) / len(all_hits) for kind, all_hits in sorted(found.items())}


def bootstrap(hits: list[bool], groups: list[Any]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of the mean when whole groups are drawn with replacement."""
    by_group: dict[Any, list[bool]] = defaultdict(list)
    for hit, group in zip(hits, groups, strict=True):
        by_group[group].append(hit)
    right = np.array([sum(found) for found in by_group.values()])
    asked = np.array([len(found) for found in by_group.values()])
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(right), size=(BOOTSTRAP_DRAWS, len(right)))
    means = right[chosen].sum(axis=1) / asked[chosen].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _table(scores: dict[str, Any]) -> str:
    rows = [("held out", "samples", "right", "95 % interval", "chance")]
    for name, score in scores["scores"].items():
        low, high = score["interval_95"]
        chance = f"{score['chance']:.3f}" if "chance" in score else ""
        interval = f"{low:.3f} to {high:.3f}"
        rows.append(
            (name, f"{score['samples']:,}", f"{score['exact_match']:.3f}", interval, chance)
        )
    columns = range(5 if any(row[4] for row in rows[1:]) else 4)
    widths = [max(len(row[i]) for row in rows) for i in columns]
    lines = [
        "  ".join(f"{row[i]:>{widths[i]}}" if i else f"{row[i]:<{widths[i]}}" for i in columns)
        for row in rows
    ]
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
