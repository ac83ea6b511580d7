"""Sampling options, and choosing the next token: the most likely one or a random one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from examples.mimo.modalities.values import upload

MAX_STOPS, MAX_STOP_LENGTH = 16, 200
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen; at temperature 0 always the most likely one.

    The order is Hugging Face's: `repetition_penalty` (arXiv:1909.05858) on the logits of tokens
    that occur in the prompt or the answer, `temperature`, the `top_k` most likely, then the
    smallest set with `top_p` of the probability (arXiv:1904.09751), then those with at least
    `min_p` of the largest probability (arXiv:2407.01082).

    OpenAI's two penalties follow the first, and look at the answer alone: a token that occurs in it
    c times loses `frequency_penalty` * c, and `presence_penalty` once, from its logit.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 2**31),
            "top_p": (1e-9, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3),
            "frequency_penalty": (-2.0, 2.0),
            "presence_penalty": (-2.0, 2.0),
            "seed": (0, 2**63 - 1),
        }
        for field in dataclasses.fields(self):
            value, (low, high) = getattr(self, field.name), limits[field.name]
            kind = int if isinstance(field.default, int) else int | float
            if not isinstance(value, kind) or not low <= value <= high:
                raise ValueError(
                    f"{field.name} {value!r:.30}: from {low:g} to {high:g}"
                    + (", a whole number" if kind is int else "")
                    + ("; temperature 0 is greedy" if field.name == "temperature" else "")
                )

    @property
    def has_penalty(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def with_seed_offset(self, offset: int) -> Sampling:
        """The sampling of another answer to the same prompt; offset 0 has the seed itself."""
        return dataclasses.replace(self, seed=(self.seed + offset) % 2**63)


GREEDY = Sampling()


@dataclass(frozen=True)
class Options:
    """How a prompt is answered; a string of `stops` ends the answer and is not part of it.

    With `logprobs` the answer's tokens come with their log-probabilities, and with those of the
    `top_logprobs` most likely tokens at each place.
    """

    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int) or self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens!r:.30}: at least 1")
        if not isinstance(self.top_logprobs, int) or not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(
                f"top_logprobs {self.top_logprobs!r:.30}: from 0 to {MAX_TOP_LOGPROBS}"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs {self.top_logprobs}: only with logprobs true")
        if len(self.stops) > MAX_STOPS:
            raise ValueError(f"stop holds {len(self.stops)} strings: at most {MAX_STOPS}")
        for stop in self.stops:
            if not 0 < len(stop) <= MAX_STOP_LENGTH:
                raise ValueError(
                    f"stop string of {len(stop)} characters: from 1 to {MAX_STOP_LENGTH}"
                )

    def with_seed_offset(self, offset: int) -> Options:
        """The options of another answer, whose random numbers are its own."""
        if self.sampling.temperature == 0:
            return self
        return dataclasses.replace(self, sampling=self.sampling.with_seed_offset(offset))


DEFAULT_OPTIONS = Options()


class SequenceGenerator:
    """Random numbers of one answer; they depend on its seed alone, not on its batch."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> float:
        """Draw a number from [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def choose(
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[SequenceGenerator],
    previous: Sequence[torch.Tensor],
    answered: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """(B, V) fp32 logits -> (B,) tokens; `previous[i]` are the ids in sequence i so far.

    `answered[i]` are those of them that the model chose. Neither is read without a penalty.
    """
    if any(s.has_penalty for s in samplings):
        logits = penalise(logits, samplings, previous, answered or [ids[:0] for ids in previous])
    tokens = logits.argmax(dim=-1)
    sampled = [index for index, s in enumerate(samplings) if s.temperature > 0]
    if sampled:
        rows = upload(torch.tensor(sampled), logits.device)
        chosen = [samplings[index] for index in sampled]
        weights = probabilities(logits.index_select(0, rows), chosen)
        numbers = torch.tensor([generators[index].next() for index in sampled], dtype=torch.float64)
        tokens.index_copy_(0, rows, _sample(weights, upload(numbers, logits.device)))
    return tokens


def fill_logprobs(
    columns: torch.Tensor,
    tokens: torch.Tensor,
    logits: torch.Tensor,
    forbidden: torch.Tensor,
    num_top: int,
) -> None:
    """Write the log-probabilities of (B,) `tokens` and of the `num_top` likeliest others.

    `columns` (B, 1 + 2 * num_top): those of the tokens, then the likeliest tokens, then theirs.
    """
    # That of a token which is hopelessly unlikely may be minus infinity, which is no JSON.
    logprobs = logits.log_softmax(dim=-1).clamp(min=torch.finfo(torch.float32).min)
    columns[:, 0] = logprobs.gather(1, tokens[:, None])[:, 0]
    if num_top:
        logprobs.index_fill_(1, forbidden, float("-inf"))
        # A vocabulary may hold fewer tokens; what is left over counts as forbidden.
        columns[:, 1 + num_top :] = float("-inf")
        top = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
        count = top.indices.shape[-1]
        columns[:, 1 : 1 + count] = top.indices
        columns[:, 1 + num_top : 1 + num_top + count] = top.values


def probabilities(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """(B, V) logits -> (B, V) fp64 probabilities after temperature, top-k, top-p and min-p."""

    def column(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        values = [getattr(s, name) for s in samplings]
        return upload(torch.tensor(values, dtype=dtype), logits.device)[:, None]

    # With the largest logit at 0 a tiny temperature makes none infinite.
    logits = logits.double()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / column("temperature")
    if any(s.top_k for s in samplings):
        logits = _keep_top_k(logits, [s.top_k for s in samplings])
    weights = logits.softmax(dim=-1)
    if any(s.top_p < 1.0 for s in samplings):
        weights = _keep_top_p(weights, column("top_p"))
    if any(s.min_p for s in samplings):
        threshold = weights.amax(dim=-1, keepdim=True) * column("min_p")
        weights = weights.where(weights >= threshold, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


def penalise(
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    previous: Sequence[torch.Tensor],
    answered: Sequence[torch.Tensor],
) -> torch.Tensor:
    """(B, V) logits -> (B, V) after the penalties; the ids are those that `choose` takes."""
    logits = logits.clone()
    sequences = zip(logits, samplings, previous, answered, strict=True)
    for sequence_logits, sampling, ids, answer in sequences:
        penalty = sampling.repetition_penalty
        if penalty != 1.0:
            values = sequence_logits[ids]
            sequence_logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            ones = torch.ones(len(answer), device=logits.device, dtype=logits.dtype)
            counts = torch.zeros_like(sequence_logits).index_add_(0, answer, ones)
            sequence_logits -= sampling.frequency_penalty * counts
            sequence_logits -= sampling.presence_penalty * (counts > 0)
    return logits


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    counts = [min(k or logits.shape[-1], logits.shape[-1]) for k in top_k]
    largest = logits.topk(max(counts), dim=-1).values
    threshold = largest.gather(-1, upload(torch.tensor(counts), logits.device)[:, None] - 1)
    return logits.masked_fill(logits < threshold, float("-inf"))


def _keep_top_p(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ordered, order = weights.sort(dim=-1, descending=True)
    # A token stays while the more likely ones do not reach top_p; so the likeliest always stays.
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.where((before < top_p) | (top_p >= 1.0), 0.0)
    return torch.zeros_like(weights).scatter_(-1, order, ordered)


def _sample(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """(B, V) probabilities and (B,) numbers from [0, 1) -> (B,) tokens, by the inverse CDF."""
    cumulative = weights.cumsum(dim=-1)
    tokens = torch.searchsorted(cumulative, (numbers * cumulative[:, -1])[:, None], right=True)
    return tokens[:, 0].clamp(max=weights.shape[-1] - 1)
