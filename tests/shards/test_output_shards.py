"""Shards of answers aloud: written, read, shown, packed, trained on, and gone on with."""

import json
import tarfile

import pytest

from examples.mimo.configs import get_model_config, with_codec_folder
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.data.turns import FilesInside
from examples.mimo.shards.manifest import Entry, read_entries, read_record, tar_samples
from examples.mimo.shards.show import inspect_shards, render_page
from examples.mimo.shards.write import checked_parts
from tests.helpers import outputs
from tests.helpers.commands import TP2, launch_command, run_command, run_train

pytest.importorskip("megatron.energon")
from examples.mimo.shards.read import part_finder

PROVIDER = ("--model-provider", outputs.SPEECH)
NUM_SAMPLES = 24


@pytest.fixture(scope="module")
def aloud(data_folder, tmp_path_factory):
    """A data folder, two of whose lines name files that the codec cannot read."""
    folder = tmp_path_factory.mktemp("aloud")
    outputs.write_data(folder, NUM_SAMPLES)
    (folder / "tokenizer.model").write_bytes((data_folder / "tokenizer.model").read_bytes())
    (folder / "noise.wav").write_bytes(b"RIFF")
    wrong = [
        {**outputs.record(n), "speech": [f"{name}.wav"]} for n, name in ((90, "noise"), (91, "no"))
    ]
    with (folder / "train.jsonl").open("a") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in wrong)
    return folder


@pytest.fixture(scope="module")
def shards(aloud, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "out"
    flags = ("--manifest", str(aloud / "train.jsonl"), "--output", str(output))
    done = launch_command("prepare_data.py", "webdataset", *PROVIDER, *flags, "--splits", "train=1")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def reader(shards, tokenizer):
    config = with_codec_folder(get_model_config(outputs.SPEECH), shards)
    return SampleEncoder(config, tokenizer, 256)


def test_shards_give_the_tokens_of_the_manifest(aloud, shards, reader):
    """And hold the codec, the files of the answers, and no codes."""
    assert (shards / "codecs/speech/scale.json").read_text() == '{"scale": 0.5}'
    (tar,) = shards.glob("*.tar")
    found = {parts.key: parts for parts in tar_samples(tar)}
    assert len(found) == NUM_SAMPLES
    for number in range(NUM_SAMPLES):
        parts = found[f"k{number}"]
        record = parts.record(reader.config)
        assert record["speech"] == ["speech.0.wav"]
        assert parts("speech.0.wav").data == (aloud / f"{number}.wav").read_bytes()
        expected = reader.encode(outputs.record(number), FilesInside(aloud))
        assert reader.encode(record, parts).tokens == expected.tokens


def test_answers_that_the_codec_cannot_read_are_refused(shards):
    lines = (shards / "rejected.jsonl").read_text().splitlines()
    reasons = {row["key"]: row["reason"] for row in map(json.loads, lines)}
    assert set(reasons) == {"k90", "k91"}
    assert "noise.wav: " in reasons["k90"]
    assert "no.wav: no such file" in reasons["k91"]


def test_shards_are_prepared_from_shards(shards, reader, tmp_path):
    flags = ("--manifest", str(shards), "--output", str(tmp_path / "again"))
    done = run_command("prepare_data.py", "webdataset", *PROVIDER, *flags, "--splits", "train=1")
    assert done.returncode == 0, done.stderr
    entries = read_entries(tmp_path / "again", tmp_path, reader.config)
    with tarfile.open(next(shards.glob("*.tar"))) as tar:
        assert sum(1 for _ in entries) == len([n for n in tar.getnames() if n.endswith(".json")])
    assert (tmp_path / "again/codecs/speech/scale.json").is_file()


def test_sound_goes_in_and_out_of_one_list(aloud, tokenizer, tmp_path):
    """The files of a question and of its answer, in the order of their places."""
    outputs.write_codec(tmp_path, "audios")
    spoken = with_codec_folder(outputs.with_spoken_audios(), tmp_path)
    turns = [{"from": "human", "value": "<audio>?"}, {"from": "gpt", "value": "<audio>"}]
    record = {"key": "a", "audios": ["1.wav", "3.wav"], "conversations": turns}
    parts = checked_parts(Entry("line 1", record, FilesInside(aloud)), spoken)
    assert json.loads(parts["json"])["audios"] == ["audios.0.wav", "audios.1.wav"]
    encoder = SampleEncoder(spoken, tokenizer, 256)
    again = encoder.encode(read_record("a", parts, spoken), part_finder("a", parts))
    assert again.tokens == encoder.encode(record, FilesInside(aloud)).tokens
    assert (again.sources, again.outputs) == (
        {"audios": ["a.audios.0.wav"]},
        {"audios": ["a.audios.1.wav"]},
    )


def test_a_folder_without_the_codec_is_one_line(shards, aloud, tmp_path):
    (tmp_path / "a.jsonl").write_text((aloud / "train.jsonl").read_text())
    flags = ("--manifest", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"))
    done = run_command("prepare_data.py", "webdataset", *PROVIDER, *flags)
    assert done.returncode == 2
    assert f"{tmp_path}/codecs/speech/scale.json: no such file, but speech need it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_page_shows_codes_as_one_run_and_plays_them(shards, reader):
    statistics, shown = inspect_shards(shards, reader, limit=50, num_shown=20)
    text = "\n".join(statistics.lines())
    assert "speech in answers 24: " in text
    # A frame is two codes, and the answers have 1 to 5 frames.
    assert set(statistics.outputs["speech"]) == {f"{2 * n} codes" for n in range(1, 6)}
    page = render_page(shards, statistics, shown, reader)
    assert page.count('<audio controls src="data:audio/flac;base64,') == 20
    speech = reader.config.outputs["speech"]
    for sample in shown:
        ids = [t for t in sample.sample.tokens.ids if t in speech.ids][1:-1]
        codes = " ".join(str(token - speech.first_id) for token in ids)
        assert f'target">&lt;speech&gt; {codes}</span>' in page


def test_codes_that_cannot_be_shown_are_one_line(shards, reader, monkeypatch):
    def fails(self, codes):
        raise IndexError("no such level")

    monkeypatch.setattr(outputs.LevelCodec, "decode", fails)
    expected = r"^sample k\d+, speech, decoded: IndexError: no such level$"
    with pytest.raises(ValueError, match=expected):
        inspect_shards(shards, reader, limit=50, num_shown=20)


def train(shards, work, *more, processes=1):
    """Iteration -> loss of a run that goes on where the folder `work` left off."""
    checkpoint = str(work / "checkpoint")
    done = run_train(
        *(*PROVIDER, "--dataset-provider", "energon", "--data-path", str(shards)),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--seed", "5", "--lr", "1e-3"),
        *("--save", checkpoint, "--load", checkpoint, "--train-iters", "6"),
        *("--metrics-file", str(work / "metrics.jsonl"), *more),
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    return {row["iteration"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize(
    "more",
    [(), ("--packing-buffer-size", "8", "--micro-batch-size", "1", "--global-batch-size", "2")],
    ids=["padded", "packed"],
)
def test_a_run_goes_on_from_its_place_in_the_shards(shards, tmp_path, more):
    for name in ("whole", "half"):
        (tmp_path / name).mkdir()
    whole = train(shards, tmp_path / "whole", *more)
    train(shards, tmp_path / "half", *more, "--exit-interval", "3")
    again = train(shards, tmp_path / "half", *more, *TP2, processes=2)
    assert len(set(whole.values())) == 6
    assert again == pytest.approx(whole, rel=1e-5)
    assert (tmp_path / "half/checkpoint/codecs/speech/scale.json").is_file()
