"""Training from shards: killed and resumed, packed, past bad samples."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import soundfile
from PIL import Image

from examples.mimo.shards.write import index_shards
from tests.helpers import broken
from tests.helpers.commands import PP2, ROOT, TP2, kill_all, launch_command, run_command, run_train
from tests.helpers.megatron_example import write_megatron_example
from tests.helpers.videos import write_video

pytest.importorskip("megatron.energon")

LAYOUTS = {"TP 2": TP2, "DP 2": ()}
VIRTUAL = ("--num-layers-per-virtual-pipeline-stage", "1")
ITERATIONS, EVERY, KILLS = 50, 4, 5


@pytest.fixture(scope="module")
def spoken(data_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "out"
    done = launch_command(
        "prepare_data.py", "webdataset",
        *("--manifest", str(data_folder / "train.jsonl"), "--output", str(output)),
        *("--splits", "train=0.8", "val=0.2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """5,000 spoken and written questions about easy-VQA's shapes."""
    pytest.importorskip("easy_vqa")
    from tests.helpers import spoken_shapes

    folder = tmp_path_factory.mktemp("shapes")
    manifest = spoken_shapes.write(folder, 5_000)
    output = folder / "shards"
    done = run_command(
        "prepare_data.py", "webdataset", "--manifest", str(manifest), "--output", str(output)
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((output / "about.json").read_text())["rejected"] == 0
    return output


def flags(shards, work, *more):
    return (
        *("--dataset-provider", "energon", "--data-path", str(shards)),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--seed", "5", "--lr", "1e-3"),
        *("--save", str(work / "checkpoint"), "--load", str(work / "checkpoint")),
        *("--metrics-file", str(work / "metrics.jsonl"), *more),
    )


def rows(work, since=0):
    """Iteration -> what its last run said of it, in lines after the first `since`."""
    file = work / "metrics.jsonl"
    lines = file.read_text().splitlines()[since:] if file.exists() else []
    result = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["iteration"]: row for row in result if "loss" in row}


def train(shards, work, *more, processes=2):
    work.mkdir(exist_ok=True)
    done = run_train(*flags(shards, work, *more), processes=processes)
    assert done.returncode == 0, done.stderr
    return rows(work)


def keys(result):
    return {iteration: row["keys"] for iteration, row in result.items()}


def test_peers_read_the_same_and_ranks_different_samples(spoken, tmp_path):
    short = ("--train-iters", "6", "--eval-iters", "2", "--eval-interval", "3")
    layouts = {"one": (1, ()), "tp": (2, TP2), "pp": (2, PP2), "dp": (2, ())}
    layouts["own"] = (3, ("--encoder-ranks", "images=0", "audios=1"))
    result = {
        name: train(spoken, tmp_path / name, *more, *short, processes=processes)
        for name, (processes, more) in layouts.items()
    }
    for peer in ("tp", "pp", "own"):
        assert keys(result[peer]) == keys(result["one"])
    seen = [key for row in result["dp"].values() for key in row["keys"]]
    assert len(seen) == len(set(seen)) == 24


def test_going_on_at_another_layout(spoken, tmp_path):
    whole = train(spoken, tmp_path / "whole", *TP2, "--train-iters", "8")
    train(spoken, tmp_path / "half", *TP2, "--train-iters", "8", "--exit-interval", "4")
    shutil.copytree(tmp_path / "half", tmp_path / "stages")
    for name, more in (("half", PP2), ("stages", (*PP2, *VIRTUAL))):
        again = train(spoken, tmp_path / name, *more, "--train-iters", "8")
        assert keys(again) == keys(whole)
        for iteration, row in whole.items():
            assert again[iteration]["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize("packed", [(), ("--pack-sequences",)], ids=["padded", "packed"])
def test_virtual_stages_go_on_with_the_next_sample(packed, spoken, tmp_path):
    more = (*PP2, *VIRTUAL, *packed, "--train-iters", "6")
    whole = train(spoken, tmp_path / "whole", *more)
    train(spoken, tmp_path / "half", *more, "--exit-interval", "3")
    again = train(spoken, tmp_path / "half", *more)
    for iteration, row in whole.items():
        # A sample counts once, though each stage reads it.
        assert len(set(row["keys"])) == len(row["keys"]) == 4
        for column in ("keys", "loss", "tokens"):
            assert again[iteration][column] == row[column]


def test_going_on_with_other_readers(spoken, tmp_path):
    """One data-parallel rank, then two, then two with workers, then one with other batches."""
    steps = (
        (3, TP2),
        (6, ()),
        (9, ("--num-workers", "2")),
        (12, (*TP2, "--micro-batch-size", "4", "--shuffle-buffer-size", "9")),
    )
    for last, more in steps:
        flags = (*more, "--train-iters", "12", "--exit-interval", str(last))
        result = train(spoken, tmp_path / "run", *flags)
    read = [key for row in result.values() for key in row["keys"]]
    assert len(result) == 12
    assert len(set(read)) == len(read) == 48


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        # One copy of each encoder for two of the language model, and two for one.
        ((2, ()), (4, ("--encoder-ranks", "images=0", "audios=1"))),
        ((2, TP2), (4, (*TP2[:1], "1", "--encoder-ranks", "images=0-1", "audios=2"))),
    ],
    ids=["one for two", "two for one"],
)
def test_encoder_replicas_read_what_they_encode(spoken, tmp_path, shared, own):
    more = ("--train-iters", "6", "--num-workers", "0")
    whole = train(spoken, tmp_path / "shared", *shared[1], *more, processes=shared[0])
    half = (*more, "--exit-interval", "3")
    train(spoken, tmp_path / "own", *shared[1], *half, processes=shared[0])
    result = train(spoken, tmp_path / "own", *own[1], *more, processes=own[0])
    assert keys(result) == keys(whole)
    for iteration, row in whole.items():
        assert result[iteration]["loss"] == pytest.approx(row["loss"], rel=1e-5)


def write_long_inputs(folder):
    """Recordings of several windows, large oblong pictures, and turns around them."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    lines = []
    for number in range(16):
        sound = noise.uniform(-0.3, 0.3, int((1 + number % 4) * 1.7 * 16_000))
        soundfile.write(folder / f"{number}.wav", sound, 16_000)
        pixels = noise.integers(0, 255, (40 + 20 * (number % 3), 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        turns = broken.turns("<image>what?") + broken.turns("<audio>and?")
        record = {"images": [f"{number}.png"], "audios": [f"{number}.wav"], "conversations": turns}
        lines.append(json.dumps({"key": f"long-{number}", **record}))
    (folder / "m.jsonl").write_text("\n".join(lines))
    return folder / "m.jsonl"


def test_windows_and_tiles_train_alike_at_every_layout(data_folder, tmp_path):
    manifest = write_long_inputs(tmp_path / "in")
    longer = ("--set", "audios.encoder.max_windows=4", "images.encoder.max_tiles=4")
    longer += ("images.encoder.fit=pad",)
    output = ("--output", str(tmp_path / "shards"), "--splits", "train=1")
    refused = run_command("prepare_data.py", "webdataset", "--manifest", str(manifest), *output)
    assert refused.returncode == 2, refused.stderr
    assert "tiny_avlm can use 4 samples of 16, less than half" in refused.stderr
    assert not (tmp_path / "shards").exists()
    command = ("prepare_data.py", "webdataset", "--manifest", str(manifest), *output)
    done = run_command(*command, *longer)
    assert re.search(r"train 16 samples for tiny_avlm in 1 shards$", done.stderr.strip()), (
        done.stderr
    )
    more = ("--seq-length", "256", "--tokenizer-model", str(data_folder), *longer)
    shards, start = tmp_path / "shards", tmp_path / "start"
    train(shards, start, *more, "--train-iters", "4", "--exit-interval", "1", processes=1)
    layouts = {"one": (1, ()), "pp": (2, PP2), "cp": (2, ("--context-parallel-size", "2"))}
    result = {}
    for name, (processes, layout) in layouts.items():
        shutil.copytree(start, tmp_path / name)
        run = (*more, *layout, "--train-iters", "4")
        result[name] = train(shards, tmp_path / name, *run, processes=processes)
    assert result["one"][4]["items"] == {"images": 4, "audios": 4}
    for name in ("pp", "cp"):
        assert keys(result[name]) == keys(result["one"])
        for iteration, row in result["one"].items():
            assert result[name][iteration]["loss"] == pytest.approx(row["loss"], rel=1e-5)
            assert result[name][iteration]["tokens"] == row["tokens"]


def test_videos_in_the_layout_of_megatrons_example_train(data_folder, tmp_path):
    """A part that is a video, and a record that is a list of turns."""
    pytest.importorskip("av")
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for number in range(12):
            video = write_video(tmp_path / "a.mp4", frames=11 + 10 * (number % 3), rate=10)
            turns = json.dumps(broken.turns("<video>what happens?"))
            for part, data in (("mp4", video.read_bytes()), ("json", turns.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{part}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index_shards(folder, ["train-0.tar"], ["train"], 1)
    small = ("--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128")
    small += ("--num-attention-heads", "4", "--num-query-groups", "2", "--kv-channels", "16")
    small += ("--seq-length", "512", "--set", "videos.encoder.num_layers=2")
    small += ("videos.encoder.hidden_size=64", "videos.encoder.num_attention_heads=4")
    small += ("videos.encoder.image_size=56",)
    more = ("--model-provider", "video_llava_vlm", "--dataset-provider", "video_llava_vlm", *small)
    result = train(
        folder, tmp_path / "run", *more, *("--tokenizer-model", str(data_folder)),
        *("--train-iters", "3"), *TP2,
    )  # fmt: skip
    assert [row["items"] for row in result.values()] == [{"videos": 4}] * 3
    assert all(len(row["keys"]) == 4 for row in result.values())


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_five_times_the_samples_are_the_same(shapes, tmp_path, layout, workers):
    more = (*LAYOUTS[layout], "--num-workers", workers, "--train-iters", str(ITERATIONS))
    more += ("--save-interval", str(EVERY))
    (tmp_path / "killed").mkdir()
    whole = train(shapes, tmp_path / "whole", *more)
    moments = random.Random(f"{layout} {workers}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "examples/mimo/train.py"), *flags(shapes, tmp_path / "killed", *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started, killed_at = 0, []
    for _ in range(KILLS):
        said = len((tmp_path / "killed/metrics.jsonl").read_text().splitlines()) if killed_at else 0
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        enough = started + moments.randrange(1, 2 * EVERY)
        while process.poll() is None and max(rows(tmp_path / "killed", said), default=0) < enough:
            time.sleep(0.05)
        time.sleep(moments.random())
        assert process.poll() is None, process.stderr.read()
        kill_all(process)
        killed_at.append(max(rows(tmp_path / "killed", said)))
        tracker = tmp_path / "killed/checkpoint/latest_checkpointed_iteration.txt"
        started = int(tracker.read_text()) if tracker.exists() else 0
    again = train(shapes, tmp_path / "killed", *more)
    assert max(killed_at) < ITERATIONS
    assert keys(again) == keys(whole)
    assert sorted(again) == list(range(1, ITERATIONS + 1))
    for iteration, row in whole.items():
        assert again[iteration]["loss"] == pytest.approx(row["loss"], rel=1e-6)


def test_packed_sequences_train(spoken, tmp_path):
    packed = (
        "--packing-buffer-size",
        "100",
        "--total-seq-length",
        "256",
        "--micro-batch-size",
        "1",
    )
    result = train(spoken, tmp_path / "one", *packed, "--train-iters", "6", *TP2)
    for row in result.values():
        assert row["slots"] == 4 * 256
        assert len(row["keys"]) > 8
    assert sum(row["tokens"] for row in result.values()) / (6 * 4 * 256) > 0.93
    half = (*packed, "--train-iters", "6", *TP2)
    train(spoken, tmp_path / "two", *half, "--exit-interval", "3")
    assert keys(train(spoken, tmp_path / "two", *half)) == keys(result)


@pytest.mark.slow
def test_packed_sequences_of_the_shapes_are_97_percent_full(shapes, tmp_path):
    packed = ("--packing-buffer-size", "300", "--total-seq-length", "512")
    result = train(shapes, tmp_path / "one", *packed, "--micro-batch-size", "1", "--train-iters=50")
    samples = sum(len(row["keys"]) for row in result.values())
    slots = sum(row["slots"] for row in result.values())
    assert slots == 50 * 4 * 512
    assert samples > 1_500
    assert sum(row["tokens"] for row in result.values()) / slots >= 0.97


def test_bad_samples_are_counted_named_and_limited(data_folder, tmp_path):
    shards = broken.write_shard(tmp_path / "shards", good=90)
    index_shards(shards, ["train-0.tar"], ["train"], 1)
    more = ("--tokenizer-model", str(data_folder), "--save-interval", "4", "--train-iters", "12")
    whole = train(shards, tmp_path / "whole", *more)
    assert all(key.startswith("good-") for row in whole.values() for key in row["keys"])
    counts = [row["bad_samples"] for row in whole.values()]
    assert counts == sorted(counts)
    named = (tmp_path / "whole/checkpoint/bad_samples.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in named}) == len(named) == counts[-1] > 20
    assert all(json.loads(line)["reason"] for line in named)
    train(shards, tmp_path / "half", *more, "--exit-interval", "6")
    again = train(shards, tmp_path / "half", *more)
    assert [again[i]["bad_samples"] for i in sorted(again)] == counts
    done = run_train(*flags(shards, tmp_path / "few", *more, "--max-bad-samples=9"), processes=2)
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if "error:" in line]
    assert said
    assert all("--max-bad-samples 9; the last: " in line for line in said), said
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_megatrons_example_folder_and_flags(data_folder, tmp_path):
    """Its run_avlm_train.sh on its layout of shards: sizes reduced, without Weights & Biases."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        write_megatron_example(folder, f"{split}-0.tar", 24)
    index_shards(folder, ["train-0.tar", "val-0.tar"], ["train", "val"], 1)
    (folder / ".nv-meta/dataset.yaml").write_text(
        "sample_type: {__module__: nobody, __class__: Knows}\nsample_loader: a.py:sample_loader\n"
    )
    done = run_command(
        "train.py",
        *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "6"),
        *("--adam-beta1", "0.9", "--adam-beta2", "0.95", "--lr", "0.001"),
        *("--lr-decay-style", "cosine", "--min-lr", "2.0e-5", "--lr-warmup-iters", "2"),
        *("--lr-decay-iters", "6", "--auto-detect-ckpt-format"),
        *("--accumulate-allreduce-grads-in-fp32", "--model-provider", "llava_avlm"),
        *("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"),
        *("--log-interval", "2", "--save-interval", "2000", "--eval-interval", "20000"),
        *("--save", str(tmp_path / "checkpoint"), "--load", str(tmp_path / "checkpoint")),
        *("--eval-iters", "2", "--tensorboard-dir", str(tmp_path / "logs")),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(data_folder)),
        *("--dataloader-type", "external", "--dataset-provider", "llava_avlm"),
        *("--data-path", str(folder), "--num-layers", "2", "--hidden-size", "64"),
        *("--num-attention-heads", "4", "--max-position-embeddings", "512"),
        *("--encoder-seq-length", "512", "--position-embedding-type", "rope"),
        *("--audio-encoder-model", "openai/whisper-tiny"),
        *("--hf-assign-unused-tokens", "<audio>,32002"),
        # What that script leaves to the sizes of LLaVA.
        *("--num-query-groups", "4", "--ffn-hidden-size", "128", "--set"),
        *("images.encoder.num_layers=3", "images.encoder.image_size=56"),
        *("audios.encoder.num_layers=1",),
        *("images.projector.ffn_hidden_size=64", "audios.projector.ffn_hidden_size=64"),
        processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stderr.splitlines() if "/6 " in line]
    assert [line[0] for line in lines] == ["2/6", "4/6", "6/6"]
    losses = [float(line[1]) for line in lines]
    assert losses[-1] < losses[0] - 0.05
    assert "held out after 6 iterations" in done.stderr
