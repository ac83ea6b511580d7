"""What only a CUDA device can show; `make gpu-check` runs these first."""

import json

import pytest
import torch

from examples.mimo.data.batch import collate, to_device
from examples.mimo.data.datasets import MockDataset
from tests.helpers.commands import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

RUN = ("--train-iters", "5", "--micro-batch-size", "4", "--global-batch-size", "4", "--seed", "3")


def losses(tmp_path, *flags, processes=0):
    metrics = tmp_path / "metrics.jsonl"
    done = run_command(
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
def test_layouts_over_nccl_follow_one_device(tmp_path, flags):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = losses(tmp_path / "one", "--bf16")
    assert losses(tmp_path / "two", "--bf16", *flags, processes=2) == pytest.approx(one, rel=2e-2)


def test_a_saved_model_answers_in_bf16(tmp_path):
    done = run_command("train.py", *RUN, "--bf16", "--save", str(tmp_path), "--save-interval", "5")
    assert done.returncode == 0, done.stderr
    generated = run_benchmark("--generate", str(tmp_path))
    assert json.loads(generated.stdout.splitlines()[-1])["tokens_per_second"] > 0


@torch.no_grad()
def test_cuda_graphs_compute_what_the_layers_do(tiny, build_model):
    from examples.mimo.generation.reuse import DecodingGraphs
    from examples.mimo.generation.transformer import CachedTransformer

    torch.manual_seed(0)
    model = build_model(tiny).eval().cuda()
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
    model.cpu()


def run_benchmark(*flags):
    return run_command("../../benchmarks/gpu_check.py", *flags)


def test_a_models_losses_on_cuda_equal_the_cpus(tiny, build_model):
    model = build_model(tiny).cuda()
    batch = collate([MockDataset(tiny, 128, 4, seed=0)[i] for i in range(4)])
    there = to_device(batch, torch.device("cuda"))
    with torch.no_grad():
        result = model(there.input_ids, there.labels, there.modality_inputs).cpu()
        expected = model.cpu()(batch.input_ids, batch.labels, batch.modality_inputs)
    assert (result - expected).abs().max() < 1e-4
