"""The forward pass for answering computes what Megatron's modules compute."""

import contextlib
import dataclasses
import weakref
from itertools import pairwise

import pytest
import torch

from examples.mimo.cli import command
from examples.mimo.generation.reuse import DecodingGraphs, DecodingStep, capture_on_cuda
from examples.mimo.generation.transformer import CachedTransformer, layer_weights

BATCH, LENGTH = 3, 90


def with_everything(tiny):
    """What Qwen2, Qwen3 and Llama 3 add, and one table for input and output less or more."""
    language = dataclasses.replace(
        tiny.language,
        qkv_bias=True,
        qk_norm=True,
        tie_embeddings=not tiny.language.tie_embeddings,
        rope_scaling_factor=8.0,
    )
    return dataclasses.replace(tiny, language=language)


@pytest.fixture(scope="module", params=["tiny", "with everything"])
def case(request, tiny, build_model):
    """A model with norms and biases that do something, its transformer, embeddings and logits."""
    torch.manual_seed(0)
    model = build_model(tiny if request.param == "tiny" else with_everything(tiny)).eval()
    ids = torch.randint(6, 400, (BATCH, LENGTH))
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter += 0.2 * torch.randn_like(parameter)
        return CachedTransformer(model), model.embed(ids, {}).transpose(0, 1), model(ids)


def new_cache(transformer, slots, length):
    cache = transformer.new_cache()
    cache.reserve(slots, length)
    return cache


def assert_logits(transformer, hidden, expected):
    result = transformer.logits(hidden.flatten(0, -2)).view(expected.shape)
    assert (result - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(70, 80), (8, 81), (75,), (3, 30, 85)])
def test_a_prompt_in_parts_and_then_token_by_token(case, cuts):
    transformer, embedded, expected = case
    cache = new_cache(transformer, BATCH + 1, LENGTH)
    ends = [*cuts, *range(cuts[-1] + 1, LENGTH + 1)]
    parts = [slice(start, end) for start, end in pairwise([0, *ends])]
    hidden = [transformer.forward(embedded[:, p], cache, 1, [p.start] * BATCH) for p in parts]
    assert_logits(transformer, torch.cat(hidden, dim=1), expected)


@torch.no_grad()
def test_sequences_of_different_lengths_decode_together(case):
    transformer, embedded, expected = case
    cache = new_cache(transformer, BATCH, LENGTH)
    transformer.forward(embedded[:, :-1], cache, 0, [0] * BATCH)
    starts = [7, 89, 32]
    tokens = torch.stack(
        [sequence[start, None] for sequence, start in zip(embedded, starts, strict=True)]
    )
    hidden = transformer.forward(tokens, cache, 0, starts)
    at = torch.stack(
        [sequence[start, None] for sequence, start in zip(expected, starts, strict=True)]
    )
    assert_logits(transformer, hidden, at)


@torch.no_grad()
def test_a_large_batch_computes_what_a_small_one_does(case):
    transformer, embedded, expected = case
    many, batch = embedded.repeat(6, 1, 1), 6 * BATCH
    cache = new_cache(transformer, batch, LENGTH)
    transformer.forward(many[:, :-1], cache, 0, [0] * batch)
    hidden = transformer.forward(many[:, -1:], cache, 0, [LENGTH - 1] * batch)
    assert_logits(transformer, hidden, expected[:, -1:].repeat(6, 1, 1))


@torch.no_grad()
def test_slots_move_and_the_cache_grows(case):
    transformer, embedded, expected = case
    cache = new_cache(transformer, BATCH, LENGTH)
    transformer.forward(embedded[:, :11], cache, 0, [0] * BATCH)
    apart = cache.copy_slot(2, 11)
    cache.reserve(5, 300)
    assert (cache.batch_size, cache.length) == (5, 384)
    cache.write_slot(3, cache, 1, 11)
    cache.write_slot(4, apart, 0, 11)
    hidden = transformer.forward(embedded[1:, 11:], cache, 3, [11, 11])
    assert_logits(transformer, hidden, expected[1:, 11:])


def test_a_parameter_that_nobody_knows_is_refused(case):
    transformer, *_ = case
    layer = transformer.language.decoder.layers[0]
    layer.register_parameter("gamma", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="does not know the parameter gamma of a language layer"):
        layer_weights(layer, 1e-5)
    del layer.gamma


def test_a_capture_survives_what_other_threads_call(case, monkeypatch):
    """As Megatron's own captures: NCCL and a server have threads that call CUDA."""
    transformer, embedded, _ = case
    modes = []

    class Graph:
        def replay(self):
            pass

    @contextlib.contextmanager
    def graph(graph, **settings):
        modes.append(settings.get("capture_error_mode"))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    cache = new_cache(transformer, BATCH, LENGTH)
    step = DecodingStep(transformer, cache, BATCH)
    with torch.no_grad():
        step.fill(embedded[:, :1], [0] * BATCH)
        capture_on_cuda(step)
    assert modes == ["thread_local"]


class Recorded:
    """Stands for a graph; in a reference cycle, as what a server holds is."""

    def __init__(self, step):
        self.step, self.itself = step, self

    def __call__(self):
        return self.step.run()


@torch.no_grad()
def test_graphs_go_before_the_process_group_does(case, monkeypatch):
    """NCCL waits for a graph that holds its kernels, and the process would not end."""
    transformer, embedded, _ = case
    recorded, alive = [], []

    def capture(step):
        replay = Recorded(step)
        recorded.append(weakref.ref(replay))
        return replay

    def destroy():
        alive.append([graph() is not None for graph in recorded])

    graphs, gone = DecodingGraphs(transformer, capture), DecodingGraphs(transformer, capture)
    cache = new_cache(transformer, BATCH, LENGTH)
    for size in (3, 2, 3):
        graphs.forward(embedded[:size, :1], cache, [0] * size)
    assert [graph() is not None for graph in recorded] == [True, True]
    del gone
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroy)
    command.leave_process_group()
    assert alive == [[False, False]]


@torch.no_grad()
def test_a_cache_that_is_replaced_or_grows_is_freed_although_graphs_remember_it(case):
    transformer, embedded, _ = case
    graphs = DecodingGraphs(transformer, Recorded)
    cache = new_cache(transformer, BATCH, LENGTH)
    expected = graphs.forward(embedded[:, :1], cache, [0] * BATCH).clone()
    keys, values = weakref.ref(cache.keys), weakref.ref(cache.values)
    cache.reserve(BATCH + 1, 300)
    assert keys() is values() is None
    assert torch.allclose(graphs.forward(embedded[:, :1], cache, [0] * BATCH), expected, atol=1e-6)
    keys = weakref.ref(cache.keys)
    cache = new_cache(transformer, BATCH, LENGTH)
    assert keys() is None
