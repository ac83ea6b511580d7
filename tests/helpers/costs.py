"""A plugin of pytest: says first how long the tests take, and last what they cost and skipped.

CPU seconds are user and system time of all processes. Those of a process count when it has ended,
for the test that runs then.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import psutil
import pytest

from tests.helpers import ranks

CACHE = "mimo/costs"
MOST_LINES = 12
# Number of tests -> what they took on two slow virtual CPUs, told until they have run here.
RECORDED = {2434: "17 min, and 20 min of CPU time"}
TARGETS = {"slow": "make test-slow", "gpu": "make gpu-check"}


def seconds_used() -> float:
    """CPU seconds of this process, its children that have ended, and all that was forked."""
    return sum(by_kind().values())


def by_kind() -> dict[str, float]:
    """The same, by kind of process."""
    used = {}
    for name, who in (("tests", resource.RUSAGE_SELF), ("launched", resource.RUSAGE_CHILDREN)):
        usage = resource.getrusage(who)
        used[name] = usage.ru_utime + usage.ru_stime
    used["imports"] = sum(interpreter.seconds() for interpreter in ranks.interpreters)
    return {**used, **ranks.spent}


def in_words(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


class Costs:
    """Counts while the tests run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        # Absent with `-p no:cacheprovider`.
        self.cache = getattr(config, "cache", None)
        self.started = psutil.Process().create_time()
        self.of_tests: dict[str, list[float]] = {}
        self.of_fixtures: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        # Of the fixtures that are set up at the moment, what those within them took.
        self.within: list[float] = []
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count the interpreters that are started."""
        if event == "subprocess.Popen" and "python" in os.path.basename(str(arguments[0])):
            is_warm = ranks.WARM in [str(word) for word in arguments[1]]
            self.launches["imports" if is_warm else "launched"] += 1

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        for item in items:
            names = [name for name in TARGETS if item.get_closest_marker(name)]
            self.left_out[names[0] if names else ""] += 1

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = [item.nodeid for item in session.items]
        known = self.cache.get(CACHE, {}) if self.cache else {}
        told = [known[name] for name in names if name in known]
        if len(told) < max(1, 0.9 * len(names)):
            for number, took in RECORDED.items():
                if 0.9 * number <= len(names) <= 1.1 * number:
                    self.say(f"{len(names)} tests took about {took} on two slow virtual CPUs")
            return
        totals = [sum(pair) * len(names) / len(told) for pair in zip(*told, strict=True)]
        cpu, wall = map(in_words, totals)
        self.say(f"{len(names)} tests took about {wall}, and {cpu} of CPU time, when last run here")

    def say(self, line: str) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(line)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        used, began = seconds_used(), time.monotonic()
        result = yield
        self.of_tests[item.nodeid] = [seconds_used() - used, time.monotonic() - began]
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":
            return (yield)
        used = seconds_used()
        self.within.append(0.0)
        try:
            return (yield)
        finally:
            took = seconds_used() - used
            name = f"{fixturedef.baseid}::{fixturedef.argname}"
            self.of_fixtures[name] += took - self.within.pop()
            if self.within:
                self.within[-1] += took

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("costs")
        for line in (*self.costs(), *self.skipped(terminalreporter)):
            terminalreporter.write_line(line)
        if self.cache and self.of_tests:
            known = self.cache.get(CACHE, {})
            rounded = {name: [round(x, 2) for x in pair] for name, pair in self.of_tests.items()}
            self.cache.set(CACHE, {**known, **rounded})

    def costs(self) -> Iterator[str]:
        kinds = by_kind()
        wall = in_words(time.time() - self.started)
        yield f"{in_words(sum(kinds.values()))} of CPU time in {wall}; of these"
        counts = self.launches + ranks.started
        for name, what in (
            ("tests", "the tests' own process"),
            ("imports", "interpreters that import Megatron once, and fork"),
            ("ranks", "ranks"),
            ("commands", "commands"),
            ("servers", "servers"),
            ("launched", "processes that import it themselves, with what they start"),
        ):
            count = "" if name == "tests" else f"{counts[name]:,} "
            yield f"{kinds.get(name, 0):8.1f} s  {count}{what}"
        files: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        for name, (used, _) in self.of_tests.items():
            files[name.split("::")[0]][0] += used
            files[name.split("::")[0]][1] += 1
        yield "The dearest files, and what tests of a file or of all share:"
        for name, (used, count) in sorted(files.items(), key=lambda file: -file[1][0])[:MOST_LINES]:
            yield f"{used:8.1f} s  {name}, {count} tests"
        for name, used in self.of_fixtures.most_common(MOST_LINES):
            yield f"{used:8.1f} s  {name}"

    def skipped(self, terminalreporter: Any) -> Iterator[str]:
        """What did not run and why."""
        for mark, count in self.left_out.items():
            reason = f"marked {mark}: {TARGETS[mark]}" if mark else "deselected"
            yield f"not run: {count} tests {reason}"
        reasons: dict[str, list[str]] = defaultdict(list)
        for report in terminalreporter.stats.get("skipped", []):
            reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")
            reasons[reason.removeprefix("Skipped: ")].append(report.nodeid.split("::")[0])
        for reason, files in reasons.items():
            where = ", ".join(sorted(set(files)))
            yield f"skipped: {len(files)} in {where}: {reason}"
