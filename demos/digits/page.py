"""A page of spoken questions with their answers: pictures, players, waveforms and codes.

python -m demos.digits.page --ckpt demo/checkpoint --data demo/data --output demo/answers.html

The page needs nothing else, and follows the reader's light or dark background.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np

from examples.mimo import Mimo, Options
from examples.mimo.cli import command
from examples.mimo.data.batch import read_records
from examples.mimo.data.turns import FilesInside, without_last_answer

# Of a waveform: pixels for a code, and above and below the middle.
CODE_WIDTH, HALF_HEIGHT = 34, 40
POINTS_OF_A_CODE = 17


def main() -> None:
    """Ask, and write the page."""
    parser = command.Parser(prog="demos.digits.page", description="A page of answers aloud.")
    parser.add_argument("--ckpt", type=Path, required=True, help="what the demo trained")
    parser.add_argument("--data", type=Path, required=True, help="the demo's data folder")
    parser.add_argument("--output", type=Path, required=True, help="the page, an .html file")
    parser.add_argument("--samples", type=command.at_least(1), default=8, help="%(default)s")
    args = parser.parse_args()
    model = Mimo.load(args.ckpt)
    if "speech" not in model.config.outputs:
        raise ValueError(f"--ckpt {args.ckpt}: {model.config.name} has no output of speech")
    records = read_records(args.data / "heldout_aloud.jsonl")[: args.samples]
    questions = [without_last_answer(record, model.config)[0] for record in records]
    files = FilesInside(args.data)
    answers = model.answer(
        [model.encode(question, files) for question in questions], Options(max_new_tokens=100)
    )
    rows = [
        _row(model, args.data, record, answer.text, answer.outputs.get("speech", []))
        for record, answer in zip(records, answers, strict=True)
    ]
    args.output.write_text(_PAGE.replace("ROWS", "\n".join(rows)), encoding="utf-8")
    print(args.output)


def _row(
    model: Mimo, data: Path, record: dict[str, Any], text: str, outputs: list[list[int]]
) -> str:
    picture = _data_url(data / record["images"][0], "image/png")
    question = _player((data / record["audios"][0]).read_bytes(), "audio/flac")
    expected = record["conversations"][-1]["value"].removesuffix("<speech>")
    note = "" if text == expected else f" <small>(right is: {html.escape(expected)})</small>"
    codec = model.config.outputs["speech"].codec
    sounds = [(codec.decode(codes), codes) for codes in outputs]
    spoken = "".join(
        f"{_player(codec.encode_bytes(samples, 'wav'), 'audio/wav')}{waveform(samples, codes)}"
        for samples, codes in sounds
    )
    return (
        f'<tr><td><img src="{picture}" alt="a handwritten digit"></td><td>{question}</td>'
        f"<td><b>{html.escape(text)}</b>{note}{spoken}</td></tr>"
    )


def waveform(samples: np.ndarray, codes: list[int]) -> str:
    """An SVG of the samples, with each code below the sound that it stands for."""
    width, middle, height = CODE_WIDTH * len(codes), HALF_HEIGHT, 2 * HALF_HEIGHT + 18
    peaks = [
        float(np.abs(part).max()) for part in np.array_split(samples, POINTS_OF_A_CODE * len(codes))
    ]
    step, scale = CODE_WIDTH / POINTS_OF_A_CODE, HALF_HEIGHT / max(*peaks, 1e-6)
    bars = "".join(
        f"M{(place + 0.5) * step:.1f} {middle - peak * scale:.1f}V{middle + peak * scale:.1f}"
        for place, peak in enumerate(peaks)
    )
    lines = "".join(f"M{place * CODE_WIDTH} 0V{height}" for place in range(1, len(codes)))
    numbers = "".join(
        f'<text x="{(place + 0.5) * CODE_WIDTH}" y="{height - 4}">{code}</text>'
        for place, code in enumerate(codes)
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" '
        f'aria-label="waveform with {len(codes)} codes"><path class="line" d="{lines}"/>'
        f'<path class="sound" d="{bars}"/>{numbers}</svg>'
    )


def _player(data: bytes, kind: str) -> str:
    return f'<audio controls src="data:{kind};base64,{base64.b64encode(data).decode()}"></audio>'


def _data_url(file: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Answers aloud</title>
<style>
:root { color-scheme: light dark; font: 16px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; }
td, th { padding: 0.6rem 1rem 0.6rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
img { width: 64px; height: 64px; display: block; }
audio { display: block; height: 32px; width: 220px; }
svg { display: block; max-width: 100%; margin-top: 0.4rem; }
text { font: 11px system-ui, sans-serif; fill: currentColor; text-anchor: middle; }
.sound { stroke: #2f7dd1; stroke-width: 1.6; }
.line { stroke: currentColor; stroke-opacity: 0.25; }
</style>
<h1>Answers aloud</h1>
<p>Pictures and voices that training never met. Under an answer's sound are its codes, a token of
the language model each.</p>
<table><tr><th>shown</th><th>asked</th><th>answered</th></tr>
ROWS
</table></html>
"""


if __name__ == "__main__":
    command.run("demos.digits.page", main)
