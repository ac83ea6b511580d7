"""Sampling options, the grammar of answers, and choosing the next token by both.

An answer is text, and outputs in it: a begin marker, whole units of codes, an end marker. The
grammar keeps it so, whatever the model would say and however it is sampled, so every output can be
decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from examples.mimo.configs.schema import MimoConfig, OutputModality
from examples.mimo.data.tokenizer import Tokenizer, is_ordinary_token
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
    `top_logprobs` most likely tokens at each place. `outputs` are the modalities that it may put
    out beside text, by default all that the model has; where it would begin another one, the answer
    ends.
    """

    max_new_tokens: int = 64
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    outputs: tuple[str, ...] | None = None

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


def check_outputs(names: object, config: MimoConfig) -> tuple[str, ...]:
    """The outputs that are asked for; ValueError, one line, for one that the model lacks."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"outputs must be a list of modalities, not {names!r:.60}")
    for name in names:
        if name not in config.outputs:
            raise ValueError(
                f"outputs: {name!r:.60}, but {config.name} puts out "
                f"{', '.join(['text', *config.outputs])}"
            )
    return tuple(names)


def forbidden_tokens(tokenizer: Tokenizer, config: MimoConfig) -> set[int]:
    """Ids that no text may hold: padding of the vocabulary, placeholders, the padding token.

    Many tokenizers pad with the end-of-text token, and some with a word; both stay allowed.
    """
    beyond = range(tokenizer.size, config.language.vocab_size)
    placeholders = (modality.token_id for modality in config.inputs.values())
    pad_id = tokenizer.pad_id
    padding = {pad_id} if pad_id >= 0 and not is_ordinary_token(tokenizer, pad_id) else set()
    return {*beyond, *placeholders, *padding} - tokenizer.end_ids


class AnswerState:
    """Where an answer stands: in its text, or in an output, behind its `codes` so far.

    `outputs` are those that the answer may hold, and `others` the begin markers of all others;
    `modality` is that of the open output.
    """

    def __init__(self, outputs: Mapping[str, OutputModality], others: Collection[int] = ()) -> None:
        self.outputs, self.others = outputs, others
        self.modality: str | None = None
        self.codes: list[int] = []

    def add(self, token: int) -> None:
        """Go on behind the answer's next token."""
        if self.modality is None:
            begins = {output.begin_id: name for name, output in self.outputs.items()}
            self.modality, self.codes = begins.get(token), []
        elif token == self.outputs[self.modality].end_id:
            self.modality = None
        else:
            self.codes.append(token - self.outputs[self.modality].first_id)

    def allowed(self, text: range) -> tuple[range, list[int]]:
        """What may come next: a range of tokens, and markers beside it; `text` is that of text."""
        if self.modality is None:
            return text, [output.begin_id for output in self.outputs.values()]
        output, position = self.outputs[self.modality], len(self.codes)
        codes, first = output.allowed(position), output.first_id
        # Where a codec lets nothing follow, all that is left is the end.
        may_end = not codes or (position > 0 and position % output.codec.unit == 0)
        tokens = range(first + codes.start, first + codes.stop, codes.step)
        return tokens, [output.end_id] if may_end else []


class Grammar:
    """Which tokens may come next in an answer; `forbidden` ones are never said in text.

    Where a model would begin an output that is not asked for, its text is complete, and more text
    would be arbitrary. So the probability of beginning one goes to the first of `end_ids`, which
    ends the answer.
    """

    def __init__(
        self,
        config: MimoConfig,
        forbidden: Collection[int],
        end_ids: Collection[int],
        device: torch.device,
    ) -> None:
        self.outputs, self.end_ids = config.outputs, sorted(end_ids)[:1]
        self.forbidden = torch.tensor(sorted(forbidden), dtype=torch.long, device=device)
        self.text = range(config.language.vocab_size)
        self.ids = torch.arange(config.vocab_size, device=device)

    def start(self, names: Collection[str] | None) -> AnswerState:
        """The state before the first token of an answer that may hold these outputs, or all."""
        outputs = {n: o for n, o in self.outputs.items() if names is None or n in names}
        return AnswerState(
            outputs, [o.begin_id for n, o in self.outputs.items() if n not in outputs]
        )

    def mask(self, logits: torch.Tensor, states: Sequence[AnswerState]) -> torch.Tensor:
        """(B, V) logits -> (B, V), minus infinity for what may not come next; one state each.

        What a state allows is known on the host, so a GPU is given it without a wait.
        """
        logits = logits.index_fill(1, self.forbidden, float("-inf"))
        if not self.outputs:
            return logits
        if any(state.others for state in states):
            logits = self._end_instead(logits, states)
        allowed = [state.allowed(self.text) for state in states]
        most = max(len(markers) for _, markers in allowed)
        table = [
            # Filled up with what is allowed anyway.
            [r.start, r.stop, r.step, *markers, *[(markers or r)[0]] * (most - len(markers))]
            for r, markers in allowed
        ]
        numbers = upload(torch.tensor(table), logits.device)
        start, stop, step = numbers[:, :3, None].unbind(1)
        is_allowed = (self.ids >= start) & (self.ids < stop) & ((self.ids - start) % step == 0)
        is_allowed.scatter_(1, numbers[:, 3:], True)
        return logits.masked_fill(~is_allowed, float("-inf"))

    def _end_instead(self, logits: torch.Tensor, states: Sequence[AnswerState]) -> torch.Tensor:
        """(B, V) logits -> (B, V), those of other outputs' begin markers added to the end's."""
        markers = [output.begin_id for output in self.outputs.values()]
        is_other = torch.tensor([[m in state.others for m in markers] for state in states])
        columns = upload(torch.tensor(markers), logits.device)
        others = logits.index_select(1, columns)
        others = others.masked_fill(~upload(is_other, logits.device), float("-inf"))
        logits = logits.clone()
        for end_id in self.end_ids:
            ends = torch.cat([logits[:, end_id, None], others], dim=1)
            logits[:, end_id] = ends.logsumexp(dim=1)
        return logits


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
    allowed: torch.Tensor,
    num_top: int,
) -> None:
    """Write the log-probabilities of (B,) `tokens` and of the `num_top` likeliest others.

    `allowed` are the logits (B, V) behind the grammar, minus infinity for what may not come next.
    `columns` (B, 1 + 2 * num_top): those of the tokens, then the likeliest tokens, then theirs.
    """
    # That of a token which is hopelessly unlikely may be minus infinity, which is no JSON.
    logprobs = logits.log_softmax(dim=-1).clamp(min=torch.finfo(torch.float32).min)
    columns[:, 0] = logprobs.gather(1, tokens[:, None])[:, 0]
    if num_top:
        logprobs.masked_fill_(allowed.isneginf(), float("-inf"))
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
