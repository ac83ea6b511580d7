"""The curves that benchmarks/loss_curve.py draws from a run's metrics."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from benchmarks.loss_curve import draw, nice_ticks, read_curves, smooth
from tests.helpers.commands import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def write_metrics(file, losses, exact_match=()):
    lines = [{"iteration": i, "loss": loss, "keys": []} for i, loss in enumerate(losses, start=1)]
    lines += [
        {"iteration": i, "validation": {"lm loss": 1.0, "exact match": m}} for i, m in exact_match
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def stages(tmp_path):
    first = write_metrics(tmp_path / "align.jsonl", [5.0, 4.0, 3.0])
    second = write_metrics(tmp_path / "train.jsonl", [2.0, 1.0], [(1, 0.25), (2, 0.5)])
    return first, second


def test_stages_follow_one_another(stages):
    curves = read_curves(stages)
    assert curves.loss == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (5, 1.0)]
    assert curves.exact_match == [(4, 0.25), (5, 0.5)]
    assert curves.stages == [3]


def test_an_iteration_that_was_trained_again_counts_once(tmp_path):
    file = write_metrics(tmp_path / "m.jsonl", [5.0, 4.0, 3.0])
    with file.open("a") as lines:
        lines.write('{"iteration": 2, "loss": 4.5}\n{"iteration": 3, "loss": null}\n')
    assert read_curves([file]).loss == [(1, 5.0), (2, 4.5), (3, 3.0)]


def test_the_svg_has_both_series_with_labelled_axes(stages):
    root = ElementTree.fromstring(draw(read_curves(stages), "Digits & <questions>"))
    paths = [(path.get("class"), path.get("d")) for path in root.iter(f"{SVG}path")]
    raw = [d.removeprefix("M").split("L") for kind, d in paths if kind == "raw"]
    assert list(map(len, raw)) == [3, 2]
    assert {"grid", "stage", "loss", "match"} <= {kind for kind, _ in paths}
    assert len(list(root.iter(f"{SVG}circle"))) == 2
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"Digits & <questions>", "iteration", "training loss", "100 %"} <= set(texts)
    x = [float(point.split(",")[0]) for stage in raw for point in stage]
    assert x == sorted(x)
    assert 64 <= x[0] < x[-1] <= 760 - 64


def test_without_validation_there_is_no_second_axis(tmp_path):
    svg = draw(read_curves([write_metrics(tmp_path / "m.jsonl", [2.0, 1.0])]), "x")
    assert "exact match" not in svg


@pytest.mark.parametrize("highest", [0.003, 0.9, 1.0, 6.2, 1150, 1750])
def test_ticks_are_round_and_reach_the_highest_value(highest):
    ticks = nice_ticks(highest)
    assert ticks[0] == 0
    assert ticks[-2] < highest <= ticks[-1] * (1 + 1e-9)
    assert 3 <= len(ticks) <= 7


def test_smoothing_keeps_a_constant_and_the_first_value():
    assert [value for _, value in smooth([(i, 3.0) for i in range(9)])] == pytest.approx([3.0] * 9)
    assert smooth([(1, 7.0), (2, 0.0)])[0] == (1, pytest.approx(7.0))


def test_the_command(stages, tmp_path):
    script = str(ROOT / "benchmarks/loss_curve.py")
    command = [sys.executable, script, *map(str, stages), "--output", str(tmp_path / "curve.svg")]
    subprocess.run(command, check=True, timeout=60)
    ElementTree.parse(tmp_path / "curve.svg")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    command = [sys.executable, script, str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "bad.jsonl, line 1: not a line of metrics" in done.stderr
    assert done.stderr.count("\n") == 1
