"""Tokens are drawn from the distribution that each sampler states."""

import math

import pytest
import torch
from transformers import generation

from examples.mimo.generation.sampling import (
    Options,
    Sampling,
    SequenceGenerator,
    choose,
    penalise,
    probabilities,
)

VOCABULARY, DRAWN = 12, 20_000
# The chance that a right sampler fails a case.
LEVEL = 1e-4
CASES = {
    "temperature": Sampling(temperature=0.7),
    "hot": Sampling(temperature=3.0),
    "top k": Sampling(temperature=1.0, top_k=4),
    "top p": Sampling(temperature=1.0, top_p=0.8),
    "min p": Sampling(temperature=1.0, min_p=0.1),
    "repetition penalty": Sampling(temperature=1.0, repetition_penalty=1.8),
    "frequency penalty": Sampling(temperature=1.0, frequency_penalty=0.9),
    "presence penalty": Sampling(temperature=1.0, presence_penalty=-1.4),
    "all": Sampling(*(1.3, 9, 0.9, 0.05, 1.3), frequency_penalty=0.4, presence_penalty=0.3),
}


@pytest.fixture(scope="module")
def logits():
    return 1.5 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3))


def exactly(logits, sampling, seen):
    """The probabilities in plain arithmetic, one token after the other."""
    values = logits[0].tolist()
    for token in set(seen):
        factor = sampling.repetition_penalty
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    # OpenAI's formula, over the answer alone: here the last two tokens.
    for token in seen[-2:]:
        values[token] -= sampling.frequency_penalty
    for token in set(seen[-2:]):
        values[token] -= sampling.presence_penalty
    values = [value / sampling.temperature for value in values]
    order = sorted(range(VOCABULARY), key=lambda i: -values[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {i: math.exp(values[i]) for i in order}
    total, before, kept = sum(weights.values()), 0.0, {}
    for i in order:
        if before < sampling.top_p * total:
            kept[i] = weights[i]
        before += weights[i]
    largest = max(kept.values())
    kept = {i: w for i, w in kept.items() if w >= sampling.min_p * largest}
    return [kept.get(i, 0.0) / sum(kept.values()) for i in range(VOCABULARY)]


def chi_square_bound(freedom):
    """The quantile at 1 - LEVEL, by Wilson and Hilferty's approximation."""
    z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1.0 - LEVEL)).item()
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("name", CASES)
def test_what_is_drawn_has_the_exact_distribution(logits, name):
    sampling, seen = CASES[name], [0, 7, 3, 3]
    expected = exactly(logits, sampling, seen)
    generator = SequenceGenerator(11)
    ids = torch.tensor(seen)
    batch = logits.expand(100, -1)
    counts = torch.zeros(VOCABULARY)
    for _ in range(DRAWN // 100):
        previous, answered = [ids] * 100, [ids[-2:]] * 100
        result = choose(batch, [sampling] * 100, [generator] * 100, previous, answered)
        counts += result.bincount(minlength=VOCABULARY)
    assert counts.sum() == DRAWN
    possible = [i for i, p in enumerate(expected) if p]
    assert sum(int(counts[i]) for i in possible) == DRAWN
    statistic = sum(
        (counts[i] - DRAWN * expected[i]) ** 2 / (DRAWN * expected[i]) for i in possible
    )
    assert statistic < chi_square_bound(len(possible) - 1)


def test_the_test_sees_a_wrong_distribution(logits):
    """A temperature that is a tenth off fails the bound, without any noise of drawing."""
    expected = exactly(logits, Sampling(temperature=1.0), [])
    other = exactly(logits, Sampling(temperature=1.1), [])
    statistic = sum(DRAWN * (o - w) ** 2 / w for o, w in zip(other, expected, strict=True))
    assert statistic > chi_square_bound(VOCABULARY - 1)


@pytest.mark.parametrize("name", CASES)
def test_the_probabilities_are_transformers(logits, name):
    sampling, seen = CASES[name], torch.tensor([[0, 7, 3, 3]])
    steps = [generation.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    steps.append(generation.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(generation.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(generation.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(generation.MinPLogitsWarper(sampling.min_p))
    theirs = logits.clone()
    for step in steps:
        theirs = step(seen, theirs)
    penalised = penalise(logits, [sampling], [seen[0]], [seen[0, -2:]])
    result = probabilities(penalised, [sampling])
    if not (sampling.frequency_penalty or sampling.presence_penalty):  # which they lack
        assert (result - theirs.softmax(dim=-1)).abs().max() < 1e-6
    assert result[0].tolist() == pytest.approx(
        exactly(logits, sampling, seen[0].tolist()), abs=1e-6
    )


def test_sequences_are_sampled_each_with_its_own_options(logits):
    rules = [Sampling(), CASES["top k"], Sampling(), CASES["all"]]
    seen = [torch.tensor([0])] * 4
    generators = [SequenceGenerator(n) for n in range(4)]
    together = choose(logits.expand(4, -1), rules, generators, seen, seen)
    for number, rule in enumerate(rules):
        one = [seen[number]]
        alone = choose(logits, [rule], [SequenceGenerator(number)], one, one)
        assert together[number] == alone[0]
    assert together[0] == together[2] == logits.argmax()


def test_the_tiniest_temperature_is_greedy(logits):
    forbidden = logits.clone()
    forbidden[0, -1] = float("-inf")
    for temperature in (5e-324, 1e-310, 1e-30):
        result = choose(forbidden, [Sampling(temperature)], [SequenceGenerator(0)], [])
        assert result[0] == forbidden.argmax()


def test_penalties_of_an_answer_that_has_not_begun_change_nothing(logits):
    sampling = Sampling(frequency_penalty=2.0, presence_penalty=2.0)
    prompt, none = torch.tensor([int(logits.argmax())] * 3), torch.zeros(0, dtype=torch.long)
    assert torch.equal(penalise(logits, [sampling], [prompt], [none]), logits)
    assert choose(logits, [sampling], [SequenceGenerator(0)], [prompt])[0] == logits.argmax()


def test_a_forbidden_token_is_never_drawn(logits):
    forbidden = logits.clone()
    forbidden[0, [1, 4]] = float("-inf")
    hot = Sampling(temperature=50.0)
    generator = SequenceGenerator(0)
    result = {int(choose(forbidden, [hot], [generator], [])[0]) for _ in range(2_000)}
    assert result == set(range(VOCABULARY)) - {1, 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature -1.0: from 0 to 100; temperature 0 is greedy"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"min_p": 1.5}, "min_p 1.5: from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"frequency_penalty": 2.5}, "frequency_penalty 2.5: from -2 to 2"),
        ({"presence_penalty": -2.1}, "presence_penalty -2.1: from -2 to 2"),
        ({"presence_penalty": float("nan")}, "presence_penalty nan"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    ("top", "logprobs", "message"),
    [
        (21, True, "top_logprobs 21: from 0 to 20"),
        (-1, True, "top_logprobs -1"),
        (1, False, "top_logprobs 1: only with logprobs true"),
    ],
)
def test_so_many_top_logprobs_and_only_beside_logprobs(top, logprobs, message):
    with pytest.raises(ValueError, match=message):
        Options(logprobs=logprobs, top_logprobs=top)
