"""What gpu_check.py measures, each case in a process of its own: `python -m benchmarks.gpu_cases`.

A case prints its rows as lines of JSON behind `ROW `, as soon as it has them. Its name and options
come as one JSON object on the command line.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Import name -> name to install, of what an image with torch may lack.
NEEDED = {
    "megatron.core": "megatron-core",
    "soundfile": "soundfile",
    "torchaudio": "torchaudio",
    "PIL": "pillow",
    "psutil": "psutil",
    "pytest": "pytest",
}
# Printed where nothing of this module's own goes.
ROWS = os.fdopen(os.dup(1), "w", buffering=1)


def row(**values: Any) -> None:
    """Hand a row over, at once."""
    print(f"ROW {json.dumps(values)}", file=ROWS, flush=True)


def device(attentions: Sequence[str] | None = None) -> None:
    """The device, its software, and the kernels behind each kind of attention, or some kinds."""
    missing = [name for module, name in NEEDED.items() if not _is_installed(module)]
    if missing:
        row(missing=missing)
        return
    import torch

    if not torch.cuda.is_available():
        row(missing=["CUDA"])
        return
    properties = torch.cuda.get_device_properties(0)
    row(
        device=torch.cuda.get_device_name(0),
        memory_gib=round(properties.total_memory / 2**30, 1),
        driver=_driver(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        transformer_engine=_is_installed("transformer_engine"),
        float32="highest precision" if not torch.backends.cuda.matmul.allow_tf32 else "TF32",
    )
    kinds = _attentions()
    for kind in kinds if attentions is None else attentions:
        row(attention=kind, kernels=_kernels(kinds[kind]))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()[0]
    return "unknown"


def _attentions() -> dict[str, Callable[[], Any]]:
    """The kinds of attention that the package asks torch for, in bf16, heads of 128."""
    import torch
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def heads(count: int, length: int) -> torch.Tensor:
        shape = 1, count, length, 128
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    full, grouped, short = heads(16, 512), heads(4, 512), heads(16, 256)
    bounds = torch.tensor([0, 200, 512], device="cuda", dtype=torch.int32)

    def packed() -> Any:
        from torch.nn.attention.varlen import varlen_attn

        rows = full[0].transpose(0, 1)
        return varlen_attn(rows, rows, rows, bounds, bounds, 312, 312, window_size=(-1, 0))

    return {
        "causal": lambda: sdpa(full, full, full, is_causal=True),
        "causal, grouped queries": lambda: sdpa(
            full, grouped, grouped, is_causal=True, enable_gqa=True
        ),
        "encoder": lambda: sdpa(full, full, full),
        "packed (varlen)": packed,
        "context parallel (bottom-right)": lambda: sdpa(
            short, full, full, attn_mask=causal_lower_right(256, 512)
        ),
    }


def _kernels(attention: Callable[[], Any]) -> list[str]:
    """Names of the kernels that ran forward and backward, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile, supported_activities

    try:
        attention().sum().backward()
        if ProfilerActivity.CUDA not in supported_activities():
            return []
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            attention().sum().backward()
            torch.cuda.synchronize()
    except (RuntimeError, ImportError) as error:
        return [f"failed: {str(error).splitlines()[0]:.120}"]
    events = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return [re.sub(r"<.*", "", event.key)[:80] for event in events[:4]]


def tests(only: str) -> None:
    """The tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p"]
    command += ["no:cacheprovider", *(["-k", only] if only else [])]
    launcher = os.environ.get("TEST_PYTHON")
    if launcher:
        command = [*launcher.split(), *command[1:]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    row(tests=done.stdout.strip().splitlines()[-1], passed=done.returncode == 0)


def train(model: str, flags: Sequence[str], iterations: int, warm_up: int) -> None:
    """A training run on mock data; medians after `warm_up` iterations."""
    command = ["--model-provider", model, "--dataset-provider", "mock", "--seed", "1", "--bf16"]
    command += ["--train-iters", str(iterations), "--eval-iters", "0", *flags]
    planned = _start_dry_run(command)
    from examples.mimo.cli import command as shared

    shared.prepare_environment()
    shared.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    from examples.mimo import train as script

    parts = Parts()
    parts.watch()
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        sys.argv = ["train.py", *command, "--metrics-file", str(metrics)]
        script.main()
        logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    counted = flops_of_iterations(iterations)
    for line, (tokens, _, _) in zip(logged, counted, strict=True):
        assert line["tokens"] == tokens, "the run trained on other samples than were counted"
    timed = slice(warm_up, None)
    seconds = statistics.median(line["seconds"] for line in logged[timed])
    mean = statistics.mean
    row(
        seconds=seconds,
        tokens_per_second=mean(line["tokens"] for line in logged[timed]) / seconds,
        padding=1 - mean(x["tokens"] / x["slots"] for x in logged[timed]),
        tflops_of_tokens=mean(real for _, real, _ in counted[timed]) / seconds / 1e12,
        tflops_computed=mean(computed for _, _, computed in counted[timed]) / seconds / 1e12,
        data_ms=1000 * statistics.median(line["wait_seconds"] for line in logged[timed]),
        **parts.medians(warm_up),
        peak_gib=max(line["peak_memory_bytes"] or 0 for line in logged) / 2**30,
        planned_gib=_planned_gib(planned),
    )


class Parts:
    """Times of the forward pass, the backward pass and the optimizer, by CUDA events."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, list[tuple[Any, Any]]]] = []
        self.is_inside = False

    def watch(self) -> None:
        """From here on Megatron's functions are timed."""
        from megatron.core.optimizer import optimizer
        from megatron.core.pipeline_parallel import schedules
        from megatron.training import training

        train_step = training.train_step

        def next_step(*args: Any, **kwargs: Any) -> Any:
            self.iterations.append({})
            return train_step(*args, **kwargs)

        training.train_step = next_step
        schedules.forward_step = self._timed("forward", schedules.forward_step)
        schedules.backward_step = self._timed("backward", schedules.backward_step)
        for kind in (optimizer.ChainedOptimizer, optimizer.MixedPrecisionOptimizer):
            setattr(kind, "step", self._timed("optimizer", kind.step))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            # An optimizer may be made of several.
            if self.is_inside or not self.iterations:
                return function(*args, **kwargs)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.is_inside = True
            start.record()
            try:
                return function(*args, **kwargs)
            finally:
                end.record()
                self.is_inside = False
                self.iterations[-1].setdefault(part, []).append((start, end))

        return call

    def medians(self, warm_up: int) -> dict[str, float]:
        """Milliseconds of each part in an iteration."""
        totals: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
        for iteration in self.iterations[warm_up:]:
            for part, spans in iteration.items():
                totals[part].append(sum(start.elapsed_time(end) for start, end in spans))
        return {f"{part}_ms": statistics.median(sums or [0.0]) for part, sums in totals.items()}


def flops_of_iterations(iterations: int) -> list[tuple[int, int, int]]:
    """Of each iteration of the run that Megatron's arguments describe: its tokens and its FLOPs.

    First those of real tokens, then those of all positions that are computed.
    """
    from megatron.training import get_args

    from examples.mimo.configs import get_model_config
    from examples.mimo.training.inputs import MockDataset, collate_function
    from tests.helpers.training_flops import training_flops

    args = get_args()
    config = get_model_config(args.model_provider)
    size, samples = args.micro_batch_size, args.global_batch_size
    dataset = MockDataset(config, args.seq_length, iterations * samples, args.seed)
    collate = collate_function(args)
    results = []
    for iteration in range(iterations):
        tokens = real = computed = 0
        for first in range(iteration * samples, (iteration + 1) * samples, size):
            micro_batch = [dataset[number] for number in range(first, first + size)]
            batch = collate(micro_batch)
            assert batch.input_ids is not None
            media_tokens = {
                name: int((batch.input_ids == modality.token_id).sum())
                for name, modality in config.inputs.items()
            }
            items = {name: len(files) for name, files in batch.items.items()}
            lengths = [len(sample.tokens.ids) for sample in micro_batch]
            spans = [batch.seq_length] * size
            if batch.cu_seqlens is not None:
                ends = zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
                spans = [end - start for start, end in ends]
            count = functools.partial(
                training_flops,
                config,
                items=items,
                media_tokens=media_tokens,
                frozen=args.freeze,
                targets=sum(sum(sample.tokens.loss_mask) for sample in micro_batch),
            )
            tokens += sum(lengths)
            real += count(sequences=lengths)
            computed += count(sequences=spans)
        results.append((tokens, real, computed))
    return results


def _start_dry_run(flags: Sequence[str]) -> subprocess.Popen:
    """The plan of a run, made on processors that the run leaves idle."""
    script = str(ROOT / "examples/mimo/train.py")
    return subprocess.Popen(
        [sys.executable, script, *flags, "--dry-run", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def _planned_gib(planned: subprocess.Popen) -> float | None:
    """The total that a dry run gives for its only rank."""
    try:
        said, _ = planned.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        planned.kill()
        return None
    total = re.search(r"^ *stage 0 .* ([\d,.]+)$", said, re.MULTILINE)
    return float(total[1].replace(",", "")) / 1024 if total else None


def generate(model: str, prompt: int, tokens: int, batches: Sequence[tuple[int, bool]]) -> None:
    """Prefill and decode with random weights; `batches` are sizes, and whether with CUDA graphs."""
    from examples.mimo.cli import command

    command.prepare_environment()
    command.single_process_unless_launched()
    from examples.mimo import compat

    compat.install()
    import torch

    from examples.mimo.configs import get_model_config
    from examples.mimo.generation.engine import Engine, SequenceRequest
    from examples.mimo.planner.flops import language_layer_flops
    from examples.mimo.training.inputs import MockDataset

    config = get_model_config(model)
    built = random_model(config)
    weights = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in built.language_model.named_parameters()
        if not name.startswith("embedding.")
    )
    sample = MockDataset(config, prompt, 1, seed=3)[0]
    length = len(sample.tokens.ids)
    layers = language_layer_flops(config.language, length) * config.language.num_layers
    for batch, cuda_graphs in batches:
        engine = Engine(built, config, end_ids=(), cuda_graphs=cuda_graphs)

        def start(engine: Engine = engine, batch: int = batch) -> float:
            requests = [SequenceRequest(i, sample, tokens + 1) for i in range(batch)]
            return _seconds(lambda: engine.start(requests))

        try:
            start()
            while engine.sequences:  # graphs are captured, kernels chosen
                engine.step()
            prefill = start()
            decode = _seconds(functools.partial(_steps, engine, tokens))
        except torch.OutOfMemoryError as error:
            row(batch=batch, graphs=cuda_graphs, error=str(error).splitlines()[0][:160])
            continue
        cached = batch * (length + tokens / 2) * engine.transformer.bytes_per_token
        row(
            batch=batch,
            graphs=cuda_graphs,
            prompt=length,
            prefill_ms=1000 * prefill,
            prefill_tflops=layers.forward * batch / prefill / 1e12,
            token_ms=1000 * decode / tokens,
            tokens_per_second=batch * tokens / decode,
            decode_tbs=(weights + cached) * tokens / decode / 1e12,
        )


def _steps(engine: Any, count: int) -> None:
    for _ in range(count):
        engine.step()


def random_model(config: Any) -> Any:
    """The whole model with random weights in bf16, as `load_model` builds it for one process."""
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    from examples.mimo.checkpoint.loading import language_transformer_config, start_parallel
    from examples.mimo.model.mimo import build_mimo_model

    start_parallel(1, 1)
    dtype = torch.bfloat16
    model = build_mimo_model(
        config,
        language_transformer_config(config.language, 1, 1, dtype),
        ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model.to(device=torch.device("cuda"), dtype=dtype).eval()


def _seconds(work: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Run the case that the command line describes; only rows go to stdout."""
    # The package's commands and Megatron print there too.
    os.dup2(2, 1)
    options = json.loads(sys.argv[1])
    cases = {case.__name__: case for case in (device, tests, train, generate)}
    cases[options.pop("case")](**options)


if __name__ == "__main__":
    main()
