"""Scores drawings: a classifier of real digits says which number each one is.

python -m demos.drawing.score --ckpt drawing-demo/checkpoint --data drawing-demo/data

The classifier, a support vector machine, is trained on the real digits of the training split. Its
score on held-out real digits says how far it can be trusted. The recordings are all of unheard
voices.
"""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from demos.digits.questions import NUMBERS
from examples.mimo.cli import command

if TYPE_CHECKING:
    from examples.mimo.generation.api import Mimo

COLUMNS, CELL, SCALE = 24, 10, 3
# Of the contact sheet: greedy drawings, a gap, and drawings that were sampled.
GREEDY_COLUMNS = 4


def main() -> None:
    """Parses the command line, and prints the scores as JSON."""
    parser = command.Parser(prog="python -m demos.drawing.score", description="Score drawings.")
    parser.add_argument("--ckpt", type=Path, required=True, help="what train.py --save wrote")
    parser.add_argument("--data", type=Path, required=True, help="what demos.drawing.data wrote")
    parser.add_argument("--samples", type=command.at_least(1), metavar="N", help="first N records")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write drawings of each digit")
    args = parser.parse_args()
    from examples.mimo.data.batch import read_records
    from examples.mimo.generation.api import Mimo

    model = Mimo.load(args.ckpt)
    records = read_records(args.data / "heldout.jsonl")[: args.samples]
    scores, drawn = score(model, args.data, records)
    if args.sheet:
        contact_sheet(records, *drawn).save(args.sheet, optimize=True)
    print(json.dumps(scores, indent=1))


def score(
    model: Mimo, data: Path, records: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
    """How often a drawing is the digit that was said, and the drawings: greedy ones, sampled ones.

    Beside it how often the name is right, what the classifier says of real held-out pictures and of
    those through the codec, how many drawings differ, and how many have the codes of a training
    picture.
    """
    from sklearn.svm import SVC

    codec: Any = model.config.outputs["drawings"].codec
    drawings, digits = _real(codec, data, "heldout")
    known, known_digits = _real(codec, data, "train")
    classifier = SVC().fit(np.stack([drawing.ravel() for drawing in known]), known_digits)

    def recognised(drawings: list[np.ndarray], digits: list[int]) -> float:
        return float(classifier.score(np.stack([d.ravel() for d in drawings]), digits))

    coded = [codec.decode(codec.encode(drawing)) for drawing in drawings]
    scores: dict[str, Any] = {
        "real pictures recognised": recognised(drawings, digits),
        "real pictures through the codec recognised": recognised(coded, digits),
    }
    known_codes = {tuple(codec.encode(drawing)) for drawing in known}
    asked = [record["digit"] for record in records]
    audios = [[data / file for file in record["audios"]] for record in records]
    drawn = []
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        answers = model.generate(
            ["<audio>"] * len(records), audios=audios, outputs=["drawings"], temperature=temperature
        )
        names = [answer.text.strip() for answer in answers]
        # An answer without a drawing is blank paper, which is none of the digits.
        blank = np.zeros((codec.side, codec.side))
        drawn.append([answer.drawings[0] if answer.drawings else blank for answer in answers])
        codes = [tuple(codec.encode(drawing)) for drawing in drawn[-1]]
        scores[name] = {
            "drawings": sum(bool(answer.drawings) for answer in answers),
            "recognised": recognised(drawn[-1], asked),
            "named": sum(map(operator.eq, names, [NUMBERS[d] for d in asked])) / len(names),
            "different": len(set(codes)),
            "copies of training pictures": sum(code in known_codes for code in codes),
        }
    return scores, drawn


def _real(codec: Any, data: Path, split: str) -> tuple[list[np.ndarray], list[int]]:
    """The ink of a split's real pictures, and the digits that they are."""
    from sklearn.datasets import load_digits

    digits, files = load_digits().target, sorted((data / "drawings" / split).glob("*.png"))
    return [codec.read(file) for file in files], [int(digits[int(file.stem)]) for file in files]


def contact_sheet(
    records: list[dict[str, Any]], greedy: list[np.ndarray], sampled: list[np.ndarray]
) -> Image.Image:
    """A row for each digit: a few greedy drawings, a gap, and sampled ones."""
    paper = np.ones((10 * CELL, COLUMNS * CELL))
    for digit in range(10):
        numbers = [n for n, record in enumerate(records) if record["digit"] == digit]
        spread = [numbers[len(numbers) * n // COLUMNS] for n in range(COLUMNS)] if numbers else []
        for column, number in enumerate(spread):
            if column == GREEDY_COLUMNS:
                continue
            ink = (greedy if column < GREEDY_COLUMNS else sampled)[number]
            top, left = digit * CELL + 1, column * CELL + 1
            paper[top : top + len(ink), left : left + len(ink)] = 1 - ink
    picture = Image.fromarray((255 * paper).round().astype(np.uint8))
    return picture.resize([SCALE * size for size in picture.size], Image.Resampling.NEAREST)


if __name__ == "__main__":
    command.run("demos.drawing.score", main)
