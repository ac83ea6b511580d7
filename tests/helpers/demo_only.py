"""`demo_only.py FILE`: run commands that can import what the extra `demo` installs, and no more.

FILE holds a JSON list of commands, each a script's path and its flags. Packages of this environment
that the extra does not lead to cannot be found, as if they were not installed. Megatron is imported
once, and each command runs in a fork. Ends with the status of the first command that fails.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import ClassVar

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT, EXTRA = "mimo-examples", "demo"


def reachable(project: str, extra: str) -> set[str]:
    """The names of the packages that `pip install project[extra]` brings."""
    names: set[tuple[str, str]] = set()
    waiting = [(project, extra), (project, "")]
    while waiting:
        name, of_extra = waiting.pop()
        if (name, of_extra) in names:
            continue
        names.add((name, of_extra))
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for line in required:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": of_extra}):
                child = canonicalize_name(requirement.name)
                waiting += [(child, ""), *((child, e) for e in requirement.extras)]
    return {name for name, _ in names}


def hidden_modules() -> set[str]:
    """Modules, and those of namespace packages, that only other packages bring."""
    kept = reachable(PROJECT, EXTRA) | {"pip"}
    owners: dict[str, set[str]] = {}
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        for file in distribution.files or ():
            parts = [part.partition(".")[0] for part in file.parts[:2]]
            if file.suffix in (".py", ".so") and parts[0].isidentifier():
                owners.setdefault(parts[0], set()).add(name)
                owners.setdefault(".".join(parts), set()).add(name)
    return {module for module, names in owners.items() if not kept & names}


class DemoFinder:
    """Finds modules as Python does, but none of `hidden`."""

    hidden: ClassVar[set[str]] = set()
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None for a module of a hidden package."""
        if ".".join(name.split(".")[:2]) in cls.hidden or name.partition(".")[0] in cls.hidden:
            return None
        return PathFinder.find_spec(name, path, target)


def run(script: str, *flags: str) -> int:
    """The exit status of `python script flags`, in a fork of this interpreter."""
    pid = os.fork()
    if pid == 0:
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    DemoFinder.hidden = hidden_modules()
    sys.meta_path[sys.meta_path.index(PathFinder)] = DemoFinder  # type: ignore[call-overload]
    print(json.dumps(sorted(DemoFinder.hidden)), flush=True)
    from tests.helpers.warm import warm_up

    warm_up([])
    for number, words in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        if status := run(*words):
            sys.exit(f"{words[0]}, command {number}, ended with status {status}")
