"""From a manifest to shards: checked, split, whole, and the same after a kill."""

import collections
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from examples.mimo.checkpoint.description import DatasetModel
from examples.mimo.configs import get_model_config
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.data.turns import FilesInside
from examples.mimo.shards.manifest import Entry, read_record
from examples.mimo.shards.write import Item, Shard, WriteOptions, prepare_shards, split_of
from tests.helpers import broken
from tests.helpers.commands import ROOT, run_command
from tests.helpers.megatron_example import write_megatron_example

pytest.importorskip("megatron.energon")
from examples.mimo.shards.read import part_finder
from examples.mimo.shards.show import inspect_shards


def options(manifest, output, **fields):
    chosen = {"splits": {"train": 0.9, "val": 0.1}, "shard_bytes": 10**6, "shard_samples": 40}
    chosen |= {"media": manifest if manifest.is_dir() else manifest.parent, "num_workers": 2}
    return WriteOptions(manifest=manifest, output=output, **(chosen | fields))


def samples(folder):
    """Key -> part -> content, and the split of each key."""
    result, splits = collections.defaultdict(dict), {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                key, _, part = member.name.partition(".")
                result[key][part] = members.extractfile(member).read()
                splits[key] = tar.name.rpartition("-")[0]
    return dict(result), splits


def rejected(folder):
    lines = (folder / "rejected.jsonl").read_text().splitlines()
    return {row["key"] or row["place"]: row["reason"] for row in map(json.loads, lines)}


def test_links_that_lead_to_themselves_and_lines_of_many_files(tmp_path, tiny):
    """Each is refused by its line, before a file is looked for; the others are kept."""
    (tmp_path / "good.png").write_bytes(broken.picture())
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "out-of-one").symlink_to("into-the-other")
    (tmp_path / "into-the-other").symlink_to("out-of-one")
    many = 100_000
    part = {"type": "image", "image": "good.png"}
    asked = [
        *((f"good-{number}", ["good.png"], broken.SEE) for number in range(6)),
        ("loop", ["loop.png"], broken.SEE),
        ("loops", ["into-the-other/a.png"], broken.SEE),
        ("many", ["good.png"] * many, many * "<image>"),
        ("parts", None, [part] * many),
        ("long", ["x" * 5_000], broken.SEE),
    ]
    records = [
        {"key": key, "conversations": broken.turns(text)} | ({"images": files} if files else {})
        for key, files, text in asked
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare_shards(options(tmp_path / "m.jsonl", tmp_path / "out", splits={"train": 1.0}), tiny)
    assert list(samples(tmp_path / "out")[0]) == [f"good-{number}" for number in range(6)]
    reasons = rejected(tmp_path / "out")
    for key in ("loop", "loops"):
        assert "a link that leads back to itself" in reasons.pop(key)
    for place in ("line 9", "line 10"):
        assert reasons.pop(place) == "100,000 files in one sample, more than 4,096"
    assert reasons.pop("long").endswith("5,000 characters are no file's name")
    assert not reasons


def test_a_manifest_becomes_shards(data_folder, tiny, tmp_path):
    about = prepare_shards(options(data_folder / "train.jsonl", tmp_path / "out"), tiny)
    result, splits = samples(tmp_path / "out")
    records = list(map(json.loads, (data_folder / "train.jsonl").read_text().splitlines()))
    keys = [record["key"] for record in records]
    assert list(result) == sorted(keys, key=lambda key: splits[key])
    for record in records:
        parts = dict(result[record["key"]])
        written = json.loads(parts.pop("json"))
        assert written["conversations"] == record["conversations"]
        for name in ("images", "audios"):
            contents = [(data_folder / file).read_bytes() for file in record.get(name, [])]
            assert [parts.pop(part) for part in written.get(name, [])] == contents
        assert not parts
        assert splits[record["key"]] == split_of(record["key"], {"train": 0.9, "val": 0.1})
    counts = collections.Counter(splits.values())
    assert about["samples"] == counts
    assert 5 <= counts["val"] <= 40
    assert about["shards"] == len(list((tmp_path / "out").glob("*.tar"))) >= 5
    assert (tmp_path / "out/rejected.jsonl").read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_key_is_always_in_the_same_split():
    halves = {"train": 0.5, "val": 0.5}
    result = [split_of(f"key-{n}", halves) == "train" for n in range(8)]
    assert result == [False, False, True, False, False, True, False, True]
    shares = collections.Counter(split_of(str(n), {"a": 8, "b": 1, "c": 1}) for n in range(10_000))
    assert shares["a"] / 10_000 == pytest.approx(0.8, abs=0.02)
    assert shares["b"] / 10_000 == pytest.approx(0.1, abs=0.02)


# More than there are broken samples, or nothing would be written.
NUM_GOOD = 80


def write_broken(folder):
    for name, content in broken.GOOD.items():
        (folder / name).write_bytes(content)
    lines, expected = [], {}
    for number, (key, record, files, words) in enumerate(broken.cases(), start=1):
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if isinstance(record, bytes):
            expected[f"line {2 * number}"] = words
            lines += [b"", record]
        else:
            expected[key] = words
            lines += [b"", json.dumps({"key": key, **record}).encode()]
    good = {"images": ["good.png"], "audios": ["good.flac"]}
    for number in range(NUM_GOOD):
        record = {"key": f"good-{number}", **good, "conversations": broken.turns("<image><audio>")}
        lines.append(json.dumps(record).encode())
    lines.append(json.dumps({"key": "good-3", "conversations": broken.turns("again")}).encode())
    expected["good-3"] = "was used before"
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return expected


def test_sixty_broken_samples_are_refused_each_for_its_reason(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    expected = write_broken(tmp_path / "in")
    assert len(expected) >= 60
    about = prepare_shards(options(tmp_path / "in/manifest.jsonl", tmp_path / "out"), tiny)
    result, reasons = samples(tmp_path / "out")[0], rejected(tmp_path / "out")
    assert set(result) == {f"good-{number}" for number in range(NUM_GOOD)}
    assert about["rejected"] == len(reasons) == len(expected)
    for key, words in expected.items():
        assert re.search(words, reasons[key]), (key, reasons[key])
        assert "\n" not in reasons[key]


def test_a_manifest_without_a_usable_sample(tiny, tmp_path):
    (tmp_path / "m.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"no sample could be used; the first: conversations must"):
        prepare_shards(options(tmp_path / "m.jsonl", tmp_path / "out"), tiny)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.jsonl", "out.rejected.jsonl"]


def test_a_mostly_refused_manifest_is_an_error_that_names_the_reasons(tiny, tmp_path):
    lines = [{"key": f"good-{n}", "conversations": broken.turns("q")} for n in range(20)]
    missing = {"images": ["none.png"], "conversations": broken.turns("<image>")}
    lines += [{"key": f"missing-{n}", **missing} for n in range(12)]
    lines += [{"key": f"empty-{n}", "conversations": []} for n in range(8)]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    about = prepare_shards(options(manifest, tmp_path / "half"), tiny)
    assert about["rejected"] == 20
    lines.append({"key": "another", "conversations": []})
    manifest.write_text("\n".join(map(json.dumps, lines)))
    message = (
        r"tiny_avlm can use 20 samples of 41, less than half "
        r"\(12 x no such file; 9 x conversations must be a list .*choose another --model-provider"
    )
    with pytest.raises(ValueError, match=message):
        prepare_shards(options(manifest, tmp_path / "out"), tiny)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["half", "m.jsonl", "out.rejected.jsonl"]
    assert len((tmp_path / "out.rejected.jsonl").read_text().splitlines()) == 21


@pytest.fixture
def image_questions(tmp_path):
    """A data folder that says that it is for a model without sound; some samples have sound."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in broken.GOOD.items():
        (folder / name).write_bytes(content)
    see = {"images": ["good.png"], "conversations": broken.turns("<image>what?")}
    hear = {"audios": ["good.flac"], "conversations": broken.turns("<audio>what?")}
    lines = [{"key": f"{n}", **(hear if n % 4 == 3 else see)} for n in range(20)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    DatasetModel("llava_vlm").write(folder)
    return folder


def test_commands_know_the_model_from_the_folder(image_questions, data_folder, tmp_path):
    output = tmp_path / "out"
    flags = ("--manifest", str(image_questions / "train.jsonl"), "--output", str(output))
    flags += ("--splits", "train=1", "--tokenizer", str(data_folder / "tokenizer.model"))
    done = run_command("prepare_data.py", "webdataset", *flags)
    assert done.returncode == 0, done.stderr
    assert "train 15 samples for llava_vlm in 1 shards; 5 refused" in done.stderr
    assert set(rejected(output).values()) == {
        "holds audios, but llava_vlm takes images; choose another model or other data"
    }
    page = ("--html", str(tmp_path / "page.html"))
    shown = run_command("prepare_data.py", "show", str(output), *page)
    assert shown.returncode == 0, shown.stderr
    assert "15 samples as llava_vlm sees them" in shown.stderr
    tiny = ("--overwrite", "--model-provider", "tiny_avlm")
    done = run_command("prepare_data.py", "webdataset", *flags, *tiny)
    assert "train 20 samples for tiny_avlm in 1 shards\n" in done.stderr
    assert DatasetModel.read(output) == DatasetModel("tiny_avlm")


def test_fields_that_were_set_are_remembered(tmp_path):
    model = DatasetModel("tiny_avlm", ("audios.encoder.max_windows=4",))
    model.write(tmp_path)
    assert DatasetModel.read(tmp_path) == model


def test_a_folder_cannot_choose_code_to_import(tmp_path):
    DatasetModel("os:abort").write(tmp_path)
    with pytest.raises(ValueError, match=r"for os:abort, .* add --model-provider os:abort"):
        DatasetModel.read(tmp_path)
    (tmp_path / "about.json").write_text('{"model_provider": "tiny_avlm"}')
    with pytest.raises(ValueError, match=r"about\.json: damaged"):
        DatasetModel.read(tmp_path)
    (tmp_path / "about.json").write_text('{"title": "somebody else\'s"}')
    assert DatasetModel.read(tmp_path) is None
    assert DatasetModel.read(tmp_path / "none") is None


def test_a_llava_list_is_taken_as_it_is(tiny, tmp_path):
    (tmp_path / "a.png").write_bytes(broken.GOOD["good.png"])
    items = [
        {"id": "000/1.x", "image": "a.png", "conversations": broken.turns("<image>\nwhat?")},
        {"id": "000/1.x", "image": "a.png", "conversations": broken.turns("<image>\nwho?")},
        {"id": 7, "conversations": broken.turns("hello")},
    ]
    (tmp_path / "llava.json").write_text(json.dumps(items))
    about = prepare_shards(
        options(tmp_path / "llava.json", tmp_path / "out", splits={"train": 1.0}), tiny
    )
    result, _ = samples(tmp_path / "out")
    first, second, third = result
    assert third == "7"
    assert first != second
    for name, question in ((first, "what?"), (second, "who?")):
        assert re.fullmatch(r"000_1_x-[0-9a-f]{12}", name)
        record = json.loads(result[name]["json"])
        assert (record["key"], record["images"]) == ("000/1.x", ["images.0.png"])
        assert record["conversations"][0]["value"] == f"<image>\n{question}"
    assert about["rejected"] == 0


def a_part(kind, **fields):
    """A part as tables write it, in which every row has every column."""
    return {"type": kind, "text": None, "image": None, "image_url": None, "path": None} | fields


def test_shards_give_the_tokens_of_the_manifest_in_every_way_to_write_it(
    tiny, tokenizer, data_folder, tmp_path
):
    record = json.loads((data_folder / "train.jsonl").read_text().partition("\n")[0])
    image, audio = record["images"][0], record["audios"][0]
    words = a_part("text", text="What does <image> mean?")
    answer = broken.turns("q")[1]
    by_role = [{"role": "assistant", "content": answer["value"], "from": None, "value": None}]
    places = [a_part("image"), a_part("audio"), words]
    named = [
        a_part("image", image={"bytes": None, "path": image}),
        a_part("audio_url", audio_url={"url": audio, "detail": "high"}),
        words,
    ]
    mixed = [a_part("image", detail="high"), a_part("audio", path=audio), words]
    role = {"role": "user", "from": None, "value": None}
    lists = {"images": [image], "audios": [audio]}
    records = [
        {"conversations": None, "messages": [role | {"content": places}, *by_role], **lists},
        {"messages": [role | {"content": named}, *by_role], "images": None},
        {"id": None, "messages": [role | {"content": mixed}, *by_role], "images": [image]},
        {"conversations": [{"from": "human", "value": named}, answer], "audios": []},
    ]
    encoder = SampleEncoder(tiny, tokenizer, 999)
    expected = encoder.encode(records[0], FilesInside(data_folder))
    llava = {"image": image, "images": None, "audio": [audio], "audios": None}
    (tmp_path / "m.json").write_text(json.dumps([records[0] | llava]))
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, records)))
    for suffix, count in (("json", 1), ("jsonl", len(records))):
        manifest, output = tmp_path / f"m.{suffix}", tmp_path / suffix
        about = prepare_shards(
            options(manifest, output, media=data_folder, splits={"train": 1.0}), tiny
        )
        assert (about["samples"], about["rejected"]) == ({"train": count}, 0)
        # Prepared once more, from the shards.
        prepare_shards(options(output, tmp_path / f"{suffix}2", splits={"train": 1.0}), tiny)
        for folder in (output, tmp_path / f"{suffix}2"):
            result, _ = samples(folder)
            for key, parts in result.items():
                sample = encoder.encode(read_record(key, parts, tiny), part_finder(key, parts))
                assert sample.tokens == expected.tokens
                assert list(map(len, sample.media.values())) == [1, 1]
                # The names of the files as they were before are gone.
                assert image.encode() not in parts["json"]
            statistics, _ = inspect_shards(folder, encoder, limit=9, num_shown=9)
            assert sum(statistics.samples.values()) == count
            assert not statistics.refused


def test_keys_that_cannot_be_file_names_stay_apart(tiny, tmp_path):
    keys = ["a/b", "a_b", "a/b", "x" * 300 + "1", "x" * 300 + "2", "\udcff", 5, "5"]
    lines = [json.dumps({"key": key, "conversations": broken.turns("q")}) for key in keys]
    lines.insert(0, json.dumps({"key": "0", "conversations": broken.turns("q")}))
    lines.append('{"key": ' + "9" * 5_000 + "}")
    lines.append(json.dumps({"key": "t", "tags": ["x"], "conversations": broken.turns("q")}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    prepare_shards(options(tmp_path / "m.jsonl", tmp_path / "out", splits={"train": 1.0}), tiny)
    result, _ = samples(tmp_path / "out")
    kept = [json.loads(parts["json"])["key"] for parts in result.values()]
    assert kept == ["0", "a/b", "a_b", "x" * 300 + "1", "x" * 300 + "2", "5"]
    reasons = rejected(tmp_path / "out")
    assert "was used before" in reasons["a/b"]
    assert "was used before" in reasons["5"]
    assert "is not usable" in reasons["line 7"]
    assert "not JSON" in reasons["line 10"]
    assert "holds tags" in reasons["t"]


def test_another_model_checks_again(tiny, tmp_path):
    """What an interrupted run found is no longer true where the options differ."""
    entry = Entry("line 1", {"key": "a", "conversations": broken.turns("q")})
    shard = Shard("train-0.tar", [Item("a", entry)])
    other = dataclasses.replace(tiny, prompt="another")
    assert shard.digest(tiny) == shard.digest(tiny) != shard.digest(other)


@pytest.mark.parametrize("turned", [False, True])
def test_a_suffix_of_two_modalities_is_of_the_one_that_lists_it_first(turned):
    videos = get_model_config("video_llava_vlm").modalities["videos"]
    audios = get_model_config("llava_avlm").modalities["audios"]
    modalities = {"videos": videos, "audios": audios}
    if turned:
        modalities = dict(reversed(modalities.items()))
    config = dataclasses.replace(get_model_config("llava_avlm"), modalities=modalities)
    parts = dict.fromkeys(("mp4", "2.webm", "wav", "1.m4a"), b"")
    record = read_record("a", {**parts, "json": b"[]"}, config)
    assert record["videos"] == ["2.webm", "mp4"]
    assert record["audios"] == ["1.m4a", "wav"]


def test_shards_of_megatrons_example_are_taken_as_they_are(tiny, tmp_path):
    source = write_megatron_example(tmp_path / "in")
    about = prepare_shards(options(source, tmp_path / "out", splits={"train": 1.0}), tiny)
    result, _ = samples(tmp_path / "out")
    assert about["samples"] == {"train": 12}
    record = json.loads(result["s3_100"]["json"])
    assert record["audios"] == ["audios.0.flac", "audios.1.flac"]
    assert result["s3_100"]["images.0.img"] == broken.GOOD["good.png"]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(data_folder, tmp_path):
    flags = ["--manifest", str(data_folder / "train.jsonl"), "--shard-samples", "20"]
    whole = run_command("prepare_data.py", "webdataset", *flags, "--output", str(tmp_path / "a"))
    assert whole.returncode == 0, whole.stderr
    assert re.search(r"a: train 19\d, val \d+ samples for tiny_avlm in \d+ shards", whole.stderr)
    command = [sys.executable, str(ROOT / "examples/mimo/prepare_data.py"), "webdataset", *flags]
    command += ["--output", str(tmp_path / "b"), "--num-workers", "1"]
    draft = tmp_path / ".b.draft"
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and len(list(draft.glob(".summaries/*"))) < 3:
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b").exists()
    finished = {file.name: file.stat().st_mtime_ns for file in draft.glob("*.tar")}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(finished) >= 2
    for name, written in finished.items():
        assert (tmp_path / "b" / name).stat().st_mtime_ns == written
    names = sorted(file.name for file in (tmp_path / "a").glob("*.tar"))
    assert names == sorted(file.name for file in (tmp_path / "b").glob("*.tar"))
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--manifest", "none.jsonl"), "--manifest none.jsonl: no such file"),
        (("--manifest", "tests"), "no .tar files"),
        (("--manifest", "README.md", "--splits", "train"), "write NAME=SHARE"),
        (("--manifest", "README.md", "--splits", "train=-1"), "a share of 0 or more"),
        (("--manifest", "README.md", "--splits", "train=0"), "all shares are 0"),
        (("--manifest", "README.md", "--num-workers", "0"), "--num-workers 0: at least 1"),
        (("--manifest", "README.md", "--output", "tests"), "holds something else"),
    ],
)
def test_wrong_command_lines_end_with_one_line(tmp_path, flags, message):
    output = () if "--output" in flags else ("--output", str(tmp_path / "out"))
    done = run_command("prepare_data.py", "webdataset", *flags, *output)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
