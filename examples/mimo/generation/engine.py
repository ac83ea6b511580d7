"""Generation engine with continuous batching: sequences join and leave between tokens.

It runs on every tensor- and pipeline-parallel layout. Each stage caches the keys and values of its
own layers, hidden states travel down the stages, and the last stage broadcasts the tokens. Every
rank makes the same calls.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import mpu

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, collate, locate, to_device
from examples.mimo.data.conversation import Sample
from examples.mimo.generation.reuse import (
    DecodingGraphs,
    PrefixCache,
    PromptUnits,
    Unit,
    prompt_units,
    remaining_sample,
    reserve_on_all_ranks,
    shared_length,
    usable_length,
)
from examples.mimo.generation.sampling import (
    GREEDY,
    AnswerState,
    Grammar,
    Sampling,
    SequenceGenerator,
    choose,
    fill_logprobs,
)
from examples.mimo.generation.transformer import CachedTransformer, KeyValueCache
from examples.mimo.modalities.values import upload
from examples.mimo.model.mimo import StageMimoModel

# Prompts of one length are prefilled together, up to so many tokens at a time.
MAX_PREFILL_TOKENS = 8192
MIN_REUSED_TOKENS = 32  # copying a shorter prefix costs more than computing it
STOP, LENGTH, NOT_FINITE = "stop", "length", "not finite"
# Stands in place of a token where the logits are not finite.
NO_TOKEN = -1


@dataclass(frozen=True)
class SequenceRequest:
    """A prompt to answer; the engine's outputs carry its `number`."""

    number: int
    sample: Sample
    max_new_tokens: int
    sampling: Sampling = GREEDY
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    outputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TokenOutput:
    """A new token of a sequence; `finish` is set on the last: STOP (end of text) or LENGTH.

    It is NOT_FINITE, and `token` NO_TOKEN, where the logits hold NaN or infinity.
    `logprob` is the natural logarithm of its probability before any sampling. `top_logprobs` are
    the most likely tokens in its place that an answer may hold, with theirs. `prompt_logprobs`,
    with a sequence's first token, are those of the prompt's tokens: None for the first and for
    media.
    """

    number: int
    token: int
    finish: str | None = None
    logprob: float | None = None
    prompt_logprobs: list[float | None] | None = None
    top_logprobs: list[tuple[int, float]] | None = None


@dataclass
class ActiveSequence:
    """A request that is being answered; its index in `Engine.sequences` is its cache slot."""

    request: SequenceRequest
    prompt: PromptUnits
    generator: SequenceGenerator
    state: AnswerState
    tokens: list[int] = field(default_factory=list)

    @property
    def num_cached(self) -> int:
        """Positions in the cache that are valid: none before the prompt has gone through."""
        return len(self.prompt.units) + len(self.tokens) - 1 if self.tokens else 0

    @property
    def cached_units(self) -> list[Unit]:
        """What those positions hold; the newest token is not cached yet."""
        return [*self.prompt.units, *self.tokens[:-1]] if self.tokens else []

    @property
    def max_length(self) -> int:
        """Positions that the sequence may come to need."""
        return len(self.prompt.units) + self.request.max_new_tokens

    def token_ids(self, device: torch.device) -> torch.Tensor:
        """The ids of prompt and answer so far."""
        return upload(torch.tensor([*self.request.sample.tokens.ids, *self.tokens]), device)


@dataclass(frozen=True)
class ReusedPrefix:
    """The first `length` tokens of a slot of `cache`, which another sequence can copy."""

    length: int = 0
    cache: KeyValueCache | None = None
    slot: int = 0


NOTHING_REUSED = ReusedPrefix()


class Engine:
    """Generates tokens for many sequences at once; any of `end_ids` ends its sequence.

    `forbidden` tokens are never said in text. `prefix_cache` finished sequences are kept, for
    prompts that start alike. With `cuda_graphs` tokens are decoded by CUDA graphs.
    """

    def __init__(
        self,
        model: StageMimoModel,
        config: MimoConfig,
        end_ids: Collection[int],
        forbidden: Collection[int] = (),
        prefix_cache: int = 0,
        cuda_graphs: bool = False,
    ) -> None:
        self.model, self.config, self.end_ids = model, config, frozenset(end_ids)
        self.transformer = CachedTransformer(model)
        self.graphs = DecodingGraphs(self.transformer) if cuda_graphs else None
        self.device = self.transformer.device
        self.grammar = Grammar(config, forbidden, self.end_ids, self.device)
        self.prefix_cache, self.max_prefix_tokens = PrefixCache(prefix_cache), float("inf")
        self.cache = self.transformer.new_cache()
        self.sequences: list[ActiveSequence] = []

    @torch.no_grad()
    def start(self, requests: Sequence[SequenceRequest]) -> list[TokenOutput]:
        """Prefill prompts and choose the first token of each."""
        waiting = [
            ActiveSequence(
                request,
                prompt_units(request.sample, self.config),
                SequenceGenerator(request.sampling.seed),
                self.grammar.start(request.outputs),
            )
            for request in requests
        ]
        self._reserve(waiting)
        outputs: list[TokenOutput] = []
        while waiting:
            batch, waiting = self._next_prefill(waiting)
            outputs += self._prefill(batch)
        return outputs

    @torch.no_grad()
    def step(self) -> list[TokenOutput]:
        """Generate one more token of every sequence."""
        if not self.sequences:
            return []
        # Here on every rank, though the last stage alone needs it: where a codec's own code fails,
        # all raise its error, and none waits for another.
        for sequence in self.sequences:
            sequence.state.allowed(self.grammar.text)
        last = upload(torch.tensor([s.tokens[-1] for s in self.sequences]), self.device)
        embedded = self.transformer.embed(last) if self.model.pre_process else None
        hidden = self._run_stages(embedded, 0, 1, [s.num_cached for s in self.sequences])
        return self._next_tokens(self.sequences, None if hidden is None else hidden[:, 0])

    def stop(self, number: int) -> None:
        """Drop the sequence of a request, if it is still active."""
        numbers = [sequence.request.number for sequence in self.sequences]
        if number in numbers:
            self._free(numbers.index(number), STOP)

    def abort(self, numbers: Collection[int] | None = None) -> None:
        """Drop sequences after an error, by default all, whatever state it left them in.

        The prefix cache goes too: after an error of one rank alone, ranks might hold different
        prefixes, and their steps would differ.
        """
        self.prefix_cache = PrefixCache(self.prefix_cache.size)
        for slot in reversed(range(len(self.sequences))):
            if numbers is None or self.sequences[slot].request.number in numbers:
                self._free(slot, NOT_FINITE)
        if not self.sequences:
            self.cache = self.transformer.new_cache()

    def _reserve(self, waiting: Sequence[ActiveSequence]) -> None:
        sequences = [*self.sequences, *waiting]
        length = max((sequence.max_length for sequence in sequences), default=0)
        is_too_small = len(sequences) > self.cache.batch_size or length > self.cache.length
        if not self.sequences and is_too_small:
            # Nothing to keep: the old tensors go before the new ones come.
            self.cache = self.transformer.new_cache()
        reserve_on_all_ranks(self.cache, len(sequences), length)

    def _next_prefill(
        self, waiting: list[ActiveSequence]
    ) -> tuple[list[tuple[ActiveSequence, ReusedPrefix]], list[ActiveSequence]]:
        """Split `waiting` into a batch to prefill, with the prefixes it reuses, and the others.

        A batch has one length and one number of reused tokens, so that it needs no padding.
        """
        batch: list[tuple[ActiveSequence, ReusedPrefix]] = []
        others: list[ActiveSequence] = []
        for sequence in waiting:
            prefix = self._longest_prefix(sequence)
            new_tokens = len(sequence.prompt.units) - prefix.length
            first, first_prefix = batch[0] if batch else (sequence, prefix)
            fits = (
                prefix.length == first_prefix.length
                and len(sequence.prompt.units) == len(first.prompt.units)
                and sequence.request.prompt_logprobs == first.request.prompt_logprobs
                and (len(batch) + 1) * new_tokens <= max(MAX_PREFILL_TOKENS, new_tokens)
                and not self._should_wait(sequence, prefix, [other for other, _ in batch])
            )
            if fits:
                batch.append((sequence, prefix))
            else:
                others.append(sequence)
        return batch, others

    def _should_wait(
        self, sequence: ActiveSequence, prefix: ReusedPrefix, batch: Sequence[ActiveSequence]
    ) -> bool:
        """Whether the batch's own prompts hold a longer prefix, to reuse in the next batch."""
        if not self.prefix_cache.size or sequence.request.prompt_logprobs:
            return False
        prompt = sequence.prompt
        shared = (shared_length(prompt.units, other.prompt.units) for other in batch)
        longest = max((usable_length(length, prompt) for length in shared), default=0)
        return longest >= prefix.length + MIN_REUSED_TOKENS

    def _longest_prefix(self, sequence: ActiveSequence) -> ReusedPrefix:
        """The longest prefix in the prefix cache or in an active sequence."""
        if not self.prefix_cache.size or sequence.request.prompt_logprobs:
            # Log-probabilities of the prompt need all its hidden states.
            return NOTHING_REUSED
        prompt = sequence.prompt
        best = ReusedPrefix(*self.prefix_cache.find(prompt))
        for slot, other in enumerate(self.sequences):
            length = usable_length(shared_length(prompt.units, other.cached_units), prompt)
            if length > best.length:
                best = ReusedPrefix(length, self.cache, slot)
        return best if best.length >= MIN_REUSED_TOKENS else NOTHING_REUSED

    def _prefill(self, batch: Sequence[tuple[ActiveSequence, ReusedPrefix]]) -> list[TokenOutput]:
        first_slot, start = len(self.sequences), batch[0][1].length
        for slot, (_, prefix) in enumerate(batch, start=first_slot):
            if prefix.cache is not None:
                self.cache.write_slot(slot, prefix.cache, prefix.slot, start)
        sequences = [sequence for sequence, _ in batch]
        inputs = collate([remaining_sample(s.request.sample, s.prompt, start) for s in sequences])
        locate(inputs, self.model.special_token_ids)
        embedded = self._embed(to_device(inputs, self.device))
        self.sequences += sequences
        starts = [start] * len(sequences)
        hidden = self._run_stages(embedded, first_slot, inputs.seq_length, starts)
        prompt_logprobs = None
        if sequences[0].request.prompt_logprobs:
            prompt_logprobs = self._prompt_logprobs(sequences, hidden)
        last = None if hidden is None else hidden[:, -1]
        return self._next_tokens(sequences, last, prompt_logprobs)

    def _embed(self, inputs: Batch) -> torch.Tensor | None:
        """(B, S, H) on the first stage, None elsewhere; an encoder's error is one on every stage.

        A stage that was not told would wait for the hidden states. As `on_rank_zero` does, the
        others raise a ValueError, or a RuntimeError in place of any other kind.
        """
        embedded: torch.Tensor | None = None
        raised: Exception | None = None
        if self.model.pre_process:
            try:
                embedded = self.model.embed(
                    inputs.input_ids, inputs.modality_inputs, inputs.placeholders
                ).transpose(0, 1)
            except Exception as error:
                raised = error
        group = mpu.get_pipeline_model_parallel_group()
        message = [(isinstance(raised, ValueError), str(raised)) if raised else None]
        if group.size() > 1:
            dist.broadcast_object_list(message, group_src=0, group=group)
        if raised is not None:
            raise raised
        if message[0] is not None:
            is_value_error, text = message[0]
            raise (ValueError if is_value_error else RuntimeError)(text)
        return embedded

    def _run_stages(
        self,
        embedded: torch.Tensor | None,
        first_slot: int,
        new_tokens: int,
        starts: Sequence[int],
    ) -> torch.Tensor | None:
        """(B, S, H) embeddings on the first stage -> (B, S, H) on the last, None elsewhere."""
        hidden = embedded
        if hidden is None:
            hidden = self.transformer.receive(len(starts), new_tokens)
        if self.graphs and first_slot == 0 and new_tokens == 1:
            hidden = self.graphs.forward(hidden, self.cache, starts)
        else:
            hidden = self.transformer.forward(hidden, self.cache, first_slot, starts)
        if self.model.post_process:
            return hidden
        self.transformer.send(hidden)
        return None

    def _next_tokens(
        self,
        sequences: Sequence[ActiveSequence],
        hidden: torch.Tensor | None,
        prompt_logprobs: list[list[float | None]] | None = None,
    ) -> list[TokenOutput]:
        """Choose a token for each of `sequences` from (B, H), and free those that are finished."""
        num_top = max(sequence.request.top_logprobs for sequence in sequences)
        # Column 0: the token, which fp64 holds exactly; column 1: its log-probability. Then the
        # most likely tokens, and theirs.
        shape = len(sequences), 2 + 2 * num_top
        result = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if hidden is not None:
            logits = self.transformer.logits(hidden).float()
            allowed = self.grammar.mask(logits, [sequence.state for sequence in sequences])
            tokens = self._choose(allowed, sequences)
            if any(sequence.request.logprobs for sequence in sequences):
                fill_logprobs(result[:, 1:], tokens, logits, allowed, num_top)
            # A number that is not finite, less itself, is NaN.
            result[:, 0] = tokens.where((logits - logits).sum(dim=-1) == 0, NO_TOKEN)
        self._broadcast(result)
        outputs = []
        for index, (token, logprob, *top_columns) in enumerate(result.tolist()):
            sequence = sequences[index]
            request = sequence.request
            sequence.tokens.append(int(token))
            sequence.state.add(int(token))
            top_tokens = [int(other) for other in top_columns[: request.top_logprobs]]
            pairs = zip(top_tokens, top_columns[num_top:], strict=False)
            allowed_pairs = [pair for pair in pairs if pair[1] > float("-inf")]
            outputs.append(
                TokenOutput(
                    request.number,
                    int(token),
                    self._finish(sequence),
                    logprob if request.logprobs else None,
                    prompt_logprobs[index] if prompt_logprobs else None,
                    allowed_pairs if request.logprobs else None,
                )
            )
        finished = {output.number: output.finish for output in outputs}
        # From the end, as freeing a slot moves the last sequence into it.
        for slot in reversed(range(len(self.sequences))):
            if finish := finished.get(self.sequences[slot].request.number):
                self._free(slot, finish)
        return outputs

    def _choose(self, logits: torch.Tensor, sequences: Sequence[ActiveSequence]) -> torch.Tensor:
        samplings = [sequence.request.sampling for sequence in sequences]
        generators = [sequence.generator for sequence in sequences]
        if not any(sampling.has_penalty for sampling in samplings):
            return choose(logits, samplings, generators, [])
        previous = [sequence.token_ids(self.device) for sequence in sequences]
        answered = [ids[len(s.prompt.units) :] for ids, s in zip(previous, sequences, strict=True)]
        return choose(logits, samplings, generators, previous, answered)

    def _finish(self, sequence: ActiveSequence) -> str | None:
        if sequence.tokens[-1] == NO_TOKEN:
            return NOT_FINITE
        if sequence.tokens[-1] in self.end_ids:
            return STOP
        return LENGTH if len(sequence.tokens) >= sequence.request.max_new_tokens else None

    def _free(self, slot: int, finish: str) -> None:
        """Free a slot, and keep its sequence in the prefix cache unless it may hold NaN."""
        if finish == NOT_FINITE:
            # NaN would reach the slot's next sequence through any mask.
            self.cache.clear_slot(slot)
        elif self.prefix_cache.size and self.sequences[slot].num_cached <= self.max_prefix_tokens:
            sequence = self.sequences[slot]
            copy = self.cache.copy_slot(slot, sequence.num_cached)
            self.prefix_cache.add(sequence.cached_units, copy)
        self._remove(slot)

    def _remove(self, slot: int) -> None:
        """Free a slot; the last sequence moves into it, so that used slots stay contiguous."""
        sequence = self.sequences[slot]
        last = self.sequences.pop()
        if last is not sequence:
            self.sequences[slot] = last
            self.cache.write_slot(slot, self.cache, len(self.sequences), last.num_cached)

    def _prompt_logprobs(
        self, sequences: Sequence[ActiveSequence], hidden: torch.Tensor | None
    ) -> list[list[float | None]]:
        """Log-probabilities of the prompts' tokens, from (B, S, H) on the last stage."""
        length = len(sequences[0].prompt.units)
        result = torch.zeros(len(sequences), length, dtype=torch.float64, device=self.device)
        if hidden is not None:
            for index, sequence in enumerate(sequences):
                ids = sequence.token_ids(self.device)
                result[index, 1:] = self.transformer.logprobs(hidden[index, :-1], ids[1:])
        self._broadcast(result)
        return [
            [
                value if position and isinstance(unit, int) else None
                for position, (unit, value) in enumerate(
                    zip(sequence.prompt.units, values, strict=True)
                )
            ]
            for sequence, values in zip(sequences, result.tolist(), strict=True)
        ]

    def _broadcast(self, result: torch.Tensor) -> None:
        """Send a result of the last stage to all ranks.

        Its tensor-parallel ranks take the first one's: logits may differ in the last bit, and so
        might a sampled token.
        """
        group = self.transformer.tp_group
        if group.size() > 1 and self.model.post_process:
            dist.broadcast(result, group_src=0, group=group)
        group = mpu.get_pipeline_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(result, group_src=group.size() - 1, group=group)
