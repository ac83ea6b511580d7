"""A forked process does what `python script` does, as far as tests can tell, and is paid for."""

import json
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from tests.helpers import costs, ranks
from tests.helpers.commands import ROOT

ENDS = {
    "at its end": "print('out')",
    "with a status": "raise SystemExit(3)",
    "with words": "import sys; sys.exit('words')",
    "with an error": "print('out'); raise KeyError('nothing')",
    "without a word": "import os; os._exit(7)",
    "with a thread": "import threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start(); print('early')",
    "with what is left to do": "import atexit; atexit.register(print, 'left'); print('out')",
    "by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
}
TELLS = """
import json, os, sys
names = ("NEW", "PATH", "WORLD_SIZE")
told = [os.environ.get(name) for name in names]
print(json.dumps([sys.argv, sys.path[0], __name__, __file__, os.getcwd(), *told]))
"""


@pytest.fixture
def write(tmp_path):
    def script(code):
        (tmp_path / "script.py").write_text(code)
        return str(tmp_path / "script.py")

    return script


@pytest.mark.parametrize("code", ENDS.values(), ids=ENDS)
def test_it_ends_as_a_launched_one(write, code):
    script = write(code)
    launched = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    forked = ranks.run(script, processes=0)
    assert forked.returncode == launched.returncode
    assert forked.stdout == launched.stdout
    # A traceback begins with the frames that started the script.
    assert forked.stderr.splitlines()[-1:] == launched.stderr.splitlines()[-1:]


def test_it_is_told_what_a_launched_one_is(write, monkeypatch):
    monkeypatch.setenv("NEW", "since the interpreter started")
    script = write(TELLS)
    launched = subprocess.run(
        [sys.executable, script, "--flag", "a b"], capture_output=True, text=True, cwd=ROOT
    )
    forked = ranks.run(script, "--flag", "a b", processes=0)
    assert forked.stderr == ""
    assert json.loads(forked.stdout) == json.loads(launched.stdout)


def test_several_run_beside_each_other_and_are_signalled_alone(write):
    script = write("import time; print('here', flush=True); time.sleep(600)")
    both = [ranks.Launched(script, processes=0) for _ in range(2)]
    assert [launched.poll() for launched in both] == [None, None]
    with pytest.raises(subprocess.TimeoutExpired):
        both[1].processes[0].wait(timeout=0.01)
    both[0].send_signal(signal.SIGTERM)
    assert both[0].wait() == -signal.SIGTERM
    assert both[1].poll() is None
    both[1].send_signal(signal.SIGKILL)
    assert both[1].wait() == -signal.SIGKILL


def test_what_it_takes_is_counted_when_it_has_ended(write):
    script = write("import time\nwhile time.process_time() < 0.5: pass")
    before = costs.seconds_used()
    ranks.run(script, processes=0, kind="servers")
    assert costs.by_kind()["servers"] >= 0.5
    assert costs.seconds_used() - before >= 0.5


def test_the_last_lines_say_what_was_spent_and_what_was_left_out():
    config = SimpleNamespace(cache=None)
    counted = costs.Costs(config)
    counted.of_tests = {"a.py::x": [2.0, 3.0], "a.py::y": [1.0, 1.0], "b.py::z": [0.5, 0.5]}
    counted.of_fixtures = Counter({"a.py::model": 1.5})
    lines = list(counted.costs())
    assert "     3.0 s  a.py, 2 tests" in lines
    assert lines.index("     3.0 s  a.py, 2 tests") < lines.index("     0.5 s  b.py, 1 tests")
    assert lines[-1] == "     1.5 s  a.py::model"
    marked = [SimpleNamespace(get_closest_marker=lambda name: name == "slow")] * 2
    counted.pytest_deselected(marked)
    skips = [
        SimpleNamespace(longrepr=("a.py", 1, "Skipped: no Chromium"), nodeid=f"a.py::{name}")
        for name in "xy"
    ]
    reporter = SimpleNamespace(stats={"skipped": skips})
    assert list(counted.skipped(reporter)) == [
        "not run: 2 tests marked slow: make test-slow",
        "skipped: 2 in a.py: no Chromium",
    ]
