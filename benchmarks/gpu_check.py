"""python3 benchmarks/gpu_check.py: tests and measurements on a GPU, in ten minutes or less.

Cases run in order of worth, each in a process of its own with a limit of time (gpu_cases.py). A row
is printed when it is there, and the page and the JSON file are written anew, so that a run that is
ended keeps its rows. A case that fails does not stop the next; the status is then 1.

Only the cases need packages. They run from the source tree, and find others on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Dense bf16 TFLOP/s and TB/s of memory from the makers' data sheets, by words of a device's name.
PEAKS = {
    "GB300": (2500.0, 8.0),
    "GB200": (2500.0, 8.0),
    "B300": (2250.0, 8.0),
    "B200": (2250.0, 8.0),
    "GH200": (989.5, 4.0),
    "H200 NVL": (835.5, 4.8),
    "H200": (989.5, 4.8),
    "H100 NVL": (835.5, 3.9),
    "H100 PCIe": (756.0, 2.0),
    "H100": (989.5, 3.35),
    "A100 40GB": (312.0, 1.55),
    "A100": (312.0, 2.0),
    "L40S": (362.0, 0.86),
    "L40": (181.0, 0.86),
    "L4": (121.0, 0.3),
}
H100 = PEAKS["H100"]
CHILD = ("-m", "benchmarks.gpu_cases")


@dataclass(frozen=True)
class Case:
    """What one process measures within `limit` seconds; `options` are those of gpu_cases.py."""

    name: str
    limit: float
    options: dict[str, Any]
    goal: str = ""


def training(name: str, limit: float, model: str, *flags: str, goal: str = "") -> Case:
    """A case that trains; `flags` are those of train.py."""
    iterations, warm_up = (20, 6) if model == "scale_1b_avlm" else (12, 4)
    options = {"case": "train", "model": model, "flags": flags}
    return Case(name, limit, options | {"iterations": iterations, "warm_up": warm_up}, goal)


def batch_flags(sequences: int, length: int, micro_batches: int) -> tuple[str, ...]:
    """Micro-batches of sequences of up to a length, and how many an iteration has."""
    return (
        *("--seq-length", str(length), "--micro-batch-size", str(sequences)),
        *("--global-batch-size", str(sequences * micro_batches)),
    )


LONG, SHORT = batch_flags(2, 4096, 2), batch_flags(5, 1536, 2)
# (batch size, with CUDA graphs), the goal's first.
BATCHES = ((1, True), (1, False), (64, True), (16, True), (4, True), (64, False))
CASES = (
    Case("device", 60, {"case": "device"}),
    Case("tests", 150, {"case": "tests", "only": ""}),
    training("1B", 120, "scale_1b_avlm", *batch_flags(4, 4096, 1), goal="45 % MFU on one H100"),
    training("7B projectors", 120, "llava_vlm", *LONG, goal="50 % MFU on one H100"),
    Case(
        "7B answers",
        120,
        {"case": "generate", "model": "llava_vlm", "prompt": 2048, "tokens": 64}
        | {"batches": BATCHES},
        goal="170 tokens/s at batch 1 on one H100",
    ),
    training("7B projectors, packed", 100, "llava_vlm", *LONG, "--pack-sequences"),
    training("7B projectors, short", 90, "llava_vlm", *SHORT),
    training("7B projectors, short, packed", 90, "llava_vlm", *SHORT, "--pack-sequences"),
)


def rehearsed_cases() -> tuple[Case, ...]:
    """The same cases with models of a few million parameters, for a rehearsed device."""
    tiny = {"model": "tiny_avlm", "iterations": 2, "warm_up": 1}
    sizes = {
        "device": {"attentions": ["causal"]},
        "tests": {"only": "graphs"},
        "train": tiny,
        "generate": {"model": "tiny_avlm", "prompt": 96, "tokens": 3, "batches": BATCHES[:3]},
    }
    cases = []
    for case in CASES:
        options = case.options | sizes.get(case.options["case"], {})
        if "flags" in options:
            packed = [flag for flag in options["flags"] if flag == "--pack-sequences"]
            options |= {"flags": [*batch_flags(2, 96, 1), *packed]}
        cases.append(Case(case.name, case.limit, options, case.goal))
    return tuple(cases)


def peaks(device: str) -> tuple[float, float] | None:
    """TFLOP/s and TB/s of a device, by the longest of the names that it has; None for others."""
    for name in sorted(PEAKS, key=len, reverse=True):
        if all(re.search(rf"\b{word}\b", device) for word in name.split()):
            return PEAKS[name]
    return None


def main() -> None:
    """Run the cases; status 2 without CUDA or a package, 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.split(":")[1])
    names = ", ".join(f'"{case.name}"' for case in CASES)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all; 9 unless named")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help=f"only these, of {names}")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.md"), metavar="FILE.md")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = rehearsed_cases() if options.rehearse else CASES
    unknown = set(options.cases or ()) - {case.name for case in cases}
    if unknown:
        parser.error(f"--cases {', '.join(sorted(unknown))}: the cases are {names}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = Results(options.output)
    end = time.monotonic() + 60 * options.minutes
    for case in cases:
        if options.cases and case.name not in ("device", *options.cases):
            continue
        left = end - time.monotonic()
        if left < 5:
            results.add(case, {"skipped": f"none of the {options.minutes:g} minutes was left"})
            continue
        for row in rows_of(case, min(case.limit, left), options.rehearse):
            if "missing" in row:
                print(f"gpu_check.py: {explain(row['missing'])}", file=sys.stderr)
                sys.exit(2)
            results.add(case, row)
    print(f"\n{results.output} and {results.output.with_suffix('.json')} hold all of it")
    sys.exit(int(results.failed))


def explain(missing: Sequence[str]) -> str:
    """What lacks, and what to do."""
    if missing == ["CUDA"]:
        return "no CUDA device here; run it on a machine with one"
    return f"{', '.join(missing)} cannot be imported; docs/gpus.md says how to carry packages"


def rows_of(case: Case, limit: float, rehearse: bool) -> Iterator[dict[str, Any]]:
    """The rows of a case as they come; the last says so if it failed or took too long."""
    command = [sys.executable, *CHILD]
    if rehearse:
        command[1:1] = ["-m", "tests.helpers.rehearsal", "--run"]
    folders = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # A child runs in the root, whatever folder this process was started from.
    path = os.pathsep.join([str(ROOT), *map(os.path.abspath, folders)])
    start = time.monotonic()
    child = subprocess.Popen(
        [*command, json.dumps(case.options)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    said = Said(child)
    try:
        yield from said.rows(start + limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
    if said.is_late:
        yield {"error": f"stopped after {limit:.0f} s"}
    elif status:
        lines = said.errors.strip().splitlines() or [f"status {status}"]
        yield {"error": lines[-1][:300], "output": said.errors[-4000:]}


class Said:
    """What a child writes, read without waiting for it longer than its limit."""

    def __init__(self, child: subprocess.Popen) -> None:
        self.child, self.errors, self.is_late = child, "", False

    def rows(self, end: float) -> Iterator[dict[str, Any]]:
        """Rows from stdout until it is closed or the time is up."""
        assert self.child.stdout
        assert self.child.stderr
        buffer = b""
        with selectors.DefaultSelector() as selector:
            for stream in (self.child.stdout, self.child.stderr):
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    self.is_late = True
                    return
                for key, _ in ready:
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is self.child.stderr:
                        self.errors += data.decode(errors="replace")
                    else:
                        *lines, buffer = (buffer + data).split(b"\n")
                        for line in lines:
                            if line.startswith(b"ROW "):
                                yield json.loads(line[4:])


@dataclass
class Results:
    """All rows so far; each is printed and written when it comes."""

    output: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    failed: bool = False

    @property
    def device(self) -> str:
        """The device's name."""
        return next((row["device"] for row in self.rows if "device" in row), "an unknown device")

    def add(self, case: Case, row: dict[str, Any]) -> None:
        """Write all rows, then print this one: who reads it finds it on disk."""
        self.failed |= "error" in row or row.get("passed") is False
        seconds = time.monotonic() - self.begun
        self.rows.append({"case": case.name, "goal": case.goal, "at_seconds": seconds} | row)
        document = {"peaks": peaks(self.device), "H100": H100, "rows": self.rows}
        write_whole(self.output.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
        write_whole(self.output, self.page())
        print(f"{seconds:5.0f} s  {case.name}: {self.line(row)}", flush=True)

    def line(self, row: dict[str, Any]) -> str:
        """A row in words."""
        for kind in ("error", "skipped", "tests"):
            if kind in row:
                return f"{kind if kind != 'tests' else 'pytest'}: {row[kind]}"
        if "device" in row:
            facts = f"torch {row['torch']}, CUDA {row['cuda']}, driver {row['driver']}"
            return f"{row['device']}, {row['memory_gib']} GiB, {facts}"
        if "attention" in row:
            return f"attention, {row['attention']}: {', '.join(row['kernels']) or 'no kernel seen'}"
        names = TRAINING if "seconds" in row else GENERATION
        cells = zip(names, self.cells(row), strict=True)
        return ", ".join(f"{name} {cell}" for name, cell in cells)

    def cells(self, row: dict[str, Any]) -> list[str]:
        """The columns of TRAINING or GENERATION."""
        tflops, bandwidth = peaks(self.device) or (None, None)
        if "seconds" in row:
            times = [row["data_ms"], row["forward_ms"], row["backward_ms"], row["optimizer_ms"]]
            return [
                f"{1000 * row['seconds']:,.0f}",
                " / ".join(f"{milliseconds:,.0f}" for milliseconds in times),
                f"{row['tokens_per_second']:,.0f}",
                f"{100 * row['padding']:.0f} %",
                f"{row['tflops_of_tokens']:.1f} / {row['tflops_computed']:.1f}",
                f"{share(row['tflops_of_tokens'], tflops)} / "
                f"{share(row['tflops_computed'], tflops)}",
                f"{row['peak_gib']:.1f}",
                "-" if row["planned_gib"] is None else f"{row['planned_gib']:.1f}",
            ]
        return [
            f"{row['batch']}",
            "yes" if row["graphs"] else "no",
            f"{row['prompt']:,}",
            f"{row['prefill_ms']:,.1f}",
            share(row["prefill_tflops"], tflops),
            f"{row['token_ms']:.2f}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['decode_tbs']:.2f}",
            share(row["decode_tbs"], bandwidth),
        ]

    def page(self) -> str:
        """All rows as Markdown."""
        known = peaks(self.device)
        limits = (
            f"{known[0]:g} TFLOP/s dense bf16 and {known[1]:g} TB/s"
            if known
            else "not in the table of this script, so shares of them are missing"
        )
        parts = [
            f"# On {self.device}",
            f"{time.strftime('%Y-%m-%d')}, `python3 benchmarks/gpu_check.py`. Limits of the "
            f"device: {limits}; of an H100: {H100[0]:g} TFLOP/s and {H100[1]:g} TB/s.",
            CONVENTIONS,
            "\n".join(f"- {r['case']}: {self.line(r)}" for r in self.rows if is_text(r)),
        ]
        for kind, names in (("seconds", TRAINING), ("batch", GENERATION)):
            rows = [r for r in self.rows if kind in r and not is_text(r)]
            if rows:
                parts.append(
                    markdown([["case", *names]] + [[r["case"], *self.cells(r)] for r in rows])
                )
        goals = {r["case"]: r["goal"] for r in self.rows if r["goal"]}
        if goals:
            listed = "; ".join(f"{case}: {goal}" for case, goal in goals.items())
            parts.append(f"Goals, which nobody has shown to be within reach: {listed}.")
        return "\n\n".join(parts) + "\n"


TRAINING = (
    *("ms", "data / forward / backward / optimizer ms", "tokens/s", "padding"),
    *("TFLOP/s", "MFU", "peak GiB", "dry run GiB"),
)
GENERATION = (
    *("batch", "graphs", "prompt", "prefill ms", "of FLOP/s", "token ms", "tokens/s", "TB/s"),
    "of TB/s",
)
CONVENTIONS = """Training: medians of an iteration in bf16, random weights, mock samples. Forward
includes waiting for data; the parts are times on the device. TFLOP/s and MFU (model FLOP
utilisation) come twice. The first counts *real tokens*: each sample at its own length. The second
counts *all that is computed*: each sample at the padded length of its micro-batch, or the spans of
a packed sequence. Both count, per token, 2 operations for each weight of a product forward, as many
for the gradient of its input where an earlier part trains, as many for its own where it trains;
4 * length * width a layer for attention, whether masked or not, and twice that backward; the head
over positions with loss, and encoders over the items of the batch. Recomputation counts nothing.
*dry run* is what `--dry-run` said before, for full-length samples.

Answers: prefill is the whole prompt with its media, its share of FLOP/s counts the language layers
alone. Decoding should read every weight of layers and head and all cached keys and values once a
token: TB/s is those bytes over the time."""


def is_text(row: dict[str, Any]) -> bool:
    """Whether a row is a sentence, not a line of a table."""
    return not {"seconds", "batch"} & row.keys() or "error" in row or "skipped" in row


def share(value: float, limit: float | None) -> str:
    """A percentage of what the device could do, where that is known."""
    return f"{100 * value / limit:.1f} %" if limit else "?"


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its heading."""
    heading, *others = rows
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heading, rule, *others])


def write_whole(file: Path, text: str) -> None:
    """Replace a file in one step: whoever ends this process leaves the old one or the new."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, file)


if __name__ == "__main__":
    main()
