"""`broken_environment.py NAME FOLDER [flags of train.py]`: `train.py` where something is broken.

FOLDER is the test's own. What is mounted is mounted for this process and its children alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

from examples.mimo.train import main

NOBODY = 65534


def mount_memory(folder: Path, size: str) -> None:
    """A file system of so many bytes at `folder`, in a namespace of mounts of this process."""
    if os.geteuid() == 0:
        os.unshare(os.CLONE_NEWNS)
    else:
        user, group = os.geteuid(), os.getegid()
        os.unshare(os.CLONE_NEWNS | os.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def after_iterations(folder: Path, count: int, action: Callable[[], object]) -> None:
    """Do `action` when `metrics` in the test's folder has so many lines."""

    def wait() -> None:
        metrics = folder / "metrics"
        while not metrics.is_file() or metrics.read_text().count("\n") < count:
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


def full_disk(folder: Path) -> None:
    """A checkpoint of the test's model takes 13 MB."""
    mount_memory(folder / "disk", "20m")


def tiny_disk(folder: Path) -> None:
    mount_memory(folder / "disk", "4k")


def disk_filled_later(folder: Path) -> None:
    mount_memory(folder / "disk", "64k")

    def fill() -> None:
        with contextlib.suppress(OSError):
            (folder / "disk/other").write_bytes(bytes(2**16))

    after_iterations(folder, 2, fill)


def read_only_disk(folder: Path) -> None:
    mount_memory(folder / "disk", "20m")
    remount_read_only(folder / "disk")


def immutable_later(folder: Path) -> None:
    (folder / "disk").mkdir()
    after_iterations(
        folder, 3, lambda: subprocess.run(["chattr", "+i", folder / "disk"], check=True)
    )


def immutable_folder(folder: Path) -> None:
    (folder / "disk").mkdir()
    subprocess.run(["chattr", "+i", folder / "disk"], check=True)


def small_files(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def few_descriptors(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))


def no_more_processes(folder: Path) -> None:
    """Root has no such limit."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def nobody(folder: Path) -> None:
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def no_shared_memory(folder: Path) -> None:
    mount_memory(Path("/dev/shm"), "4k")


def data_vanish(folder: Path) -> None:
    after_iterations(folder, 2, lambda: shutil.rmtree(folder / "data"))


def nothing(folder: Path) -> None:
    pass


if __name__ == "__main__":
    name, place = sys.argv.pop(1), Path(sys.argv.pop(1))
    globals()[name](place)
    command.run("train.py", main)
