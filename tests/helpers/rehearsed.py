"""Paths of the package on a rehearsed GPU (rehearsal.py), and where their hosts waited.

One interpreter imports Megatron and forks the ranks of every path.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import os
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from examples.mimo import compat
from tests.helpers import rehearsal
from tests.helpers.commands import PP2, TP2
from tests.helpers.layouts import AHEAD, CP2, ENCODERS_FROZEN, ENCODERS_TP1, SP, VPP2
from tests.helpers.ranks import free_port

COMMON = (
    *("--model-provider", "tiny_avlm", "--dataset-provider", "mock", "--seed", "11"),
    *("--micro-batch-size", "2", "--lr", "1e-3"),
)
TRAIN = ("--global-batch-size", "4", "--train-iters", "2")
# Two iterations of two micro-batches, then one of four; there are samples for twenty of two.
GROWING = (
    "--step-batch-size-schedule",
    "0:4 1024:8",
    "--train-iters",
    "20",
    "--exit-interval",
    "3",
)
PACKED = ("--pack-sequences", "--bf16")
ONE_MODALITY = ("--model-provider", "tests.helpers.models:without_pictures")
NEW_TOKENS = 6
# A rank that hangs is ended after so many seconds.
PATIENCE_SECONDS = 240
CHECKPOINT = "checkpoint"
OVERRIDE = ("--override-opt_param-scheduler",)
DISTRIBUTED = ("--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce")


@dataclass(frozen=True)
class Rehearsed:
    """A path: flags of `train.py`, or another function of the folder that all paths share."""

    flags: tuple[str, ...] = ()
    processes: int = 1
    run: Callable[[Path], Any] | None = None


def train(flags: Collection[str], length: Collection[str] = TRAIN) -> None:
    """`train.py` as a user types it."""
    from examples.mimo import train

    sys.argv = ["train.py", *COMMON, *length, *flags]
    train.main()


def train_and_save(folder: Path) -> None:
    """With evaluation and a checkpoint after two iterations, bf16 and the distributed optimizer."""
    train(
        (
            *(*DISTRIBUTED, "--save", str(folder / CHECKPOINT), "--save-interval", "2"),
            *("--eval-interval", "1", "--eval-iters", "1"),
        )
    )


def resume(folder: Path) -> None:
    """One iteration more, from that checkpoint."""
    train((*DISTRIBUTED, "--load", str(folder / CHECKPOINT), "--train-iters", "3", *OVERRIDE))


def answer(folder: Path) -> Any:
    """Load, prefill, and decode: greedy, sampled, with log-probabilities; the tokens."""
    from examples.mimo.generation.sampling import Sampling

    some = Sampling(0.7, top_k=20, top_p=0.9, seed=5)
    penalised = dataclasses.replace(some, repetition_penalty=1.3, frequency_penalty=0.2)
    engine, requests = engine_and_requests(folder, cuda_graphs=False)
    return {
        "greedy": decode(engine, "greedy", requests),
        "sampled": decode(engine, "sampled", requests, sampling=some),
        "penalised": decode(engine, "penalised", requests, sampling=penalised),
        "logprobs": decode(
            engine, "logprobs", requests, logprobs=True, prompt_logprobs=True, top_logprobs=2
        ),
    }


def answer_by_graphs(folder: Path) -> Any:
    """Greedy tokens, decoded by captured graphs."""
    engine, requests = engine_and_requests(folder, cuda_graphs=True)
    return {"greedy": decode(engine, "greedy", requests)}


def engine_and_requests(folder: Path, cuda_graphs: bool) -> Any:
    """An engine for what was saved, and three prompts of different lengths."""
    from examples.mimo.checkpoint.description import open_checkpoint
    from examples.mimo.checkpoint.loading import load_model
    from examples.mimo.generation.engine import Engine, SequenceRequest
    from examples.mimo.training.inputs import MockDataset

    opened = open_checkpoint(folder / CHECKPOINT)
    model = load_model(opened)
    samples = MockDataset(opened.config, 96, 3, seed=3)
    requests = [SequenceRequest(i, samples[i], NEW_TOKENS) for i in range(3)]
    return Engine(model, opened.config, end_ids=(), cuda_graphs=cuda_graphs), requests


def decode(engine: Any, kind: str, requests: Any, **options: Any) -> list[list[int]]:
    """The tokens of each answer; the record's parts are KIND, prefill and KIND, token N."""
    record = rehearsal.record
    record.part = f"{kind}, prefill"
    outputs = engine.start([dataclasses.replace(request, **options) for request in requests])
    tokens: dict[int, list[int]] = {request.number: [] for request in requests}
    for step in itertools.count(2):
        for output in outputs:
            tokens[output.number].append(output.token)
        if not engine.sequences:
            return list(tokens.values())
        record.part = f"{kind}, token {step}"
        outputs = engine.step()


def refusals(folder: Path) -> dict[str, Any]:
    """What the rehearsed device says to mistakes, and how often the host waits for what is right.

    An answer is the text of an error, or the number of waits.
    """
    x, host = torch.arange(4.0, device="cuda"), torch.arange(4.0)
    mask, graph = x > 1, torch.cuda.CUDAGraph()

    def captured(function: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            with torch.cuda.graph(graph):
                function()

        return call

    cases: dict[str, Callable[[], Any]] = {
        "two places": lambda: x + host,
        "stacked with a number of the host": lambda: torch.stack([x[0], torch.tensor(1.0)]),
        "numpy": x.numpy,
        "nccl, host": lambda: torch.distributed.all_reduce(host),
        "gloo, device": lambda: torch.distributed.all_reduce(x, group=over_gloo),
        "captured wait": captured(x.tolist),
        "captured tensor of the host": captured(lambda: torch.zeros(3)),
        "captured copy": captured(lambda: x.copy_(host)),
        "meta": lambda: torch.zeros(2, device="meta").cuda(),
        "number": lambda: float(x[0]),
        "list": x.tolist,
        "test": lambda: bool(x.isfinite().all()),
        "mask": lambda: x[mask],
        "assigned to a mask": lambda: x.__setitem__(mask, 3.0),
        "list as index": lambda: x[[0, 2]],
        "scalar of the host": lambda: x * torch.tensor(2.0),
        "pageable": lambda: host.to("cuda", non_blocking=True),
        "pinned": lambda: host.pin_memory().to("cuda", non_blocking=True),
        "pinned, blocking": lambda: host.pin_memory().cuda(),
        "from a list": lambda: torch.tensor([1, 2], device="cuda"),
        "from a list, pinned": lambda: torch.tensor([1], pin_memory=True).cuda(non_blocking=True),
        "numbers in a list": lambda: torch.tensor([[x[0], x[1]]]),
        "nccl, device": lambda: torch.distributed.all_reduce(x),
    }
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    over_gloo = torch.distributed.new_group(backend="gloo")
    answers: dict[str, Any] = {}
    for name, case in cases.items():
        before = rehearsal.record.waits.total()
        try:
            case()
            answers[name] = rehearsal.record.waits.total() - before
        except (RuntimeError, TypeError) as error:
            answers[name] = str(error)
    result = torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        result.add_(x * 2)
    result.zero_()
    x.fill_(5)
    graph.replay()
    answers["replayed"] = result.tolist()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    answers["hidden"] = torch.cuda.is_available()
    return answers


def convert(folder: Path) -> None:
    """The checkpoint to Hugging Face folders and back, by two commands in one process."""
    from examples.mimo import convert as command

    compat.install.cache_clear()
    exported = str(folder / "exported")
    to_hf = ("to-hf", "--load", str(folder / CHECKPOINT), "--save", exported)
    from_hf = ("from-hf", "--model-provider", "tiny_avlm", "--folders", exported)
    for flags in (to_hf, (*from_hf, "--save", str(folder / "imported"))):
        sys.argv = ["convert.py", *flags]
        command.main()


def plan(folder: Path) -> None:
    """A dry run of two ranks."""
    compat.install.cache_clear()
    train(("--dry-run", "2", "--tensor-model-parallel-size", "2"))


# In this order: the later ones of one process read what `saved` wrote.
PATHS = {
    "refusals": Rehearsed(run=refusals),
    "padded": Rehearsed(run=lambda folder: train((), GROWING)),
    "packed": Rehearsed(PACKED),
    "saved": Rehearsed(run=train_and_save),
    "resumed": Rehearsed(run=resume),
    "answers": Rehearsed(run=answer),
    "captured": Rehearsed(run=answer_by_graphs),
    "converted": Rehearsed(run=convert),
    "planned": Rehearsed(run=plan),
    "tensor parallel": Rehearsed((*TP2, *SP, *PACKED, *ENCODERS_TP1), 2),
    "pipeline": Rehearsed((*PP2, *VPP2, *ENCODERS_FROZEN, *AHEAD), 2),
    "context parallel": Rehearsed((*CP2, "--bf16"), 2),
    "non-colocated": Rehearsed((*ONE_MODALITY, "--encoder-ranks", "audios=0"), 2),
}


def note_parts() -> None:
    """Let the record say in which iteration and which micro-batch of it the host waits."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.training import training

    record, calls = rehearsal.record, Counter[str]()

    def within(part: str, function: Callable[..., Any]) -> Any:
        """`function` with what follows it, up to the next part of the run."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[part] += 1
            calls["forward"] = calls["backward"] = 0
            record.part = f"{part} {calls[part]}"
            return function(*args, **kwargs)

        return call

    def micro_batch(name: str, function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            before = record.part
            calls[name] += 1
            record.part = f"{before}, micro-batch {calls[name]}"
            try:
                return function(*args, **kwargs)
            finally:
                record.part = before

        return call

    schedules.forward_step = micro_batch("forward", schedules.forward_step)
    for name in ("backward_step", "backward_step_multimodule"):
        setattr(schedules, name, micro_batch("backward", getattr(schedules, name)))
    training.train_step = within("iteration", training.train_step)
    training.evaluate = within("evaluation", training.evaluate)
    training.save_checkpoint_and_time = within("save", training.save_checkpoint_and_time)


def run_rank(path: Rehearsed, folder: Path, report_file: Path) -> NoReturn:
    """Become a rank of a path, and end with status 1 if it fails; the report says why."""
    started = time.process_time()
    output = os.open(report_file.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(PATIENCE_SECONDS)
    error = result = None
    record = rehearsal.record
    record.num_on_device = 0
    try:
        result = path.run(folder) if path.run else train(path.flags)
    except SystemExit as end:  # as of --exit-interval
        error = f"ended with status {end.code}" if end.code else None
    except Exception:
        error = traceback.format_exc()
    report = {
        "error": error,
        "result": result,
        "seconds": time.process_time() - started,
        "waits": [[*key, count] for key, count in record.waits.items()],
        "collectives": [[*key, count] for key, count in record.collectives.items()],
        "num_on_device": record.num_on_device,
    }
    report_file.write_text(json.dumps(report))
    os._exit(int(error is not None))


def run(name: str, folder: Path) -> list[dict[str, Any]]:
    """What the ranks of a path report; of one that fails alone."""
    path, port = PATHS[name], free_port()
    files: dict[int, Path] = {}
    for rank in range(path.processes):
        file = folder / f"{name}-{rank}.json"
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)},
                **{"WORLD_SIZE": str(path.processes), "MASTER_ADDR": "127.0.0.1"},
            }
            run_rank(path, folder, file)
        files[pid] = file
    reports = []
    left = set(files)
    while left:
        pid, status = os.wait()
        left.remove(pid)
        said = files[pid].with_suffix(".txt").read_text()
        if files[pid].is_file():
            reports.append({"said": said, **json.loads(files[pid].read_text())})
        elif not any(report["error"] for report in reports):
            reports.append({"error": f"ended with status {status}: {said}"})
        if status:
            # The others wait for it.
            for other in left:
                os.kill(other, signal.SIGKILL)
    return reports


def warm_up() -> None:
    """The rehearsed device, and what a rank imports."""
    rehearsal.install()
    from examples.mimo.cli import command

    command.prepare_environment()
    compat.install()
    import megatron.training.argument_utils  # noqa: F401

    import examples.mimo.cli.observer
    import examples.mimo.compat.megatron
    import examples.mimo.training.pretrain  # noqa: F401

    note_parts()
    # Ranks share what is imported, until a collection writes to it.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Run the paths that the command line names, or all; print where their hosts waited."""
    parser = argparse.ArgumentParser(prog="python -m tests.helpers.rehearsal")
    parser.add_argument("paths", nargs="*", metavar="PATH", help=", ".join(PATHS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the reports to FILE")
    parser.add_argument(
        "--run", nargs=argparse.REMAINDER, metavar="ARG", help="run -m MODULE, or a script"
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.run:
        run_program(options.run)
        return
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # `make test` hides real ones
    warm_up()
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.paths or PATHS:
            reports[name] = run(name, Path(folder))
            for report in reports[name]:
                seconds = report.get("seconds", 0)
                print(
                    f"\n{name}: {seconds:.1f} s", report["error"] or "", describe(report), sep="\n"
                )
                sys.stdout.flush()
    print(f"\n{sum(os.times()[:4]):.0f} s in all processes")
    if options.json:
        options.json.write_text(json.dumps(reports))


def run_program(argv: list[str]) -> None:
    """`-m MODULE` or a script with arguments, as Python runs it, on the rehearsed device."""
    # What tests start runs there too (commands.py).
    os.environ["TEST_PYTHON"] = f"{sys.executable} -m tests.helpers.rehearsal --run"
    rehearsal.install()
    sys.argv = argv
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


def describe(report: dict[str, Any]) -> str:
    """The waits of a rank by part of the run and place."""
    parts: dict[str, dict[str, Counter[str]]] = {}
    for part, reason, place, count in report.get("waits", ()):
        kind = re.sub(r" \d+", "", part)
        parts.setdefault(kind, {}).setdefault(part, Counter())[f"{place}  {reason}"] += count
    lines = []
    for kind, counted in parts.items():
        lines.append(f"  {kind or 'elsewhere'}: {[c.total() for c in counted.values()]} waits")
        total = sum(counted.values(), Counter())
        lines += [f"    {n / len(counted):6.2f}  {place}" for place, n in total.most_common()]
    return "\n".join(lines)
