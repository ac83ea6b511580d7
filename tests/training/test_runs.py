"""Every listed provider starts; what a run shows and writes."""

import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from tests.helpers.commands import launch_command, run_command, run_train

# Widths and depths that are for clusters; all else of a config stays.
SMALL = (
    *("--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128"),
    *("--num-attention-heads", "4", "--num-query-groups", "2", "--kv-channels", "16"),
)
SMALL_ENCODER = ("num_layers=2", "hidden_size=64", "num_attention_heads=4")

# Spoken questions are asked about images.
PAIRS = [
    (model, dataset)
    for model in MODEL_PROVIDERS
    for dataset in ("spoken_questions", "mock")
    if dataset == "mock" or {"images", "audios"} <= set(get_model_config(model).modalities)
]


def flags_for(model, dataset, data_folder):
    flags = ["--model-provider", model, "--dataset-provider", dataset]
    config = get_model_config(model)
    if config.language.hidden_size > 128:
        flags += [*SMALL, "--set"]
        flags += [f"{name}.encoder.{size}" for name in config.inputs for size in SMALL_ENCODER]
    if dataset == "spoken_questions":
        flags += ["--data-path", str(data_folder)]
    if model == "qwen3_avlm":
        # The logits of 151,936 words at 8,192 positions are most of the time; half hold its media.
        flags += ["--seq-length", "4096"]
    return [*flags, "--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "2"]


@pytest.mark.parametrize(("model", "dataset"), PAIRS)
def test_every_provider_starts(model, dataset, data_folder, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    if dataset != "mock" and get_model_config(model).outputs:
        data_folder = tmp_path / "aloud"
        few = ("--samples", "20", "--voices", "2", "--output", str(data_folder))
        made = run_command(
            "prepare_data.py", dataset.replace("_", "-"), *few, "--model-provider", model
        )
        assert made.returncode == 0, made.stderr
    flags = flags_for(model, dataset, data_folder)
    done = run_train(*flags, "--metrics-file", str(metrics))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    assert all(0 < row["loss"] < 20 for row in rows)


def test_a_model_without_audio_refuses_spoken_questions(data_folder):
    flags = flags_for("llava_vlm", "spoken_questions", data_folder)
    done = run_command("train.py", *flags)
    assert done.returncode == 2
    assert "holds audios, but llava_vlm takes images" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: error: sample ")


@pytest.fixture(scope="module")
def run(data_folder, tmp_path_factory):
    """Twelve iterations at TP 2 with a frozen part, validation, TensorBoard and a checkpoint."""
    work = tmp_path_factory.mktemp("run")
    done = launch_command(
        "train.py",
        *("--tensor-model-parallel-size", "2", "--dataset-provider", "spoken_questions"),
        *("--data-path", str(data_folder), "--freeze", "images.encoder", "--num-workers", "1"),
        *("--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "12"),
        *("--eval-iters", "2", "--eval-interval", "5", "--log-interval", "4"),
        *("--tensorboard-dir", str(work / "board"), "--metrics-file", str(work / "metrics")),
        *("--save", str(work / "checkpoint"), "--save-interval", "12"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    return work, done


def test_the_first_screen_is_the_header(run):
    lines = run[1].stderr.splitlines()
    assert lines[0] == "tiny_avlm: TP 2 on CPU (gloo), float32, local layers"
    cells = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
    assert cells["images.encoder"][1] == "frozen"
    assert cells["audios.encoder"][1] == "yes"
    for part in ("images.encoder", "audios.encoder", "audios.projector", "language"):
        whole, split, copied, here = (int(n.replace(",", "")) for n in cells[part][2:6])
        assert whole == split + copied
        assert here == 4 * (split // 2 + copied)
    # What the language model copies are its nine norms.
    assert copied == 9 * 128
    assert run[1].stdout == ""


def test_progress_shows_speed_padding_waiting_and_the_time_left(run):
    lines = run[1].stderr.splitlines()
    heading = next(line for line in lines if "iteration" in line and "padding" in line)
    for column in ("loss", "samples/s", "tokens/s", "padding", "data wait", "left"):
        assert column in heading
    rows = [line for line in lines if "/12 " in line]
    assert [row.split()[0] for row in rows] == ["4/12", "8/12", "12/12"]
    assert rows[-1].endswith("0:00 min")


def test_validation_reports_held_out_loss_and_exact_match(run):
    assert "held out after 5 iterations: lm loss" in run[1].stderr
    rows = [json.loads(line) for line in (run[0] / "metrics").read_text().splitlines()]
    validations = [row for row in rows if "validation" in row]
    assert [row["iteration"] for row in validations] == [5, 10, 12]
    assert all(0 <= row["validation"]["exact match"] <= 1 for row in validations)


def test_metrics_count_real_tokens(run):
    rows = [json.loads(line) for line in (run[0] / "metrics").read_text().splitlines()]
    for row in rows:
        if "loss" in row:
            assert 0 < row["tokens"] <= row["slots"]
            assert len(row["keys"]) == 4
            assert set(row["items"]) == {"images", "audios"}


def test_tensorboard_holds_the_loss(run):
    board = EventAccumulator(str(run[0] / "board")).Reload()
    assert "lm loss" in board.Tags()["scalars"]
    rows = [json.loads(line) for line in (run[0] / "metrics").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    events = board.Scalars("lm loss")
    assert losses[events[-1].step - 1] == pytest.approx(events[-1].value, rel=1e-5)


def test_another_model_is_refused_and_nothing_saved_is_lost(run, data_folder):
    folder = run[0] / "checkpoint"
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for flags in (("--load", str(folder)), ("--save", str(folder))):
        done = run_command("train.py", *flags, "--num-layers", "6")
        assert done.returncode == 2
        assert "this folder's model has language.num_layers 4, but this run's has 6" in done.stderr
        assert done.stderr.count("\n") == 1
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_damaged_weights_end_with_one_line(run, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run[0] / "checkpoint", folder)
    for file in folder.glob("iter_*/*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    done = run_command("train.py", "--load", str(folder))
    assert done.returncode == 2, done.stderr[-2000:]
    assert "damaged" in done.stderr.splitlines()[-1]


def test_a_loss_that_is_not_finite_names_iteration_and_samples(tmp_path):
    done = run_command("train.py", "--lr", "1e30", "--train-iters", "4", "--global-batch-size", "4")
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.splitlines()[-1]
    assert "the loss of iteration 2 is" in last
    assert "its samples are mock-4, mock-5, mock-6, mock-7" in last


def test_megatrons_output_and_flags_on_demand():
    quiet = launch_command("train.py", "--train-iters", "1", "--global-batch-size", "4")
    loud = run_command(
        *("train.py", "--train-iters", "1", "--global-batch-size", "4", "--show-megatron-output")
    )
    assert quiet.returncode == loud.returncode == 0
    assert quiet.stdout == ""
    assert "num_layers ....." in loud.stdout
    listed = run_command("train.py", "--help-megatron")
    assert "--use-distributed-optimizer" in listed.stdout
