"""What every command shares."""

import os
import subprocess
import sys

from tests.conftest import ROOT

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
