"""The demo that draws the number it hears: its codec, its data, and what training them gives."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from demos.drawing import score
from demos.drawing.data import MODEL, write_drawings
from demos.drawing.model import drawing_lm
from examples.mimo.configs import get_model_config, with_codec_folder
from examples.mimo.data.batch import read_records
from examples.mimo.modalities.codebook import Codebook
from examples.mimo.modalities.files import Blob
from tests.helpers.commands import ROOT, TP2, run_command, run_train

PROVIDER = ("--model-provider", MODEL)


def write(root, seed=0):
    write_drawings(root, seed, samples=120, voices=6)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("drawings"))


@pytest.fixture(scope="module")
def codec(folder):
    return with_codec_folder(drawing_lm(), folder).outputs["drawings"].codec


def files_of(folder, split="heldout"):
    return sorted((folder / "drawings" / split).glob("*.png"))


def error_of(call, *arguments):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        call(*arguments)
    return str(error.value)


def test_a_picture_is_sixteen_codes_that_stay_the_same(folder, codec, tmp_path):
    used = set()
    for file in files_of(folder):
        drawing = codec.read(file)
        codes = codec.encode(drawing)
        assert len(codes) == codec.unit == 16
        used |= {*codes}
        decoded = codec.decode(codes)
        assert codec.encode(decoded) == codes
        codec.save(decoded, tmp_path / "again.png")
        again = codec.read(tmp_path / "again.png")
        # Half a step of 256 greys.
        np.testing.assert_allclose(again, decoded, atol=0.5001 / 255)
        assert codec.encode(again) == codes
        assert np.abs(decoded - drawing).mean() < 0.1
    assert used <= {*range(64)}
    assert len(used) > 50


def test_patches_lie_where_they_were(codec):
    """Patch 1 is to the right of patch 0, and patch 4 below it."""
    ink = np.arange(64).reshape(8, 8)
    assert codec.patches(ink)[[0, 1, 4]].tolist() == [
        [0, 1, 8, 9],
        [2, 3, 10, 11],
        [16, 17, 24, 25],
    ]
    centroids = codec.centroids()
    decoded = codec.decode([7, *range(15)])
    assert decoded[:2, :2].ravel().tolist() == centroids[7].tolist()
    assert decoded[2:4, 0:2].ravel().tolist() == centroids[3].tolist()


def test_pictures_of_any_size_and_on_any_background_are_read(codec):
    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("L", 255), ("RGB", (255, 255, 255))):
        picture = Image.new(mode, (30, 17), colour)
        picture.save(file := Path(codec.folder) / "blank.png")
        assert codec.read(file).max() == 0
        assert len(set(codec.encode(codec.read(file)))) == 1
        file.unlink()


def test_wrong_files_and_codes_are_one_line(folder, codec, tmp_path):
    assert "no such image" in error_of(codec.read, tmp_path / "none.png")
    assert "not an image" in error_of(codec.read, Blob("note.png", b"This is text."))
    whole = files_of(folder)[0].read_bytes()
    assert "half.png: damaged image" in error_of(codec.read, Blob("half.png", whole[:60]))
    assert "unknown file extension: .txt" in error_of(
        codec.save, np.zeros((8, 8)), tmp_path / "a.txt"
    )
    assert "15 codes, but an output is whole units of 16" in error_of(codec.decode, [0] * 15)
    assert "32 codes, but 16 are all that fit" in error_of(codec.decode, [0] * 32)
    assert "code 64 at position 2, but 0 to 63 may" in error_of(codec.decode, [0, 0, 64, *[0] * 13])
    lost = dataclasses.replace(codec, folder=str(tmp_path))
    assert (
        error_of(lost.decode, [0] * 16)
        == f"{tmp_path}/patches.safetensors: no such codebook; learn one first"
    )
    Codebook(np.zeros((64, 5))).write(tmp_path / "patches.safetensors")
    assert "F32 64 x 5, " in error_of(lost.decode, [0] * 16)


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def test_one_seed_writes_the_same_files(folder, tmp_path):
    script = (
        "from pathlib import Path\nfrom tests.demos.test_drawing import digests, write\n"
        "import json, sys\nprint(json.dumps(digests(write(Path(sys.argv[1]), int(sys.argv[2])))))"
    )
    written = []
    for seed in (0, 1):
        # One process, one synthesiser: its breath goes on from where the last call left it.
        (root := tmp_path / str(seed)).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", script, str(root), str(seed)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        written.append(json.loads(done.stdout.splitlines()[-1]))
    first = digests(folder)
    assert written[0] == first
    assert written[1].keys() != first.keys() or written[1] != first
    changed = {name for name in first if written[1].get(name) != first[name]}
    assert {"train.jsonl", "heldout.jsonl"} <= changed
    assert not any(name.startswith(("drawings/", "codecs/")) for name in changed)


def test_no_picture_and_no_voice_is_in_both_splits(folder):
    records = {
        name: read_records(folder / f"{name}.jsonl") for name in ("align", "train", "heldout")
    }
    assert [len(lines) for lines in records.values()] == [60, 120, 40]
    names = {}
    for split in ("train", "heldout"):
        lines = records[split] + (records["align"] if split == "train" else [])
        drawings = {Path(file).name for line in lines for file in line.get("drawings", [])}
        voices = {file.split("-")[1] for line in lines for file in line["audios"]}
        names[split] = drawings, voices
        for line in lines:
            for file in [*line["audios"], *line.get("drawings", [])]:
                assert file.split("/")[1] == split
                assert (folder / file).is_file()
    assert not names["train"][0] & names["heldout"][0]
    assert not names["train"][1] & names["heldout"][1]
    assert (len(names["train"][1]), len(names["heldout"][1])) == (4, 2)


def test_pictures_and_recordings_are_of_the_digit(folder):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for line in read_records(folder / "train.jsonl"):
        (file,) = line["drawings"]
        assert digits.target[int(Path(file).stem)] == line["digit"]
        assert all(Path(file).name[0] == str(line["digit"]) for file in line["audios"])
        assert line["conversations"][1]["value"] == f"{score.NUMBERS[line['digit']]} <drawing>"
    window = get_model_config(MODEL).inputs["audios"].encoder.window_seconds
    for file in (folder / "audios").rglob("*.flac"):
        assert soundfile.info(file).duration <= window


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """So little training that it draws something, whatever that is."""
    work = tmp_path_factory.mktemp("trained")
    done = run_train(
        *(*PROVIDER, *TP2, "--dataset-provider", "conversations", "--data-path", str(folder)),
        *("--micro-batch-size", "8", "--global-batch-size", "8", "--pack-sequences"),
        *("--train-iters", "40", "--lr", "2e-3", "--init-method-std", "0.06"),
        *("--save", str(work / "checkpoint"), "--metrics-file", str(work / "metrics.jsonl")),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    return work / "checkpoint"


def test_it_draws_and_its_drawings_are_scored(trained, folder, tmp_path):
    flags = ("--ckpt", str(trained), "--audio-path", str(next(folder.glob("audios/heldout/*"))))
    file = tmp_path / "drawn.png"
    done = run_command("avlm_inference.py", *flags, "--drawing-out", str(file), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outputs"] == {"drawings": [str(file)]}
    with Image.open(file) as picture:
        assert (picture.size, picture.mode) == ((64, 64), "L")
    done = run_command("avlm_inference.py", *flags, "--drawing-out", str(tmp_path / "a.txt"))
    assert done.returncode == 2
    assert f"--drawing-out {tmp_path}/a.txt: unknown file extension: .txt" in done.stderr
    assert done.stderr.count("\n") == 1
    sheet = tmp_path / "sheet.png"
    script = [sys.executable, "-m", "demos.drawing.score", "--ckpt", str(trained)]
    done = subprocess.run(
        [*script, "--data", str(folder), "--samples", "20", "--sheet", str(sheet)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores["real pictures recognised"] > 0.95
    assert scores["real pictures through the codec recognised"] > 0.95
    for name in ("greedy", "temperature 1"):
        assert scores[name]["drawings"] <= 20
        assert 0 <= scores[name]["recognised"] <= 1
    with Image.open(sheet) as picture:
        assert picture.width > picture.height > 10 * 8


def test_real_pictures_score_as_drawings(folder, codec):
    """The score of drawings that are right, and of those that are of the next digit."""

    class Copyist:
        """Draws held-out pictures, of a digit that may be another one."""

        def __init__(self, shift):
            self.shift = shift
            self.config = with_codec_folder(drawing_lm(), folder)

        def generate(self, prompts, audios, outputs, temperature):
            assert len(prompts) == len(audios) == 40
            files = {line["digit"]: line["drawings"][0] for line in read_records(HELDOUT)}
            answers = []
            for (audio,) in audios:
                digit = (int(audio.name[0]) + self.shift) % 10
                drawing = codec.decode(codec.encode(codec.read(folder / files[digit])))
                answers.append(Answer(score.NUMBERS[digit] + " ", [drawing]))
            return answers

    @dataclasses.dataclass
    class Answer:
        text: str
        drawings: list

    HELDOUT = folder / "heldout.jsonl"  # noqa: N806
    records = read_records(HELDOUT)
    right, _ = score.score(Copyist(0), folder, records)
    wrong, _ = score.score(Copyist(1), folder, records)
    assert right["greedy"]["recognised"] > 0.9 > 0.1 > wrong["greedy"]["recognised"]
    assert (right["greedy"]["named"], wrong["greedy"]["named"]) == (1, 0)
    assert right["greedy"]["different"] == 10
    assert right["greedy"]["copies of training pictures"] == 0


def page():
    return (ROOT / "docs/outputs.md").read_text()


def test_the_page_shows_the_codec_as_it_is():
    code = (ROOT / "demos/drawing/codec.py").read_text()
    assert f"```python\n{code}```" in page()
    (stated,) = re.findall(r"`demos/drawing/codec\.py`[^.]* (\d+) lines", page())
    assert int(stated) == len(code.splitlines())
    model = (ROOT / "demos/drawing/model.py").read_text()
    (entry,) = re.findall(r"```python\n(drawings = ModalityConfig\(.*?)```", page(), re.DOTALL)
    assert entry.strip() in model


def test_the_places_that_the_page_counts():
    """What it says of files is so, and the package knows nothing of drawings."""
    rows = re.findall(r"^\| \[`(demos/drawing/\w+\.py)`\].* \| (\d+) \|", page(), re.MULTILINE)
    assert [name for name, _ in rows] == ["demos/drawing/codec.py", "demos/drawing/model.py"]
    for name, count in rows:
        assert int(count) == len((ROOT / name).read_text().splitlines())
    for file in (ROOT / "examples/mimo").rglob("*.py"):
        assert not re.search(r"drawing_lm|DrawingCodec|<drawing>|demos.drawing", file.read_text())


@pytest.mark.slow
def test_the_demo_draws_what_is_asked_for(tmp_path):
    """On voices it never heard, as well as the page says."""
    done = subprocess.run(
        ["bash", "demos/drawing/run.sh"],
        cwd=ROOT,
        env={
            **os.environ,
            "DEMO_DIR": str(tmp_path / "demo"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(re.search(r"^\{.*?^\}", done.stdout, re.MULTILINE | re.DOTALL)[0])
    for name, least in {"greedy": 0.9, "temperature 1": 0.75}.items():
        assert scores[name]["drawings"] == 400
        assert scores[name]["recognised"] >= least
    assert scores["temperature 1"]["different"] > 300
    assert (tmp_path / "demo/seven.png").is_file()
    assert (tmp_path / "demo/drawings.png").is_file()
