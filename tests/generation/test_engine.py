"""Continuous batching and prefix reuse choose the tokens that answering alone does."""

import dataclasses
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.mimo.data.conversation import Sample, TokenSequence
from examples.mimo.generation import engine as engine_file
from examples.mimo.generation.engine import Engine, SequenceRequest
from examples.mimo.generation.reuse import (
    DecodingGraphs,
    PrefixCache,
    prompt_units,
    usable_length,
)
from examples.mimo.generation.sampling import Sampling, SequenceGenerator, probabilities

PICTURE, SOUND = 4, 5
HOT = Sampling(temperature=2.0, seed=5)


@pytest.fixture(scope="module")
def model(tiny, build_model):
    torch.manual_seed(1)
    return build_model(tiny).eval()


def words(count, seed):
    return torch.randint(6, 400, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def sample(config, parts, name="s"):
    """A prompt of parts: words, or (modality, seed) for an item."""
    ids, media = [], defaultdict(list)
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        modality, seed = part
        encoder = config.modalities[modality].encoder
        item = encoder.mock_inputs(torch.Generator().manual_seed(seed))
        media[modality].append(item)
        ids += [config.modalities[modality].token_id] * encoder.num_tokens(item)
    tokens = TokenSequence(ids, [0] * len(ids), [0] * len(ids))
    return Sample(
        name, tokens, dict(media), {key: ["drawn"] * len(of) for key, of in media.items()}
    )


def drain(engine, outputs):
    result = defaultdict(list)
    while True:
        for output in outputs:
            result[output.number].append(output.token)
        if not engine.sequences:
            return dict(result)
        outputs = engine.step()


def answer(model, config, requests, **more):
    engine = Engine(model, config, end_ids=(), **more)
    return drain(engine, engine.start(requests))


def mixed_requests(config):
    parts = [
        [words(9, 1)],
        [("images", 1), words(9, 2)],
        [words(3, 3), ("audios", 2), words(30, 4), ("images", 3)],
        [words(9, 5)],
        [("images", 1), ("images", 2), words(60, 6)],
        [words(1, 7)],
    ]
    samples = [sample(config, of) for of in parts]
    return [
        SequenceRequest(n, s, 5 + 3 * n, dataclasses.replace(HOT, seed=n) if n % 2 else Sampling())
        for n, s in enumerate(samples)
    ]


def test_answers_together_are_those_of_each_alone(model, tiny):
    requests = mixed_requests(tiny)
    together = answer(model, tiny, requests)
    alone = {request.number: answer(model, tiny, [request])[request.number] for request in requests}
    assert together == alone
    assert [len(together[n]) for n in range(6)] == [5, 8, 11, 14, 17, 20]


def test_sequences_join_later_and_are_stopped(model, tiny):
    requests = mixed_requests(tiny)
    whole = answer(model, tiny, requests)
    engine = Engine(model, tiny, end_ids=())
    outputs = engine.start(requests[3:])
    outputs += engine.step()
    engine.stop(4)
    assert [s.request.number for s in engine.sequences] == [3, 5]
    outputs += engine.start(requests[:3])
    result = drain(engine, outputs)
    assert result.pop(4) == whole.pop(4)[:2]
    assert result == whole
    engine.stop(4)


class Recorded(TorchDispatchMode):
    """The operations of a step, which run again on the same tensors, as a CUDA graph's do."""

    def __init__(self, step):
        super().__init__()
        self.calls = []
        with self:
            self.hidden = step.run()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __call__(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.hidden


def test_steps_that_are_replayed_choose_the_same_tokens(model, tiny, monkeypatch):
    captured = []

    def capture(step):
        captured.append((len(step.positions), step.cache.length))
        return Recorded(step)

    monkeypatch.setattr(engine_file, "DecodingGraphs", lambda of: DecodingGraphs(of, capture))
    requests = mixed_requests(tiny)
    expected = answer(model, tiny, requests[:3])
    engine = Engine(model, tiny, end_ids=(), cuda_graphs=True)
    result = drain(engine, engine.start(requests[:3]))
    assert result == expected
    # Of 5, 8 and 11 tokens: three sequences decode, then two, then one, each captured once.
    length = engine.cache.length
    assert captured == [(3, length), (2, length), (1, length)]
    assert drain(engine, engine.start(requests[:3])) == expected
    assert len(captured) == 3
    longer = dataclasses.replace(requests[0], max_new_tokens=length)
    assert drain(engine, engine.start([longer])) == answer(model, tiny, [longer])
    assert captured[3:] == [(1, engine.cache.length)]


def test_any_of_the_end_tokens_ends_a_sequence(model, tiny):
    requests = mixed_requests(tiny)[:4]
    whole = answer(model, tiny, requests)
    ends = {whole[3][6], whole[0][-2]}
    engine = Engine(model, tiny, end_ids=ends)
    result = drain(engine, engine.start(requests))
    cut = {}
    for number, tokens in whole.items():
        places = [tokens.index(end) for end in ends if end in tokens]
        cut[number] = tokens[: min(places, default=len(tokens)) + 1]
    assert result == cut
    assert len(result[3]) <= 7
    assert len(result[0]) < len(whole[0])


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(frequency_penalty=-1.5, presence_penalty=0.4),
        Sampling(presence_penalty=-2.0),
        Sampling(1.5, frequency_penalty=-0.3, repetition_penalty=1.1, seed=3),
    ],
)
def test_penalties_and_top_logprobs_are_those_of_plain_arithmetic(model, tiny, sampling):
    """Each step from a forward pass over everything before it, its penalties counted by hand."""
    prompt = sample(tiny, [words(9, 2)])
    forbidden, top, steps = {7, 8, 9}, 4, 24
    engine = Engine(model, tiny, end_ids=(), forbidden=forbidden)
    request = SequenceRequest(0, prompt, steps, sampling, logprobs=True, top_logprobs=top)
    other = SequenceRequest(1, sample(tiny, [words(9, 5)]), steps, logprobs=True, top_logprobs=1)
    outputs = engine.start([request, other])
    while engine.sequences:
        outputs += engine.step()
    assert all(len(output.top_logprobs) == 1 for output in outputs if output.number == 1)

    ids, answer, generator = list(prompt.tokens.ids), [], SequenceGenerator(sampling.seed)
    unpenalised = []
    for output in (output for output in outputs if output.number == 0):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), modality_inputs={})[0, -1]
        logprobs = logits.log_softmax(dim=-1)
        allowed = [i for i in range(len(logits)) if i not in forbidden]
        best = sorted(allowed, key=lambda i: -logprobs[i])[:top]
        assert [token for token, _ in output.top_logprobs] == best
        expected = [float(logprobs[token]) for token in best]
        assert [value for _, value in output.top_logprobs] == pytest.approx(expected, abs=1e-4)
        assert output.logprob == pytest.approx(float(logprobs[output.token]), abs=1e-4)
        values = logits.clone()
        for token in set(ids):
            factor = sampling.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        for token in range(len(values)):
            count = answer.count(token)
            values[token] -= sampling.frequency_penalty * count
            values[token] -= sampling.presence_penalty * min(count, 1)
        values[list(forbidden)] = float("-inf")
        if sampling.temperature:
            weights = probabilities(values[None], [sampling])[0].cumsum(0)
            chosen = int(torch.searchsorted(weights, generator.next() * weights[-1], right=True))
        else:
            chosen = int(values.argmax())
        assert output.token == chosen
        unpenalised.append(chosen == best[0])
        answer.append(chosen)
        ids.append(chosen)
    assert len(answer) == steps
    # The penalties decided some of the tokens.
    assert not all(unpenalised)


class Watch:
    """How many tokens went through the layers, and what was encoded."""

    def __init__(self, engine, monkeypatch):
        self.tokens, self.encoded = 0, []
        forward = engine.transformer.forward

        def counted(hidden, *more):
            self.tokens += hidden.shape[0] * hidden.shape[1]
            return forward(hidden, *more)

        monkeypatch.setattr(engine.transformer, "forward", counted)
        encode = engine.model.run_encoder

        def noted(name, inputs):
            self.encoded.append(name)
            return encode(name, inputs)

        monkeypatch.setattr(engine.model, "run_encoder", noted)


def questions(config):
    media = [("images", 1), words(20, 1), ("audios", 2)]
    return [sample(config, [*media, words(8, seed)]) for seed in (11, 12, 13)]


def test_a_second_question_about_the_same_media_reuses_the_prefix(model, tiny, monkeypatch):
    first, second, _ = questions(tiny)
    expected = answer(model, tiny, [SequenceRequest(1, second, 6)])[1]
    engine = Engine(model, tiny, end_ids=(), prefix_cache=2)
    drain(engine, engine.start([SequenceRequest(0, first, 6)]))
    watch = Watch(engine, monkeypatch)
    # Log-probabilities of the answer are no reason to work through the prompt.
    assert (
        drain(engine, engine.start([SequenceRequest(1, second, 6, logprobs=True)]))[1] == expected
    )
    assert watch.encoded == []
    assert watch.tokens == 8 + 5


def test_questions_prefilled_together_share_the_prefix(model, tiny, monkeypatch):
    requests = [SequenceRequest(n, s, 6) for n, s in enumerate(questions(tiny))]
    expected = answer(model, tiny, requests)
    engine = Engine(model, tiny, end_ids=(), prefix_cache=2)
    watch = Watch(engine, monkeypatch)
    assert drain(engine, engine.start(requests)) == expected
    assert watch.encoded == ["images", "audios"]
    length = len(requests[0].sample.tokens.ids)
    assert watch.tokens == length + 2 * 8 + 3 * 5


def test_a_conversation_reuses_its_earlier_turns(model, tiny, monkeypatch):
    first = sample(tiny, [("images", 1), words(30, 1)])
    engine = Engine(model, tiny, end_ids=(), prefix_cache=1)
    said = drain(engine, engine.start([SequenceRequest(0, first, 6)]))[0]
    second = sample(tiny, [("images", 1), words(30, 1) + said + words(4, 9)])
    expected = answer(model, tiny, [SequenceRequest(1, second, 6)])[1]
    watch = Watch(engine, monkeypatch)
    assert drain(engine, engine.start([SequenceRequest(1, second, 6)]))[1] == expected
    assert watch.encoded == []
    # The answer's last token was never worked through.
    assert watch.tokens == 1 + 4 + 5


def test_another_picture_is_not_reused(model, tiny, monkeypatch):
    engine = Engine(model, tiny, end_ids=(), prefix_cache=2)
    drain(
        engine, engine.start([SequenceRequest(0, sample(tiny, [words(40, 1), ("images", 1)]), 3)])
    )
    other = sample(tiny, [words(40, 1), ("images", 2), words(4, 2)])
    expected = answer(model, tiny, [SequenceRequest(1, other, 6)])[1]
    watch = Watch(engine, monkeypatch)
    assert drain(engine, engine.start([SequenceRequest(1, other, 6)]))[1] == expected
    assert watch.encoded == ["images"]
    assert watch.tokens == 16 + 4 + 5


def test_a_prompt_that_broke_off_is_not_reused(model, tiny, monkeypatch):
    first, second, _ = questions(tiny)
    expected = answer(model, tiny, [SequenceRequest(1, second, 6)])[1]
    engine = Engine(model, tiny, end_ids=(), prefix_cache=2)

    def broken(*inputs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.transformer, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.start([SequenceRequest(0, first, 6)])
    engine.stop(0)
    assert not engine.sequences
    assert drain(engine, engine.start([SequenceRequest(1, second, 6)]))[1] == expected


def test_what_is_aborted_leaves_the_others_as_they_were(model, tiny, monkeypatch):
    requests = mixed_requests(tiny)
    whole = answer(model, tiny, requests)
    engine = Engine(model, tiny, end_ids=(), prefix_cache=2)
    drain(engine, engine.start([dataclasses.replace(requests[4], number=9)]))
    outputs = engine.start(requests[3:])
    outputs += engine.step()
    forward, calls = engine.transformer.forward, []

    def broken(*inputs):
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("no")
        return forward(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(engine.transformer, "forward", broken)
        with pytest.raises(RuntimeError, match="no"):
            engine.start(requests[:3])
    # The first prompt was through, the second on its way.
    assert [s.request.number for s in engine.sequences] == [3, 4, 5, 0, 1]
    engine.abort([0, 1, 2])
    assert [s.request.number for s in engine.sequences] == [3, 4, 5]
    assert not engine.prefix_cache.sequences
    result = drain(engine, outputs)
    assert result == {number: whole[number] for number in (3, 4, 5)}
    engine.start(requests)
    engine.abort()
    assert not engine.sequences
    assert engine.cache.batch_size == 0
    assert drain(engine, engine.start(requests)) == whole


def test_only_whole_items_are_reused(tiny):
    prompt = prompt_units(sample(tiny, [words(3, 1), ("images", 1), words(2, 2)]), tiny)
    assert prompt.items == [("images", 0, 3, 19)]
    assert [usable_length(n, prompt) for n in (0, 2, 3, 4, 18, 19, 20, 21)] == [
        *(0, 2, 3, 3, 3, 19, 20, 20)
    ]


def test_the_prefix_cache_keeps_the_most_recently_used():
    class Units:
        items = ()

        def __init__(self, units):
            self.units = units

    store = PrefixCache(2)
    store.add([1, 2, 3], "a")
    store.add([1, 2, 3, 4], "b")
    assert [cache for _, cache in store.sequences.values()] == ["b"]
    store.add([5, 6], "c")
    assert store.find(Units([1, 2, 9])) == (2, "b")
    store.add([7, 8], "d")
    assert store.find(Units([5, 6, 7])) == (0, None)
    store.add([], "e")
    assert store.find(Units([1, 2, 3, 4, 5])) == (4, "b")
    store = PrefixCache(0)
    store.add([1], "a")
    assert not store.sequences
