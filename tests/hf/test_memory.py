import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT


@pytest.mark.slow
def test_converting_holds_less_than_the_model(tmp_path):
    def run(action):
        command = [sys.executable, "-m", "tests.hf.convert_large", action, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run("make")
    peak_bytes = int(run("convert").splitlines()[-1])
    files = [file for file in (tmp_path / "ours").rglob("*") if file.is_file()]
    checkpoint_bytes = sum(file.stat().st_size for file in files)
    assert checkpoint_bytes > 3e9
    assert peak_bytes <= 1.3 * checkpoint_bytes
