"""train.py, watching who sets attributes of torch's and Megatron's modules and classes.

Writes one JSON object per rank: watched_train.py OUTPUT [flags of train.py].
"""

import json
import os
import sys
import types
from pathlib import Path

from examples.mimo import compat, train
from examples.mimo.cli import command

PACKAGE = str(Path(train.__file__).parent)
COMPAT = str(Path(compat.__file__))
THEIRS = ("torch", "megatron")


class WatchedModule(types.ModuleType):
    """A module that notes the attributes which code of the package sets."""

    def __setattr__(self, name, value):
        file = sys._getframe(1).f_code.co_filename
        if file.startswith(PACKAGE):
            assignments.append((f"{self.__name__}.{name}", file))
        super().__setattr__(name, value)


assignments = []


def their_modules():
    # Some are lazy objects of other types, which make attributes when asked for them.
    return [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in THEIRS and type(module) in (types.ModuleType, WatchedModule)
    ]


def is_ours(value):
    """Whether a function, method or class is defined in the package."""
    value = getattr(value, "__func__", value)
    value = getattr(value, "fget", None) or value
    code = getattr(value, "__code__", None)
    if isinstance(code, types.CodeType):
        return code.co_filename.startswith(PACKAGE)
    return isinstance(value, type) and str(value.__module__).startswith("examples.mimo")


def ours_within_theirs():
    """Names in their modules and classes under which code of the package is found."""
    modules = their_modules()
    owners = {f"{m.__name__}": m for m in modules}
    owners |= {
        f"{value.__module__}.{value.__qualname__}": value
        for module in modules
        for value in list(vars(module).values())
        if isinstance(value, type) and value.__module__.split(".")[0] in THEIRS
    }
    return {
        f"{name}.{attribute}": value
        for name, owner in owners.items()
        for attribute, value in list(vars(owner).items())
        if is_ours(value)
    }


def main():
    output = Path(sys.argv.pop(1))
    command.prepare_environment()
    command.single_process_unless_launched()
    table = [entry for entries in compat.replacements().values() for entry in entries]
    listed = {entry.name for entry in table}
    import examples.mimo.cli.observer
    import examples.mimo.training.step  # noqa: F401

    for module in their_modules():
        module.__class__ = WatchedModule
    train.main()
    values = {id(entry.replacement) for entry in table}
    values |= {id(getattr(entry.owner, entry.attribute)) for entry in table}
    report = {
        "elsewhere": [name for name, file in assignments if file != COMPAT],
        "unlisted": sorted(
            {name for name, _ in assignments if name not in listed}
            # Megatron's own `from module import name` may hold a listed replacement once more.
            | {name for name, value in ours_within_theirs().items() if id(value) not in values}
        ),
        "set": sorted({name for name, _ in assignments}),
    }
    output.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(report))


if __name__ == "__main__":
    command.run("train.py", main)
