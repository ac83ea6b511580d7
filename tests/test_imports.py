"""What may be imported where; `make lint` checks the directions between rooms."""

import ast
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


@pytest.mark.parametrize("module", sorted(set(MODEL_PROVIDERS.values())))
def test_a_config_is_read_without_megatron(module):
    code = (
        f"import sys, {module}\n"
        "names = ('megatron', 'examples.mimo.model', 'examples.mimo.compat')\n"
        "print(sorted(name for name in sys.modules if name.startswith(names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
