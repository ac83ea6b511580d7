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


assignments = []


def watched(module_class):
    """The class of a module, which notes the attributes that code of the package sets."""

    def set_attribute(self, name, value):
        file = sys._getframe(1).f_code.co_filename
        if file.startswith(PACKAGE):
            assignments.append((f"{self.__name__}.{name}", file))
        module_class.__setattr__(self, name, value)

    return type(module_class.__name__, (module_class,), {"__setattr__": set_attribute})


def their_modules():
    return [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in THEIRS and isinstance(module, types.ModuleType)
    ]


def unwrapped(value):
    """The function of a method or property; other values as they are."""
    if isinstance(value, (classmethod, staticmethod, types.MethodType)):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def is_ours(value):
    """Whether a function or class is defined in the package."""
    if isinstance(value, types.FunctionType):
        return value.__code__.co_filename.startswith(PACKAGE)
    return isinstance(value, type) and str(value.__module__).startswith("examples.mimo")


def ours_within_theirs():
    """Code of the package that is found in their modules and classes, by name."""
    modules = their_modules()
    owners = {module.__name__: module for module in modules}
    owners |= {
        f"{value.__module__}.{value.__qualname__}": value
        for module in modules
        for value in list(vars(module).values())
        if isinstance(value, type) and str(value.__module__).split(".")[0] in THEIRS
    }
    values = {
        f"{name}.{attribute}": unwrapped(value)
        for name, owner in owners.items()
        for attribute, value in list(vars(owner).items())
    }
    return {name: value for name, value in values.items() if is_ours(value)}


def main():
    output = Path(sys.argv.pop(1))
    command.prepare_environment()
    command.single_process_unless_launched()
    table = [entry for entries in compat.replacements().values() for entry in entries]
    listed = {entry.name for entry in table}
    import examples.mimo.cli.observer
    import examples.mimo.training.pretrain  # noqa: F401

    for module in their_modules():
        # Modules of settings refuse attributes of other names.
        types.ModuleType.__setattr__(module, "__class__", watched(type(module)))
    train.main()
    values = {id(entry.replacement) for entry in table}
    values |= {id(getattr(entry.owner, entry.attribute)) for entry in table}
    report = {
        "elsewhere": [name for name, file in assignments if file != COMPAT],
        "unlisted": sorted(
            {name for name, _ in assignments if name not in listed}
            # Theirs take some from one another by name; those are listed where they come from.
            | {name for name, value in ours_within_theirs().items() if id(value) not in values}
        ),
        "set": sorted({name for name, _ in assignments}),
    }
    output.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(report))


if __name__ == "__main__":
    command.run("train.py", main)
