"""What may be imported where; `make lint` checks the directions between rooms."""

import ast
import json
import subprocess
import sys

import pytest

from examples.mimo.configs import MODEL_PROVIDERS
from tests.helpers.commands import ROOT

PACKAGE = ROOT / "examples/mimo"
# Below these, sizes and layouts are parameters: no code there knows a command line.
MAY_PARSE = ("cli", "training")


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_only_commands_cli_and_training_know_argparse():
    rooms = [folder for folder in PACKAGE.iterdir() if folder.is_dir()]
    files = [f for room in rooms if room.name not in MAY_PARSE for f in room.rglob("*.py")]
    assert len(files) > 20
    users = {str(f.relative_to(PACKAGE)) for f in files if "argparse" in imported_modules(f)}
    assert users == set()


@pytest.fixture(scope="module")
def megatron_behind():
    """Config module -> what a process has imported of Megatron by the time it has read that."""
    modules = sorted(set(MODEL_PROVIDERS.values()))
    code = (
        "import importlib, json, sys\n"
        "names = ('megatron', 'examples.mimo.model', 'examples.mimo.compat')\n"
        "behind = {}\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    behind[module] = sorted(name for name in sys.modules if name.startswith(names))\n"
        "print(json.dumps(behind))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", sorted(set(MODEL_PROVIDERS.values())))
def test_a_config_is_read_without_megatron(megatron_behind, module):
    assert megatron_behind[module] == []
