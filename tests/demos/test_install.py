"""The demo runs from what `make demo` installs, which is less than what `make test` does."""

import json
import re
import subprocess
import sys

from tests.helpers.commands import ROOT

# Of the extras that only tests, shards and the server need.
NOT_INSTALLED = {"pytest", "ruff", "mypy", "importlinter", "megatron.energon", "av"}
NOT_INSTALLED |= {"starlette", "uvicorn", "prometheus_client", "openai", "easy_vqa"}


def test_every_command_of_the_demo_runs_with_the_packages_of_its_extra(data_folder, tmp_path):
    run_sh = (ROOT / "demos/digits/run.sh").read_text(encoding="utf-8")
    scripts = {f"{name}.py" for name in re.findall(r"examples/mimo/(\w+)\.py", run_sh)}
    record = json.loads((data_folder / "heldout.jsonl").read_text().splitlines()[0])
    made, checkpoint = tmp_path / "data", tmp_path / "checkpoint"
    model = ("--model-provider", "tiny_avlm_speech")
    training = (*model, "--dataset-provider", "spoken_questions")
    training += ("--data-path", str(made), "--augment", "--num-workers", "1")
    training += ("--micro-batch-size", "4", "--global-batch-size", "4", "--train-iters", "1")
    training += ("--tensorboard-dir", str(tmp_path / "tensorboard"), "--save", str(checkpoint))
    files = ("--image-path", str(data_folder / record["images"][0]))
    files += ("--audio-path", str(data_folder / record["audios"][0]))
    files += ("--prompt", "Answer aloud.", "--speech-out", str(tmp_path / "answer.wav"))
    metrics = str(tmp_path / "train.jsonl")
    few = ("--samples", "20", "--voices", "2")
    commands = {
        "prepare_data.py": ("spoken-questions", *model, "--output", str(made), *few),
        "train.py": (*training, "--eval-iters", "1", "--metrics-file", metrics),
        "evaluate.py": ("--ckpt", str(checkpoint), "--data", str(made), "--samples", "4"),
        "avlm_inference.py": ("--ckpt", str(checkpoint), *files),
    }
    assert commands.keys() == scripts, "the demo runs other commands than this test"
    words = [[str(ROOT / "examples/mimo" / name), *flags] for name, flags in commands.items()]
    curve = ("benchmarks/loss_curve.py", metrics, "--output", str(tmp_path / "loss.svg"))
    assert curve[0] in run_sh
    (tmp_path / "commands.json").write_text(json.dumps([*words, curve]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.demo_only", str(tmp_path / "commands.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    hidden = set(json.loads(done.stdout.splitlines()[0]))
    assert hidden >= NOT_INSTALLED
    assert (tmp_path / "loss.svg").exists()
