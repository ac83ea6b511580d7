"""What all commands share: one-line errors, progress, the source tree that runs."""

import errno
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

from examples.mimo.cli import command
from tests.helpers.commands import ROOT

FAIL = """
from examples.mimo.cli import command

def main():
    raise ValueError("no such file")

command.run("train.py", main)
"""


def test_an_error_is_one_write_so_that_lines_of_ranks_do_not_mingle():
    reading, writing = os.pipe2(os.O_DIRECT)  # read() gives one write() of the other side
    launched = [sys.executable, "-u", "-c", FAIL]  # torchrun starts ranks with -u
    done = subprocess.run(launched, cwd=ROOT, stderr=writing)
    assert os.read(reading, 4096) == b"train.py: error: no such file\n"
    assert done.returncode == 2


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Another clone of the repository."""
    clone = tmp_path_factory.mktemp("clone").resolve()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "examples", clone / "examples", ignore=ignored)
    return clone


@pytest.mark.parametrize(
    "script", ["train.py", "avlm_inference.py", "evaluate.py", "convert.py", "serve.py"]
)
def test_a_script_refuses_to_run_the_code_of_another_clone(clone, script):
    path = clone / "examples/mimo" / script
    run = [sys.executable, str(path), "--help"]
    installed = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, cwd=clone, env=installed, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}: error: this script is {path}, but ")
    assert f"that of {ROOT / 'examples/mimo'}" in done.stderr
    assert done.stderr.endswith(f"PYTHONPATH={clone}\n")


def test_the_advised_path_lets_the_script_run_its_own_clone(clone):
    run = [sys.executable, "examples/mimo/train.py", "--help"]
    advised = {**os.environ, "PYTHONPATH": str(clone)}
    done = subprocess.run(run, cwd=clone, env=advised, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: train.py" in done.stdout


def test_a_symbolic_link_to_this_clone_is_this_clone(tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    run = [sys.executable, str(tmp_path / "link/examples/mimo/train.py"), "--help"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_progress_of_steps_with_known_and_unknown_totals(monkeypatch, capsys):
    monkeypatch.setattr(command, "PROGRESS_SECONDS", -1.0)
    monkeypatch.delenv("RANK", raising=False)
    progress = command.ProgressBar("answers", 4)
    progress.started -= 10
    for done in (1, 2, 4):
        progress(done)
    progress.step("samples checked", 7, None)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "  answers: 1 of 4, 30 s left",
        "  answers: 2 of 4, 10 s left",
        "  samples checked: 7",
    ]


def test_progress_is_printed_by_rank_0_and_not_more_often_than_every_few_seconds(
    monkeypatch, capsys
):
    progress = command.ProgressBar("answers", 4)
    progress(1)
    monkeypatch.setattr(command, "PROGRESS_SECONDS", -1.0)
    monkeypatch.setenv("RANK", "1")
    progress(2)
    assert capsys.readouterr().err == ""


def test_the_line_is_printed_when_another_rank_meets_the_wrong_input_before_rank_0(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(
        "import os, time\n"
        "from examples.mimo.cli import command\n"
        "def main():\n"
        "    time.sleep(2 if os.environ['RANK'] == '0' else 0)\n"
        "    raise ValueError('3 of 4')\n"
        "command.run('wrong.py', main)\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "3 of 4" in line] == [
        "wrong.py: error: 3 of 4"
    ]


def test_a_rank_that_meets_an_error_alone_reports_it_with_its_number(monkeypatch, capsys):
    monkeypatch.setattr(command, "RANK_ZERO_REPORTS_WITHIN", 0)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def main():
        raise ValueError("no file")

    with pytest.raises(SystemExit) as exited:
        command.run("x.py", main)
    assert exited.value.code == 2
    assert capsys.readouterr().err == "x.py [rank 1]: error: no file\n"


HOLD = """
import sys
from pathlib import Path
from examples.mimo.cli import command

command.hold_folder("--save", Path(sys.argv[1]))
{then}
print("holds", flush=True)
sys.stdin.read()
"""
# A child that the lock must not stay with, and that would outlive its parent.
FORK = """
import os, time
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
"""


def holder(folder, then=""):
    """A process that has the folder; what it prints first is read already."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(folder)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    printed = process.stdout.readline()
    return process, printed


def test_a_folder_takes_one_process_and_says_which(tmp_path):
    process, _ = holder(tmp_path)
    held = f"--save {tmp_path}: process {process.pid} on {socket.gethostname()}, since "
    with pytest.raises(ValueError, match=re.escape(held)):
        command.hold_folder("--save", tmp_path)
    process.communicate("")
    command.hold_folder("--save", tmp_path)


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path):
    process, child = holder(tmp_path, FORK)
    try:
        process.stdout.readline()
        process.kill()
        process.wait()
        command.hold_folder("--save", tmp_path)
        holder_now = json.loads((tmp_path / command.LOCK_FILE).read_text())
        assert holder_now["pid"] == os.getpid() != process.pid
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_where_the_file_system_has_no_locks_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def lock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lock)
    command.hold_folder("--save", tmp_path)
    assert "no lock here (No locks available); run only one at a time" in capsys.readouterr().err


CHILDREN = """
import os, time
from examples.mimo.cli import command

def main():
    if os.fork() == 0:
        os.fork()  # a child of the child
        time.sleep(600)
    print("forked", flush=True)
    time.sleep(600)

command.run("train.py", main)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_end_with_a_command_however_it_ends(number):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILDREN], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "forked\n"
    process.send_signal(number)
    assert process.wait() != 0
    # The pipe closes when the last process that has it ends.
    assert select.select([process.stdout], [], [], 60)[0], "a child is left"
    assert process.stdout.read() == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "a b"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; see the"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), "x: No such file"),
        (RuntimeError("[enforce fail] rv != -1. Too many open files"), "Too many open files; rai"),
        (RuntimeError("can't start new thread"), "can't start new thread; raise the number of"),
        (MemoryError(), "out of memory; free memory, or use"),
        (MemoryError("Unable to allocate 3.00 GiB"), "Unable to allocate 3.00 GiB; free memory"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                "79.10 GiB of which 1.20 GiB is free. Including more. See more."
            ),
            "CUDA out of memory; Tried to allocate 2.00 GiB; GPU 0 has a total capacity of "
            "79.10 GiB of which 1.20 GiB is free; free memory, or",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 40 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes; free",
        ),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory; free"),
        (OSError("without a number"), None),
        (RuntimeError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)
def test_errors_of_the_input_and_the_system_are_one_line(error, line):
    said = command.one_line(error)
    assert (said is None) if line is None else said.startswith(line)


def test_an_error_in_a_reader_of_data_is_told_without_its_traceback():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\nValueError: sample a: too long\n"  # noqa: E501
    assert command.one_line(ValueError(text)) == "sample a: too long"


def test_of_several_names_of_a_flag_none_is_suggested():
    parser = command.Parser()
    parser.add_argument("--save-interval", "--persistent-save-interval", type=int)
    with pytest.raises(ValueError, match=r"invalid int value: 'x'$"):
        parser.parse_args(["--save-interval", "x"])


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_a_number_below_its_least_is_refused(text):
    parser = command.Parser()
    parser.add_argument("--size", type=command.at_least(1, float))
    with pytest.raises(ValueError, match="--size"):
        parser.parse_args(["--size", text])
    assert parser.parse_args(["--size", "1"]).size == 1
    with pytest.raises(ValueError, match=r"^--size 0.5: at least 1$"):
        parser.parse_args(["--size", "0.5"])
