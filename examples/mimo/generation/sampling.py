"""Which token comes next: the most likely one, or one drawn from a distribution that is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen; at temperature 0 the most likely one.

    The order is Hugging Face's: `repetition_penalty` (arXiv:1909.05858) on the logits of tokens
    that the prompt or the answer holds, `temperature`, the `top_k` most likely, then the fewest
    with `top_p` of the probability (arXiv:1904.09751), then those with at least `min_p` of the
    likeliest one's (arXiv:2407.01082).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 2**31),
            "top_p": (1e-9, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 1e3),
            "seed": (0, 2**63 - 1),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} {getattr(self, name)!r:.30}: from {low:g} to {high:g}"
                    + ("; temperature 0 is greedy" if name == "temperature" else "")
                )


GREEDY = Sampling()


class SequenceGenerator:
    """The random numbers of one answer: the same for a seed, whatever is answered beside it."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> float:
        """A number from [0, 1)."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))


def choose(
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    draws: Sequence[SequenceGenerator],
    seen: Sequence[torch.Tensor],
) -> torch.Tensor:
    """(B, V) fp32 logits -> (B,) tokens; `seen[i]` are the ids that row i holds already."""
    if any(s.repetition_penalty != 1.0 for s in samplings):
        logits = _penalise(logits, samplings, seen)
    chosen = logits.argmax(dim=-1)
    drawn = [index for index, s in enumerate(samplings) if s.temperature > 0]
    if drawn:
        weights = probabilities(logits[drawn], [samplings[index] for index in drawn])
        numbers = torch.tensor([draws[index].next() for index in drawn], dtype=torch.float64)
        chosen[drawn] = _draw(weights, numbers.to(logits.device))
    return chosen


def probabilities(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """(B, V) logits -> (B, V) fp64 probabilities of what each row's sampling leaves."""

    def column(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        values = [getattr(s, name) for s in samplings]
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]

    # The largest becomes 0 first, lest a tiny temperature makes it infinite.
    logits = logits.double()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / column("temperature")
    if any(s.top_k for s in samplings):
        logits = _keep_top_k(logits, [s.top_k for s in samplings])
    weights = logits.softmax(dim=-1)
    if any(s.top_p < 1.0 for s in samplings):
        weights = _keep_top_p(weights, column("top_p"))
    if any(s.min_p for s in samplings):
        least = weights.amax(dim=-1, keepdim=True) * column("min_p")
        weights = weights.where(weights >= least, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


def _penalise(
    logits: torch.Tensor, samplings: Sequence[Sampling], seen: Sequence[torch.Tensor]
) -> torch.Tensor:
    logits = logits.clone()
    for row, sampling, ids in zip(logits, samplings, seen, strict=True):
        if sampling.repetition_penalty != 1.0:
            held = row[ids]
            factor = sampling.repetition_penalty
            row[ids] = torch.where(held > 0, held / factor, held * factor)
    return logits


def _keep_top_k(logits: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    most = [min(count or logits.shape[-1], logits.shape[-1]) for count in counts]
    largest = logits.topk(max(most), dim=-1).values
    last = largest.gather(-1, torch.tensor(most, device=logits.device)[:, None] - 1)
    return logits.masked_fill(logits < last, float("-inf"))


def _keep_top_p(weights: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    ordered, places = weights.sort(dim=-1, descending=True)
    # A token stays while those before it do not have enough; so the first one always does.
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.where((before < wanted) | (wanted >= 1.0), 0.0)
    return torch.zeros_like(weights).scatter_(-1, places, ordered)


def _draw(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """(B, V) probabilities and (B,) numbers from [0, 1) -> (B,) tokens, by the inverse CDF."""
    reached = weights.cumsum(dim=-1)
    found = torch.searchsorted(reached, (numbers * reached[:, -1])[:, None], right=True)
    return found[:, 0].clamp(max=weights.shape[-1] - 1)


def numbered(sampling: Sampling, number: int) -> Sampling:
    """For the answer of this number to one prompt; the first one has the seed itself."""
    return dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**63)
