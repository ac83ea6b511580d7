"""python benchmarks/loss_curve.py METRICS... --output FILE.svg: the curves of a training run.

Reads the files that `train.py --metrics-file` writes, one for each stage of the training, and draws
the training loss (left axis) and the exact match on held-out samples (right axis, where there are
any) over the iterations of all stages. The SVG needs nothing else, and follows the reader's light
or dark background.
"""

from __future__ import annotations

import argparse
import html
import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 64, 44, 52
SMOOTHING = 0.9

Point = tuple[float, float]


@dataclass
class Curves:
    """(iteration, value) points; `stages` are the iterations where another file begins."""

    loss: list[Point] = field(default_factory=list)
    exact_match: list[Point] = field(default_factory=list)
    stages: list[float] = field(default_factory=list)


def main() -> None:
    """Parses the command line and writes the SVG; one line and status 2 on a wrong input."""
    parser = argparse.ArgumentParser(description="Draw the loss curve of a run as an SVG.")
    parser.add_argument(
        "metrics",
        type=Path,
        nargs="+",
        metavar="METRICS",
        help="what --metrics-file wrote; several are stages that followed one another",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.svg")
    parser.add_argument("--title", default="Training loss", help="default: %(default)s")
    args = parser.parse_args()
    try:
        args.output.write_text(draw(read_curves(args.metrics), args.title), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"loss_curve.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def read_curves(files: Iterable[Path]) -> Curves:
    """The curves of the stages in `files`; ValueError for a file without a loss.

    Of an iteration that was trained again after an interruption the last time counts.
    """
    curves, offset = Curves(), 0.0
    for file in files:
        loss: dict[float, float] = {}
        exact_match: dict[float, float] = {}
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
                iteration = float(entry["iteration"])
                if entry.get("loss") is not None:
                    loss[iteration] = float(entry["loss"])
                exact = entry.get("validation", {}).get("exact match")
                if exact is not None:
                    exact_match[iteration] = float(exact)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{file}, line {number}: not a line of metrics ({error})"
                ) from None
        loss = {iteration: value for iteration, value in loss.items() if math.isfinite(value)}
        if not loss:
            raise ValueError(f"{file}: no training loss in this file")
        if offset:
            curves.stages.append(offset)
        curves.loss += [(offset + i, value) for i, value in sorted(loss.items())]
        curves.exact_match += [(offset + i, value) for i, value in sorted(exact_match.items())]
        offset += max(loss)
    return curves


def smooth(points: Sequence[Point]) -> list[Point]:
    """An exponential moving average, corrected for its start as Adam's moments are."""
    average, weight, smoothed = 0.0, 0.0, []
    for iteration, value in points:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append((iteration, average / weight))
    return smoothed


def nice_ticks(highest: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least `highest`, about `count` steps."""
    rough = max(highest, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def draw(curves: Curves, title: str) -> str:
    """The SVG of the curves."""
    x_ticks = nice_ticks(curves.loss[-1][0])
    loss_ticks = nice_ticks(max(value for _, value in curves.loss))
    match_ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    last = curves.loss[-1][0]
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(iteration: float) -> float:
        return LEFT + inner_width * iteration / last

    def y(value: float, ticks: Sequence[float]) -> float:
        return TOP + inner_height * (1 - value / ticks[-1])

    def path(points: Sequence[Point], ticks: Sequence[float]) -> str:
        return "M" + "L".join(f"{x(i):.1f},{y(value, ticks):.1f}" for i, value in points)

    bottom, right = TOP + inner_height, LEFT + inner_width
    parts = [f'<text class="title" x="{LEFT}" y="20">{html.escape(title)}</text>']
    for tick in loss_ticks:
        height = y(tick, loss_ticks)
        parts.append(f'<path class="grid" d="M{LEFT},{height:.1f}H{right}"/>')
        parts.append(_text(LEFT - 8, height + 4, f"{tick:g}", "end"))
    parts += [
        _text(x(tick), bottom + 18, f"{tick:,.0f}", "middle") for tick in x_ticks if tick <= last
    ]
    parts += [
        f'<path class="stage" d="M{x(begin):.1f},{TOP}V{bottom}"/>' for begin in curves.stages
    ]
    # Each stage has a line of its own, since the loss jumps where the samples change.
    for start, end in itertools.pairwise([0.0, *curves.stages, last]):
        stage = [(i, value) for i, value in curves.loss if start < i <= end]
        parts.append(f'<path class="raw" d="{path(stage, loss_ticks)}"/>')
        parts.append(f'<path class="loss" d="{path(smooth(stage), loss_ticks)}"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 10, "iteration", "middle"))
    middle = TOP + inner_height / 2
    parts.append(_text(16, middle, "training loss", "middle", turn=-90))
    legend = [("loss", "training loss (smoothed)")]
    if curves.exact_match:
        legend.append(("match", "exact match, held out"))
        parts += [
            _text(right + 8, y(tick, match_ticks) + 4, f"{100 * tick:.0f} %", "start")
            for tick in match_ticks
        ]
        parts.append(_text(WIDTH - 12, middle, "exact match, held out", "middle", turn=90))
        parts.append(f'<path class="match" d="{path(curves.exact_match, match_ticks)}"/>')
        parts += [
            f'<circle class="dot" cx="{x(i):.1f}" cy="{y(value, match_ticks):.1f}" r="3.5">'
            f"<title>iteration {i:.0f}: {100 * value:.1f} %</title></circle>"
            for i, value in curves.exact_match
        ]
    for number, (name, label) in enumerate(legend):
        start = right - 190 * (len(legend) - number)
        parts.append(f'<path class="{name}" d="M{start},{TOP - 12}h22"/>')
        parts.append(_text(start + 28, TOP - 8, label, "start"))
    return _SVG.format(width=WIDTH, height=HEIGHT, title=html.escape(title), body="\n".join(parts))


def _text(x: float, y: float, text: str, anchor: str, turn: int = 0) -> str:
    rotation = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rotation}>{text}</text>'


_SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"
 aria-label="{title}">
<style>
svg {{ --ground: #ffffff; --ink: #3b3f46; --grid: #e3e5e8; --loss: #1f6fd1; --match: #c2570c; }}
@media (prefers-color-scheme: dark) {{
svg {{ --ground: #0d1117; --ink: #c4cad2; --grid: #2b313a; --loss: #6cb0ff; --match: #ffa657; }}
}}
text {{ font: 12px system-ui, sans-serif; fill: var(--ink); }}
.title {{ font-size: 15px; font-weight: 600; }}
path {{ fill: none; stroke-linejoin: round; }}
.grid {{ stroke: var(--grid); }}
.stage {{ stroke: var(--ink); stroke-dasharray: 4 4; opacity: .6; }}
.raw {{ stroke: var(--loss); opacity: .25; }} .loss {{ stroke: var(--loss); stroke-width: 2; }}
.match {{ stroke: var(--match); stroke-width: 2; }}
.dot {{ fill: var(--match); stroke: var(--ground); stroke-width: 1.5; }}
</style>
<rect width="100%" height="100%" fill="var(--ground)"/>
{body}
</svg>
"""


if __name__ == "__main__":
    main()
