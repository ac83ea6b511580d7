"""What only a CUDA device can show; `make gpu-check` runs these."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.checkpoint.loading import load_model
from examples.mimo.cli import command
from examples.mimo.data.batch import to_device
from examples.mimo.generation.engine import Engine, SequenceRequest
from examples.mimo.training.inputs import MockDataset
from tests.gpu import comparison
from tests.helpers.commands import launch_command, python_path
from tests.helpers.ranks import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

RUN = ("--train-iters", "5", "--micro-batch-size", "4", "--global-batch-size", "4", "--seed", "3")


def losses(tmp_path, *flags, processes=0):
    metrics = tmp_path / "metrics.jsonl"
    done = launch_command(
        "train.py", *RUN, *flags, "--metrics-file", str(metrics), processes=processes
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(row["peak_memory_bytes"] > 0 for row in rows)
    return [row["loss"] for row in rows]


def test_bf16_follows_fp32(tmp_path):
    (tmp_path / "fp32").mkdir()
    (tmp_path / "bf16").mkdir()
    exact = losses(tmp_path / "fp32")
    assert losses(tmp_path / "bf16", "--bf16") == pytest.approx(exact, rel=2e-2)


@two_gpus
@pytest.mark.parametrize(
    "flags",
    [
        ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        ("--pipeline-model-parallel-size", "2"),
        ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ],
)
def test_layouts_over_nccl_follow_one_device(tmp_path, flags, start):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = losses(tmp_path / "one", "--bf16", *start)
    two = losses(tmp_path / "two", "--bf16", *start, *flags, processes=2)
    assert two == pytest.approx(one, rel=2e-2)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Flags that start from one checkpoint: each layout draws random weights of its own."""
    folder = tmp_path_factory.mktemp("start")
    save = ("--train-iters", "2", "--save", str(folder), "--save-interval", "2", "--no-save-optim")
    done = launch_command("train.py", *RUN, "--bf16", *save)
    assert done.returncode == 0, done.stderr
    return "--load", str(folder), "--finetune"


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_saved_model_answers_in_bf16(start, cuda_graphs):
    _, folder, *_ = start
    opened = open_checkpoint(Path(folder))
    command.single_process_unless_launched()
    model = load_model(opened)
    assert all(p.is_cuda and p.dtype == torch.bfloat16 for p in model.parameters())
    engine = Engine(model, opened.config, end_ids=(), cuda_graphs=cuda_graphs)
    samples = MockDataset(opened.config, 96, 3, seed=3)
    outputs = engine.start([SequenceRequest(i, samples[i], 6, logprobs=True) for i in range(3)])
    while engine.sequences:
        outputs += engine.step()
    assert [o.finish for o in outputs] == [None] * 15 + ["length"] * 3
    assert all(0 <= o.token < opened.config.vocab_size for o in outputs)


@torch.no_grad()
def test_cuda_graphs_compute_what_the_layers_do(tiny):
    from examples.mimo.generation.reuse import DecodingGraphs
    from examples.mimo.generation.transformer import CachedTransformer

    torch.manual_seed(0)
    model = comparison.build(tiny).eval().cuda()
    transformer = CachedTransformer(model)
    graphs = DecodingGraphs(transformer)
    caches = [transformer.new_cache() for _ in range(2)]
    prompt = torch.randn(3, 70, tiny.language.hidden_size, device="cuda")
    for cache in caches:
        cache.reserve(3, 200)
        transformer.forward(prompt, cache, 0, [0, 0, 0])
    for rows, starts in ((3, [70, 70, 70]), (3, [71, 30, 7]), (2, [72, 31]), (3, [73, 32, 8])):
        token = torch.randn(rows, 1, tiny.language.hidden_size, device="cuda")
        expected = transformer.forward(token, caches[0], 0, starts)
        result = graphs.forward(token, caches[1], starts)
        assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()
        # Larger tensors, so that the next step is captured anew.
        for cache in caches:
            cache.reserve(3, cache.length + 128)


def test_a_models_losses_on_cuda_equal_the_cpus(tiny, tmp_path):
    file = tmp_path / "cpu.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.comparison", str(file)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    on_cpu = torch.load(file)
    torch.backends.cudnn.allow_tf32 = False  # for convolutions it is on, and rounds to 10 bits
    model = comparison.build(tiny).cuda()
    kept = model.load_state_dict(on_cpu["weights"], strict=False)
    assert not kept.unexpected_keys
    assert all("_extra_state" in key for key in kept.missing_keys)
    batch = to_device(comparison.batch_of(tiny), torch.device("cuda"))
    with torch.no_grad():
        result = model(batch.input_ids, batch.labels, batch.modality_inputs)
    assert result.is_cuda
    assert (result.cpu() - on_cpu["losses"]).abs().max() < 1e-4
