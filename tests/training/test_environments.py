"""Broken environments: one line that says what is wrong and what is kept, and no traceback."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from examples.mimo.cli.command import LOCK_FILE
from examples.mimo.cli.output import remove_incomplete
from tests.helpers import ranks
from tests.helpers.commands import PP2, ROOT, run_train

SCRIPT = "tests/helpers/broken_environment.py"
SMALL = ("--num-layers", "1", "--micro-batch-size", "1", "--save-interval", "2")
SHORT, LONG = (*SMALL, "--train-iters", "12"), (*SMALL, "--train-iters", "2000")
SAVE = ("--save", "{}/disk/run")
DATA = ("--dataset-provider", "conversations", "--data-path", "{}/data")
METRICS = ("--metrics-file", "{}/metrics")
ASYNC = ("--async-save", "--async-strategy", "mcore")
KEPT = "the checkpoint of iteration 2 is whole, and --load {0}/disk/run goes on from it"
NONE = "nothing of this run is kept, for lack of --save"
# At the start: nothing but the line is printed. Environment, flags, words of the line.
AT_THE_START = {
    "full disk": ("tiny_disk", SAVE, "--save {}/disk/run: No space left on device"),
    "read-only disk": ("read_only_disk", SAVE, "--save {}/disk/run: Read-only file system"),
    "immutable folder": ("immutable_folder", SAVE, "--save {}/disk/run: Operation not permitted"),
    "folder of another user": (
        "nobody", ("--save", "{}/theirs"), "--save {}/theirs: this folder cannot be written",
    ),
    "--save is a file": ("nothing", ("--save", "{}/file"), "--save {}/file: File exists"),
    "--save in a file": ("nothing", ("--save", "{}/file/run"), "--save {}/file/run: Not a dir"),
    "--metrics-file is a folder": ("nothing", ("--metrics-file", "{}"), "Is a directory"),
    "--metrics-file without folder": ("nothing", ("--metrics-file", "{}/a/b"), "No such file"),
    "--tensorboard-dir is a file": (
        "nothing", ("--tensorboard-dir", "{}/file"), "--tensorboard-dir {}/file: File exists",
    ),
    "unreadable data": ("nobody", DATA, "{}/data/train.jsonl: Permission denied"),
    "unreadable checkpoint": ("nobody", ("--load", "{}/theirs"), "Permission denied"),
    "few file descriptors": ("few_descriptors", (), "Too many open files; raise the limit with"),
    "few processes": ("no_more_processes", (), "raise the number of processes with ulimit -u"),
}  # fmt: skip
# Later: the header and the progress table stand above it.
LATER = {
    "full disk": ("full_disk", (*SHORT, *SAVE), "written to its end", KEPT),
    "full disk, in the background": (
        "full_disk", (*SHORT, *SAVE, *ASYNC), "written to its end", KEPT,
    ),
    "immutable folder": (
        "immutable_later", (*SHORT, "--save", "{}/disk", *METRICS), "Operation not permitted",
        "the checkpoint of iteration 2 is whole, and --load {}/disk goes on from it",
    ),
    "file-size limit": (
        "small_files", (*SHORT, *SAVE), "written to its end", "no checkpoint of this run was fin",
    ),
    "metrics on a full disk": (
        "nothing", (*SHORT, "--metrics-file", "/dev/full"), "/dev/full: No space left", NONE,
    ),
    "metrics on a disk that fills": (
        "disk_filled_later", (*LONG, "--metrics-file", "{}/disk/metrics"),
        "{}/disk/metrics: No space left", NONE,
    ),
    "TensorBoard on a full disk": (
        "tiny_disk", (*SHORT, "--tensorboard-dir", "{}/disk"),
        "--tensorboard-dir {}/disk: No space left", NONE,
    ),
    "full /dev/shm": (
        "no_shared_memory", (*SHORT, *DATA, "--num-workers", "2"), "/tmp and /dev/shm", NONE,
    ),
    "data that vanish": (
        "data_vanish", (*LONG, *DATA, *METRICS, "--max-bad-samples", "5"),
        "no such image file", "could not be read",
    ),
}  # fmt: skip


@pytest.fixture
def folder():
    """One that every user reaches, as pytest's are not, with a file and a folder of its owner's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    (folder / "file").write_text("file")
    (folder / "theirs").mkdir(mode=0o755)
    (folder / "theirs/latest_checkpointed_iteration.txt").touch(mode=0o600)
    yield folder
    if (folder / "disk").is_dir():
        subprocess.run(["chattr", "-i", folder / "disk"], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder)


def train(folder, data_folder, environment, flags, processes=1):
    """The run's exit status and what it printed."""
    if environment.startswith(("immutable", "nobody", "no_more")) and os.geteuid() != 0:
        pytest.skip("needs root")
    if "--data-path" in flags:
        shutil.copytree(data_folder, folder / "data")
        (folder / "data/train.jsonl").chmod(0o600)
    flags = [flag.format(folder) for flag in flags]
    done = ranks.run(SCRIPT, environment, str(folder), *flags, processes=processes)
    if "CalledProcessError" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this machine does not allow the mounts")
    return done


@pytest.mark.parametrize("name", AT_THE_START)
def test_at_the_start(folder, data_folder, name):
    environment, flags, words = AT_THE_START[name]
    done = train(folder, data_folder, environment, flags)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert words.format(folder) in done.stderr


SLOW = ("metrics on a disk that fills", "file-size limit", "TensorBoard on a full disk")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LATER]
)
def test_later(folder, data_folder, name):
    environment, flags, *words = LATER[name]
    done = train(folder, data_folder, environment, flags)
    assert done.returncode == 2, done.stderr
    *progress, last = done.stderr.splitlines()
    assert last.startswith("train.py: error: ")
    for text in words:
        assert text.format(folder) in last
    assert not [line for line in progress if "rror" in line or "Traceback" in line]
    assert progress[0].startswith("tiny_avlm: ")


def test_of_two_ranks_one_says_it(folder, data_folder):
    """Also when the last stage meets it alone, and rank 0 waits for its gradients."""
    for environment, flags, words in (
        ("small_files", (*SHORT, *SAVE), "written to its end"),
        ("nothing", (*PP2, "--train-iters", "4", "--metrics-file", "/dev/full"), "No space left"),
    ):
        done = train(folder, data_folder, environment, flags, processes=2)
        assert done.returncode == 2, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
        assert len(lines) == 1, done.stderr
        assert words in lines[0]
        assert "Traceback" not in done.stderr


def test_no_part_of_a_failed_checkpoint_stays_and_the_run_goes_on(folder):
    flags = (*SMALL, "--train-iters", "6", "--save", str(folder / "run"))
    load = ("--load", str(folder / "run"), "--metrics-file", str(folder / "metrics"))
    assert run_train(*flags, "--exit-interval", "2").returncode == 0
    failed = ranks.run(SCRIPT, "small_files", str(folder), *flags, *load)
    assert f"--load {folder / 'run'} goes on from it" in failed.stderr
    assert sorted(path.name for path in (folder / "run").glob("iter_*")) == ["iter_0000002"]
    (folder / "metrics").unlink()
    again = run_train(*flags, *load)
    assert again.returncode == 0, again.stderr
    assert (folder / "metrics").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set; start with torchrun"),
        ({"RANK": "0"}, "WORLD_SIZE is None, no number; start with torchrun, which sets RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set, but MASTER_ADDR is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2: ranks go from 0 to 1"),
    ],
)
def test_half_a_launch(variables, words):
    known = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in known}
    command = [sys.executable, str(ROOT / "examples/mimo/train.py")]
    done = subprocess.run(
        command, env={**environment, **variables, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(ranks, "free_port", lambda: port)
        done = ranks.run("examples/mimo/train.py", "--train-iters", "1")
    assert done.returncode == 2, done.stderr
    assert f"the ranks cannot meet at 127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT): " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_run_with_the_same_save_is_refused_before_it_changes_anything(folder):
    save = folder / "run"
    save.mkdir()
    with hold_in_another_process(save) as pid:
        for processes in (1, 2):
            done = run_train("--train-iters", "1", "--save", str(save), processes=processes)
            assert done.returncode == 2, done.stderr
            assert done.stderr.count("\n") == 1, done.stderr
            assert f"--save {save}: process {pid} on " in done.stderr
        assert [path.name for path in save.iterdir()] == [LOCK_FILE]
    done = run_train("--train-iters", "1", "--save", str(save), "--num-layers", "1")
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def hold_in_another_process(save):
    """The process that holds the folder, as a run does; it gets SIGKILL."""
    code = "import sys; from pathlib import Path; from examples.mimo.cli import command;"
    code += "command.hold_folder('--save', Path(sys.argv[1])); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(save)], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.wait()


def test_what_a_killed_run_left_of_a_checkpoint_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    contents = {
        "iter_0000002": ["__0_0.distcp"],  # older than the last one
        "iter_0000004": [".metadata", "__0_0.distcp", "metadata.json"],
        "iter_0000006": [
            "__0_0.distcp",
            "__3_0.distcp",
            "mp_rank_00/train_dataloader_dprank000.pt",
            ".sha256.json.1",
        ],
        "iter_0000008": [],
        "iter_copy": ["__0_0.distcp"],
        "iter_0000010": [".metadata", "__0_0.distcp", "metadata.json"],  # whole
        "iter_0000012": ["mp_rank_00/model_optim_rng.pt"],  # of another format
        "other": [],
    }
    for name, files in contents.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).parent.mkdir(exist_ok=True)
            (tmp_path / name / file).touch()
    remove_incomplete(tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert set(contents) - left == {"iter_0000006", "iter_0000008"}
