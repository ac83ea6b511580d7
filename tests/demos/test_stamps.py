"""The pretrained demo's data, from a small made-up package of stamps."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
from PIL import Image

from demos.animals.stamps import AGREE, DIFFER
from demos.animals.tuxpaint import INSTALLED, open_stamps, read_animals
from tests.helpers.commands import run_command

ANIMALS = ("ant", "bear", "cat", "dog", "eel", "fox")


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """Six animals with names, half of them with calls; a second bear, a sea lion, a toy."""
    root = tmp_path_factory.mktemp("stamps")
    folder = root / INSTALLED / "animals" / "mammals"
    (folder / "cartoon").mkdir(parents=True)
    for number, name in enumerate(ANIMALS):
        write_stamp(folder, name, f"A {name}.", (40 * number, 0, 0, 255))
        write_sound(folder / f"{name}_desc.ogg", 0.5 + number / 10)
        write_sound(folder / f"{name}_desc_fr.ogg", 0.5)
        if number % 2:
            write_sound(folder / f"{name}.ogg", 9.0)
    write_stamp(folder, "bear-2", "A European bear (a big one).", (9, 9, 9, 255))
    write_stamp(folder, "sea_lion", "A sea lion.", (9, 9, 9, 255))
    write_stamp(folder / "cartoon", "cat-2", "A happy cat!", (9, 9, 9, 255))
    return root


def write_stamp(folder, stem, caption, colour):
    Image.new("RGBA", (60, 30), colour).save(folder / f"{stem}.png")
    (folder / f"{stem}.txt").write_text(f"{caption}\nfr.utf8=Autre chose.\n", encoding="utf-8")


def write_sound(path, seconds):
    sound = 0.1 * np.sin(np.arange(round(seconds * 44_100)) / 20)
    soundfile.write(path, sound, 44_100, format="OGG")


@pytest.fixture(scope="module")
def prepared(stamps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "data"
    flags = ("--stamps", str(stamps), "--samples", "300")
    done = run_command("prepare_data.py", "stamps", "--output", str(folder), *flags)
    assert done.returncode == 0, done.stderr
    return folder


def records(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_animals_with_a_picture_and_a_name(stamps):
    animals = read_animals(stamps / INSTALLED)
    assert tuple(animal.name for animal in animals) == ANIMALS
    assert [animal.phrase for animal in animals[:2]] == ["an ant", "a bear"]
    assert [len(animal.pictures) for animal in animals] == [1, 2, 1, 1, 1, 1]
    assert [animal.call is not None for animal in animals] == [False, True] * 3


def test_held_out_animals_are_named_and_never_compared(prepared):
    train = records(prepared, "train")
    compared = {r["group"] for r in train if r["kind"] == "compare"}
    held_out = {r["group"] for r in records(prepared, "heldout")}
    assert held_out == {"ant", "dog"}
    assert compared == set(ANIMALS) - held_out
    heard = {f for r in train if r["kind"] == "compare" for f in r["audios"]}
    assert heard == {f"audios/{name}-name.flac" for name in compared}
    for kind in ("see", "hear"):
        assert {r["group"] for r in train if r["kind"] == kind} == set(ANIMALS)


def test_further_pictures_are_held_out_from_everything_else(prepared):
    further = {f for r in records(prepared, "heldout_pictures") for f in r["images"]}
    assert further == {"images/bear-1.png"}
    for split in ("train", "heldout", "see_seen"):
        assert not further & {f for r in records(prepared, split) for f in r.get("images", ())}


@pytest.mark.parametrize("split", ["heldout", "compare_seen"])
def test_half_of_the_comparisons_agree(prepared, split):
    comparisons = records(prepared, split)
    assert [r["ending"] for r in comparisons].count(AGREE) * 2 == len(comparisons)
    for record in comparisons:
        seen, heard = record["images"][0], record["audios"][0]
        same = seen.split("/")[1].split("-")[0] == heard.split("/")[1].split("-")[0]
        answer = record["conversations"][1]["value"]
        assert record["ending"] == (AGREE if same else DIFFER)
        assert answer.endswith(record["ending"])
        assert record["chance"] == 0.5


def test_files_are_on_white_and_at_most_eight_seconds(prepared):
    picture = Image.open(prepared / "images" / "bear-0.png")
    assert (picture.size, picture.mode) == ((224, 224), "RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255)
    assert picture.getpixel((112, 112)) == (40, 0, 0)
    call = soundfile.info(prepared / "audios" / "bear-call.flac")
    assert (call.samplerate, call.duration) == (16_000, 8.0)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not on this machine")
def test_a_package_is_unpacked_and_fetched_when_none_is_named(stamps, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    shutil.copytree(stamps, tree)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: tuxpaint-stamps-default\nVersion: 1\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: stamps\n"
    )
    package = tmp_path / "tuxpaint-stamps-default_1_all.deb"
    subprocess.run(["dpkg-deb", "-b", tree, package], check=True, capture_output=True)
    with open_stamps(package) as folder:
        assert len(read_animals(folder)) == len(ANIMALS)
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "apt-get").write_text(f"#!/bin/sh\n[ $1 = download ] && cp {package} .\n")
    (commands / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    monkeypatch.setattr("demos.animals.tuxpaint.SYSTEM", tmp_path)
    with open_stamps(None) as folder:
        assert len(read_animals(folder)) == len(ANIMALS)
    shutil.copytree(tree / "usr", tmp_path / "usr")
    with open_stamps(None) as folder:
        assert folder == tmp_path / INSTALLED


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "no such folder or file"),
        ("empty", "it should hold the folder animals"),
        ("not_a.deb", "name the .deb"),
        ("silent", "no animal with a picture"),
    ],
)
def test_wrong_stamps(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "not_a.deb").write_text("no package")
    (tmp_path / "silent" / "animals").mkdir(parents=True)
    flags = ("--output", str(tmp_path / "out"), "--stamps", str(tmp_path / path))
    done = run_command("prepare_data.py", "stamps", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_tools_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("demos.animals.tuxpaint.SYSTEM", tmp_path)
    with (
        pytest.raises(ValueError, match=r"apt-get is not on this machine; get .* with --stamps"),
        open_stamps(None),
    ):
        pass
