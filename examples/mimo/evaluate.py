"""Score a checkpoint on held-out samples by exact match of greedy answers.

python examples/mimo/evaluate.py --ckpt DIR --data DIR

Writes `eval.json` beside the weights. An answer is right when it equals the sample's word for word;
when the sample has an `ending`, the answer must end with that instead. Of an answer with outputs
the words are judged. Where the sample has a `hear_prompt`, the output is decoded and shown to the
model with that prompt too, and it is right to answer with the same words ("heard again").

`chance` is the score of guessing. Samples of one `group` are no independent trials, so the interval
is a bootstrap over groups.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from examples.mimo.cli import command
from examples.mimo.cli.overrides import add_integrity_flag

if TYPE_CHECKING:
    from examples.mimo.configs.schema import MimoConfig
    from examples.mimo.data.conversation import Sample
    from examples.mimo.generation.api import Mimo
    from examples.mimo.generation.scheduler import Answer
    from examples.mimo.modalities.files import Blob

BOOTSTRAP_DRAWS = 2_000
MAX_NEW_TOKENS = 32


def main() -> None:
    """Score the checkpoint that the command line names, and write and print the scores."""
    args = _parser().parse_args()
    command.prepare_environment()
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    with command.stdout_to(os.devnull):
        scores = evaluate(args)
    if int(os.environ["RANK"]) == 0:
        output = args.output or args.ckpt / "eval.json"
        output.write_text(json.dumps(scores, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        print(_table(scores))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Exact match per split, and of the first split with each modality's content blanked.

    How much the score falls without a modality says how much the model relies on it.
    """
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.data.batch import read_records
    from examples.mimo.generation.api import Mimo, on_rank_zero

    checkpoint = open_checkpoint(args.ckpt, verify=args.verify_integrity)
    if not args.data.is_dir():
        raise ValueError(f"--data {args.data}: no such folder; prepare_data.py makes one")
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples {args.samples}: at least 1")
    splits = args.splits or heldout_splits(args.data)
    records = {s: read_records(args.data / f"{s}.jsonl")[: args.samples] for s in splits}
    answerer = Mimo(checkpoint, args.tp, args.pp)
    # All ranks answer the same questions, whatever each finds in its file system.
    splits, records = on_rank_zero(lambda: (splits, records))
    scores: dict[str, Any] = {"checkpoint": str(checkpoint.weights), "scores": {}}
    first = splits[0]
    score = functools.partial(_score, answerer, args.data, args.batch_size)
    for split in splits:
        scores["scores"][split] = score(records[split], split)
        if heard := scores["scores"][split].pop("heard", None):
            scores["scores"][f"{split}, heard again"] = heard
    for name, modality in answerer.config.inputs.items():
        title = f"{first}, {modality.singular} blanked"
        with_media = [r for r in records[first] if _has_media(r, name, answerer.config)]
        if with_media:
            scores["scores"][title] = score(with_media, title, blank=[name])
    example = records[first][0]
    # Python reads NaN, which is no JSON to anybody else.
    example = json.loads(json.dumps(example), parse_constant=str)
    scores["example"] = {**example, "answer": scores["scores"][first].pop("first_answer")}
    for result in scores["scores"].values():
        result.pop("first_answer", None)
    return scores


def _has_media(record: dict[str, Any], name: str, config: MimoConfig) -> bool:
    """Whether a turn has a place of this modality; parts may name files of their own."""
    from examples.mimo.data.turns import conversation_of, parse_turns

    turns = parse_turns(conversation_of(record), config)
    places = [place for turn in turns for place in turn.places]
    return any(place.modality == name and not place.is_output for place in places)


def heldout_splits(data: Path) -> list[str]:
    """`heldout` and the other held-out splits of a data folder."""
    return ["heldout", *sorted(path.stem for path in data.glob("heldout_*.jsonl"))]


def _score(
    answerer: Mimo,
    root: Path,
    batch_size: int,
    records: list[dict[str, Any]],
    title: str,
    blank: list[str] | None = None,
) -> dict[str, Any]:
    from examples.mimo.cli.command import ProgressBar
    from examples.mimo.data.turns import (
        FilesInside,
        errors_named,
        without_last_answer,
    )
    from examples.mimo.generation.api import on_rank_zero
    from examples.mimo.generation.sampling import Options

    reader, files = answerer.sample_encoder(blank or []), FilesInside(root)
    pairs = []
    for number, record in enumerate(records, start=1):
        key = record.get("key")
        where = f"{root}, {title}, line {number}" if key is None else f"sample {key}"
        with errors_named(where):
            question, expected = without_last_answer(record, answerer.config)
            if expected is None and "ending" not in record:
                raise ValueError(
                    "no answer to compare with; end the conversation with one, or give an 'ending'"
                )
        pairs.append((question, expected))
    samples: list[Sample] = [
        on_rank_zero(functools.partial(reader.encode, question, files)) for question, _ in pairs
    ]
    config = answerer.config
    hears = blank is None and any("hear_prompt" in record for record in records)
    # Text that comes first is all there is to wait for.
    options = Options(max_new_tokens=MAX_NEW_TOKENS, outputs=())
    if hears or any(_ends_with_text(record, config) for record in records):
        options = Options(max_new_tokens=config.language.seq_length)
    progress = ProgressBar(title, len(records))
    answers = answerer.answer(samples, options, batch_size, progress)
    texts = [answer.text for answer in answers]
    if config.outputs:  # beside one of them there is a space or none
        texts = [" ".join(text.split()) for text in texts]
        pairs = [(question, text and " ".join(text.split())) for question, text in pairs]
    hits = [
        is_right(record, expected, text)
        for record, (_, expected), text in zip(records, pairs, texts, strict=True)
    ]
    result = _statistics(records, hits) | {"first_answer": answers[0].text}
    if hears:
        result["heard"] = _heard_again(answerer, records, answers, batch_size)
    return result


def _heard_again(
    answerer: Mimo, records: list[dict[str, Any]], answers: list[Answer], batch_size: int
) -> dict[str, Any]:
    """How often the model writes down the words of its answer when it is shown the output of it.

    An answer without an output is wrong.
    """
    from examples.mimo.generation.api import on_rank_zero
    from examples.mimo.generation.sampling import Options
    from examples.mimo.modalities.files import Blob

    asked = [(r, a) for r, a in zip(records, answers, strict=True) if "hear_prompt" in r]
    shown = [(record, answer) for record, answer in asked if any(answer.outputs.values())]

    @functools.cache  # few words, often said
    def decoded(name: str, codes: tuple[int, ...]) -> Blob:
        codec = answerer.config.outputs[name].codec
        suffix = codec.suffixes[0]
        data = codec.encode_bytes(codec.decode(codes), suffix.removeprefix("."))
        return Blob(f"answer{suffix}", data)

    def samples_shown() -> list[Sample]:
        samples = []
        for record, answer in shown:
            name, codes = next((name, items[0]) for name, items in answer.outputs.items() if items)
            samples.append(_sample_of(answerer, record, decoded(name, tuple(codes))))
        return samples

    samples = on_rank_zero(samples_shown)
    options = Options(max_new_tokens=MAX_NEW_TOKENS, outputs=())
    heard = answerer.answer(samples, options, batch_size) if samples else []
    words = {id(r): a.text.split() for (r, _), a in zip(shown, heard, strict=True)}
    hits = [words.get(id(record)) == answer.text.split() for record, answer in asked]
    return _statistics([record for record, _ in asked], hits)


def _sample_of(answerer: Mimo, record: dict[str, Any], item: Blob) -> Sample:
    """The record's `hear_prompt` about an item that the model put out."""
    prompt, inputs = record["hear_prompt"], answerer.config.inputs
    takers = [name for name, modality in inputs.items() if modality.placeholder in str(prompt)]
    if len(takers) != 1:
        raise ValueError(f"sample {record.get('key')}: 'hear_prompt' needs one place of an input")
    turns = [{"from": "human", "value": prompt}]
    return answerer.encode({"conversations": turns, takers[0]: [item]})


def _statistics(records: list[dict[str, Any]], hits: list[bool]) -> dict[str, Any]:
    """What the table and eval.json say of `hits`, one for each record."""
    result = {
        "samples": len(hits),
        "exact_match": sum(hits) / len(hits),
        "interval_95": bootstrap(hits, [r.get("group", r.get("key")) for r in records]),
        "by_kind": _by_kind(records, hits),
    }
    chances = [record["chance"] for record in records if "chance" in record]
    return result | ({"chance": sum(chances) / len(chances)} if chances else {})


def _ends_with_text(record: dict[str, Any], config: MimoConfig) -> bool:
    """Whether there is text behind the first output of the answer that is expected."""
    from examples.mimo.data.turns import ASSISTANT, conversation_of, parse_turns

    (answer,) = parse_turns(conversation_of(record)[-1:], config)
    is_output = [not isinstance(part, str) for part in answer.parts]
    behind = answer.parts[is_output.index(True) :] if any(is_output) else ()
    return answer.role == ASSISTANT and any(isinstance(p, str) and p.strip() for p in behind)


def is_right(record: dict[str, Any], expected: str | None, text: str) -> bool:
    """Whether `text` has the record's `ending`, or is the expected answer word for word."""
    return text.endswith(record["ending"]) if "ending" in record else text == expected


def _by_kind(records: list[dict[str, Any]], hits: list[bool]) -> dict[str, float]:
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for record, hit in zip(records, hits, strict=True):
        by_kind[record.get("kind") or "all"].append(hit)
    return {kind: sum(of_kind) / len(of_kind) for kind, of_kind in sorted(by_kind.items())}


def bootstrap(hits: list[bool], groups: list[Any]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points of the mean when whole groups are drawn with replacement."""
    by_group: dict[Any, list[bool]] = defaultdict(list)
    for hit, group in zip(hits, groups, strict=True):
        by_group[group].append(hit)
    right = np.array([sum(group) for group in by_group.values()])
    sizes = np.array([len(group) for group in by_group.values()])
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(right), size=(BOOTSTRAP_DRAWS, len(right)))
    means = right[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _table(scores: dict[str, Any]) -> str:
    lines = [("held out", "samples", "right", "95 % interval", "chance")]
    for name, score in scores["scores"].items():
        low, high = score["interval_95"]
        chance = f"{score['chance']:.3f}" if "chance" in score else ""
        interval = f"{low:.3f} to {high:.3f}"
        lines.append(
            (name, f"{score['samples']:,}", f"{score['exact_match']:.3f}", interval, chance)
        )
    columns = range(5 if any(cells[4] for cells in lines[1:]) else 4)
    widths = [max(len(cells[i]) for cells in lines) for i in columns]
    # Names start left, numbers end right.
    return "\n".join(
        "  ".join(f"{cells[i]:>{widths[i]}}" if i else f"{cells[i]:<{widths[i]}}" for i in columns)
        for cells in lines
    )


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="evaluate.py", description="Exact match of greedy answers on held-out samples."
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="what train.py --save wrote")
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    parser.add_argument(
        "--splits",
        nargs="+",
        help="JSON-lines files; the first is also scored with each modality blanked (default: "
        "heldout, and all heldout_*)",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="only the first N of each split")
    parser.add_argument("--output", type=Path, help="default CKPT/eval.json")
    parser.add_argument(
        "--batch-size",
        type=command.at_least(1),
        default=64,
        metavar="N",
        help="answers at once, default 64; fewer where memory is short",
    )
    parser.add_argument(
        "--tp", type=command.at_least(1), default=1, help="tensor-parallel size, under torchrun"
    )
    parser.add_argument(
        "--pp", type=command.at_least(1), default=1, help="pipeline stages, under torchrun"
    )
    add_integrity_flag(parser)
    return parser


if __name__ == "__main__":
    command.run("evaluate.py", main)
