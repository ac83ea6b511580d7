"""Many answers at once: rows join when they are asked and leave when they are done.

Works on every tensor- and pipeline-parallel layout: each stage keeps the keys and values of its
own layers, hidden states travel down the stages, and the last one tells all the tokens. Every rank
makes the same calls.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import mpu

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import collate, to_device
from examples.mimo.data.conversation import Sample, TokenSequence
from examples.mimo.generation.cuda_graphs import DecodingGraphs
from examples.mimo.generation.prefix_cache import (
    PrefixStore,
    PromptUnits,
    Unit,
    shared_length,
    units_of,
    usable_length,
)
from examples.mimo.generation.sampling import GREEDY, Sampling, SequenceGenerator, choose
from examples.mimo.generation.transformer import CachedTransformer, KeyValueCache
from examples.mimo.model.mimo import StageMimoModel

# Prompts of one length are worked through together, so many tokens at a time.
PREFILL_TOKENS = 8192
# A shared beginning of fewer tokens is worked out again.
WORTH_SHARING = 32
STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class SequenceRequest:
    """A prompt to answer; `number` is its name in the engine's reports."""

    number: int
    sample: Sample
    max_new_tokens: int
    sampling: Sampling = GREEDY
    logprobs: bool = False
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class TokenOutput:
    """A new token of a job. `finish` says why it was the last: the end-of-text token, or length.

    `logprob` is its natural logarithm of probability before any sampling; `prompt_logprobs`, with
    a job's first token, those of the prompt's tokens, None for the first one and for media.
    """

    number: int
    token: int
    finish: str | None = None
    logprob: float | None = None
    prompt_logprobs: list[float | None] | None = None


@dataclass
class _Row:
    job: SequenceRequest
    prompt: PromptUnits
    draws: SequenceGenerator
    tokens: list[int] = field(default_factory=list)

    @property
    def kept(self) -> list[Unit]:
        """What the cache holds of the row: nothing that counts before its first token is known."""
        return [*self.prompt.units, *self.tokens[:-1]] if self.tokens else []

    @property
    def num_kept(self) -> int:
        """The length of `kept`."""
        return len(self.prompt.units) + len(self.tokens) - 1 if self.tokens else 0

    @property
    def needed(self) -> int:
        """How many places of the cache the row may come to take."""
        return len(self.prompt.units) + self.job.max_new_tokens

    def held(self, device: torch.device) -> torch.Tensor:
        """The ids of prompt and answer."""
        return torch.tensor([*self.job.sample.tokens.ids, *self.tokens], device=device)


class Engine:
    """Rows of one model; `forbidden` tokens are never chosen.

    `prefixes` rows are kept after they are done, for prompts that begin like them. With `graphs`
    tokens are decoded by CUDA graphs.
    """

    def __init__(
        self,
        model: StageMimoModel,
        config: MimoConfig,
        eos_id: int,
        forbidden: Collection[int] = (),
        prefixes: int = 0,
        graphs: bool = False,
    ) -> None:
        self.model, self.config, self.eos_id = model, config, eos_id
        self.transformer = CachedTransformer(model)
        self.graphs = DecodingGraphs(self.transformer) if graphs else None
        self.device = self.transformer.device
        self.forbidden = torch.tensor(sorted(forbidden), dtype=torch.long, device=self.device)
        self.store = PrefixStore(prefixes)
        self.cache = self.transformer.new_cache()
        self.rows: list[_Row] = []

    @torch.no_grad()
    def start(self, jobs: Sequence[SequenceRequest]) -> list[TokenOutput]:
        """Work through prompts and choose the first token of each."""
        rows = [
            _Row(j, units_of(j.sample, self.config), SequenceGenerator(j.sampling.seed))
            for j in jobs
        ]
        self._make_room(rows)
        reports: list[TokenOutput] = []
        while rows:
            together, rows = self._next_group(rows)
            reports += self._prefill(together)
        return reports

    @torch.no_grad()
    def step(self) -> list[TokenOutput]:
        """One more token of every row."""
        rows = self.rows
        if not rows:
            return []
        last = torch.tensor([row.tokens[-1] for row in rows], device=self.device)
        embedded = self.transformer.embed(last) if self.model.pre_process else None
        hidden = self._through_stages(embedded, 0, 1, [row.num_kept for row in rows])
        return self._take(rows, None if hidden is None else hidden[:, 0])

    def stop(self, number: int) -> None:
        """Drop a job's row, if it has one still."""
        place = next((i for i, row in enumerate(self.rows) if row.job.number == number), None)
        if place is not None:
            self._remove(place)

    def _make_room(self, rows: Sequence[_Row]) -> None:
        together = [*self.rows, *rows]
        needed = max((row.needed for row in together), default=0)
        if not self.rows and (len(together) > self.cache.batch_size or needed > self.cache.length):
            self.cache = self.transformer.new_cache()
        self.cache.reserve(len(together), needed)

    def _next_group(self, rows: list[_Row]) -> tuple[list[tuple[_Row, _Source]], list[_Row]]:
        """Rows that can be prefilled together, with what they take over, and the other rows."""
        chosen: list[tuple[_Row, _Source]] = []
        others: list[_Row] = []
        for row in rows:
            source = self._source(row)
            columns = len(row.prompt.units) - source.length
            first = chosen[0] if chosen else (row, source)
            fits = (
                source.length == first[1].length
                and columns == len(first[0].prompt.units) - source.length
                and row.job.prompt_logprobs == first[0].job.prompt_logprobs
                and (len(chosen) + 1) * columns <= max(PREFILL_TOKENS, columns)
                and not self._should_wait(row, source, [other for other, _ in chosen])
            )
            if fits:
                chosen.append((row, source))
            else:
                others.append(row)
        return chosen, others

    def _should_wait(self, row: _Row, source: _Source, before: Sequence[_Row]) -> bool:
        if not self.store.size or row.job.prompt_logprobs:
            return False
        units = row.prompt.units
        shared = (shared_length(units, other.prompt.units) for other in before)
        best = max((usable_length(length, row.prompt) for length in shared), default=0)
        return best >= source.length + WORTH_SHARING

    def _source(self, row: _Row) -> _Source:
        """The longest beginning of a row that the store or another row holds."""
        if not self.store.size or row.job.prompt_logprobs:
            return _Source(0, None, 0)
        length, cache = self.store.find(row.prompt)
        best = _Source(length, cache, 0)
        for place, other in enumerate(self.rows):
            length = usable_length(shared_length(row.prompt.units, other.kept), row.prompt)
            if length > best.length:
                best = _Source(length, self.cache, place)
        return best if best.length >= WORTH_SHARING else _Source(0, None, 0)

    def _prefill(self, together: Sequence[tuple[_Row, _Source]]) -> list[TokenOutput]:
        first, start = len(self.rows), together[0][1].length
        for place, (_, source) in enumerate(together, start=first):
            if source.cache is not None:
                self.cache.put(place, source.cache, source.row, start)
        rows = [row for row, _ in together]
        self.rows += rows
        batch = to_device(collate([_rest(row, start) for row in rows]), self.device)
        embedded = None
        if self.model.pre_process:
            embedded = self.model.embed(batch.input_ids, batch.modality_inputs).transpose(0, 1)
        hidden = self._through_stages(embedded, first, batch.seq_length, [start] * len(rows))
        prompts = self._prompt_logprobs(rows, hidden) if rows[0].job.prompt_logprobs else None
        return self._take(rows, None if hidden is None else hidden[:, -1], prompts)

    def _through_stages(
        self, embedded: torch.Tensor | None, first: int, columns: int, starts: Sequence[int]
    ) -> torch.Tensor | None:
        """(B, S, H) embeddings -> (B, S, H) of the last layer, on the last stage."""
        hidden = embedded
        if hidden is None:
            hidden = self.transformer.receive(len(starts), columns)
        if self.graphs and first == 0 and columns == 1:
            hidden = self.graphs.forward(hidden, self.cache, starts)
        else:
            hidden = self.transformer.forward(hidden, self.cache, first, starts)
        if self.model.post_process:
            return hidden
        self.transformer.send(hidden)
        return None

    def _take(
        self,
        rows: Sequence[_Row],
        hidden: torch.Tensor | None,
        prompts: list[list[float | None]] | None = None,
    ) -> list[TokenOutput]:
        """Choose a token for each of `rows` from (B, H), and let those go that are done."""
        found = torch.zeros(len(rows), 2, dtype=torch.float64, device=self.device)
        if hidden is not None:
            logits = self.transformer.logits(hidden).float()
            allowed = logits.index_fill(1, self.forbidden, float("-inf"))
            found[:, 0] = self._choose(allowed, rows)
            if any(row.job.logprobs for row in rows):
                chosen = found[:, :1].long()
                found[:, 1] = logits.log_softmax(dim=-1).gather(1, chosen)[:, 0]
        self._tell(found)
        reports = []
        for place, (row, (token, logprob)) in enumerate(zip(rows, found.tolist(), strict=True)):
            row.tokens.append(int(token))
            reports.append(
                TokenOutput(
                    row.job.number,
                    int(token),
                    self._finish(row),
                    logprob if row.job.logprobs else None,
                    prompts[place] if prompts else None,
                )
            )
        done = {report.number for report in reports if report.finish}
        for place in reversed(range(len(self.rows))):
            if self.rows[place].job.number in done:
                self._remove(place)
        return reports

    def _choose(self, logits: torch.Tensor, rows: Sequence[_Row]) -> torch.Tensor:
        samplings = [row.job.sampling for row in rows]
        penal = any(s.repetition_penalty != 1.0 for s in samplings)
        seen = [row.held(self.device) for row in rows] if penal else []
        return choose(logits, samplings, [row.draws for row in rows], seen)

    def _finish(self, row: _Row) -> str | None:
        if row.tokens[-1] == self.eos_id:
            return STOP
        return LENGTH if len(row.tokens) >= row.job.max_new_tokens else None

    def _remove(self, place: int) -> None:
        """Free a row's place: the last row moves there."""
        row = self.rows[place]
        if self.store.size:
            self.store.add(row.kept, self.cache.copy_of(place, row.num_kept))
        last = self.rows.pop()
        if last is not row:
            self.rows[place] = last
            self.cache.put(place, self.cache, len(self.rows), last.num_kept)

    def _prompt_logprobs(
        self, rows: Sequence[_Row], hidden: torch.Tensor | None
    ) -> list[list[float | None]]:
        columns = len(rows[0].prompt.units)
        found = torch.zeros(len(rows), columns, dtype=torch.float64, device=self.device)
        if hidden is not None:
            for place, row in enumerate(rows):
                ids = torch.tensor(row.job.sample.tokens.ids, device=self.device)
                for begin in range(0, columns - 1, 256):
                    end = min(begin + 256, columns - 1)
                    logits = self.transformer.logits(hidden[place, begin:end]).float()
                    logprobs = logits.log_softmax(dim=-1)
                    wanted = ids[begin + 1 : end + 1, None]
                    found[place, begin + 1 : end + 1] = logprobs.gather(1, wanted)[:, 0]
        self._tell(found)
        return [
            [
                value if place and isinstance(unit, int) else None
                for place, (unit, value) in enumerate(zip(row.prompt.units, values, strict=True))
            ]
            for row, values in zip(rows, found.tolist(), strict=True)
        ]

    def _tell(self, found: torch.Tensor) -> None:
        """What one rank of the last stage found reaches all; another one could draw otherwise."""
        group = self.transformer.tp_group
        if group.size() > 1 and self.model.post_process:
            dist.broadcast(found, group_src=0, group=group)
        group = mpu.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(found, group_src=group.size() - 1, group=group)


@dataclass(frozen=True)
class _Source:
    """The first `length` tokens of a row of `cache`, for another row to take over."""

    length: int
    cache: KeyValueCache | None
    row: int


def _rest(row: _Row, start: int) -> Sample:
    """The part of a row's prompt from `start` on, with the media that begin there."""
    sample = row.job.sample
    if not start:
        return sample
    left = {(name, number) for name, number, first, _ in row.prompt.items if first >= start}

    def of_rest(name: str, values: list) -> list:
        return [value for number, value in enumerate(values) if (name, number) in left]

    media = {name: of_rest(name, items) for name, items in sample.media.items()}
    whole = sample.tokens
    return Sample(
        sample.key,
        TokenSequence(whole.ids[start:], whole.labels[start:], whole.loss_mask[start:]),
        {name: items for name, items in media.items() if items},
        {name: of_rest(name, files) for name, files in sample.sources.items()},
    )
