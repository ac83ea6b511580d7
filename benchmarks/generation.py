"""python -m benchmarks.generation: tokens a second beside transformers, with the same weights.

A Llama of 512 x 8 layers and one of SmolLM2-135M's sizes, random weights, fp32. Prompts of 600
tokens hold a picture and a recording; both sides get the same embeddings of it, and must choose the
same 64 tokens. Rounds of ours and theirs alternate on all processors.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.mimo.cli import command

command.prepare_environment(uses_gpus=False)  # the page compares CPUs
command.single_process_unless_launched()

from examples.mimo import compat

compat.install()

import torch
import transformers as hf

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.checkpoint.loading import load_model
from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import LanguageConfig, MimoConfig
from examples.mimo.data.batch import collate, to_device
from examples.mimo.data.conversation import Sample, TokenSequence
from examples.mimo.generation.engine import Engine, SequenceRequest
from examples.mimo.hf.from_hf import from_hf, initialize_single_process
from examples.mimo.hf.io import Folder
from examples.mimo.hf.weights import family_for_export

PROMPT, NEW, BATCHES = 600, 64, (1, 4, 16)
UNCACHED = 4
BOUND, UNCACHED_BOUND, PREFIX_BOUND = 1.2, 15.0, 5.0
CACHES = ("dynamic", "static")
PAGE = """# Tokens a second, beside transformers

`python -m benchmarks.generation --output benchmarks/generation.md` wrote this on {threads} threads:
random weights, the same on both sides, fp32; prompts of 600 tokens with a picture and a recording;
64 new tokens, which must be the same. Tokens a second after the first, medians of rounds in turn;
`times` is the median ratio to the faster one of transformers' two caches (sdpa).

| model | batch | ours | dynamic cache | static cache | times |
| --- | ---: | ---: | ---: | ---: | ---: |
{decode}

Beside a loop of whole forward passes, which has no cache and encodes the media for every token; and
how many times sooner the first token of a second question about the same media comes:

| model | times the loop | second question, times sooner |
| --- | ---: | ---: |
{more}
"""
SMALL = LanguageConfig(
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_query_groups=8,
    vocab_size=8192,
    seq_length=1024,
    tie_embeddings=True,
)
MODELS = {"512 x 8 layers": SMALL, "SmolLM2-135M": get_model_config("smollm2_avlm").language}


@dataclass
class Timed:
    """The tokens of each sequence, and the seconds from the first to the last."""

    tokens: list[list[int]]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second after the first, which belongs to the prompt."""
        return sum(len(ids) - 1 for ids in self.tokens) / self.seconds


class Pair:
    """Ours and theirs, of the same weights."""

    def __init__(self, language: LanguageConfig, folder: Path) -> None:
        self.config = dataclasses.replace(get_model_config("tiny_avlm"), language=language)
        torch.manual_seed(0)
        self.theirs = hf.LlamaForCausalLM(family_for_export(language).config(language)).eval()
        self.theirs.set_attn_implementation("sdpa")
        # Every sequence takes all its tokens.
        self.theirs.generation_config.eos_token_id = None
        self.theirs.save_pretrained(folder / "theirs")
        parts = {"language": Folder(folder / "theirs")}
        from_hf(self.config, parts, folder / "ours", lambda text: None)
        self.ours = load_model(open_checkpoint(folder / "ours"))
        self.theirs.to(self.ours.language_model.decoder.layers[0].mlp.linear_fc1.weight)

    def generate(self, samples: list[Sample], prefix_cache: int = 0) -> tuple[Timed, Engine]:
        """Answers of the engine; `eos_id` -1 so that every sequence takes all its tokens."""
        engine = Engine(self.ours, self.config, end_ids=(), prefix_cache=prefix_cache)
        requests = [SequenceRequest(number, sample, NEW) for number, sample in enumerate(samples)]
        outputs = engine.start(requests)
        started = _now()
        while engine.sequences:
            outputs += engine.step()
        seconds = _now() - started
        tokens = [
            [output.token for output in outputs if output.number == n] for n in range(len(samples))
        ]
        return Timed(tokens, seconds), engine

    def peer(self, samples: list[Sample], cache: str) -> Timed:
        """Their `generate` on the same embeddings."""
        batch = to_device(collate(samples), self.theirs.device)
        times: list[float] = []

        def tick(ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            times.append(_now())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.no_grad():
            embedded = self.ours.embed(batch.input_ids, batch.modality_inputs).transpose(0, 1)
            sequences = self.theirs.generate(
                inputs_embeds=embedded,
                attention_mask=torch.ones(embedded.shape[:2], device=embedded.device),
                max_new_tokens=NEW,
                do_sample=False,
                stopping_criteria=[tick],
                cache_implementation="static" if cache == "static" else None,
            )
        return Timed(sequences.tolist(), times[-1] - times[0])

    def uncached(self, sample: Sample) -> Timed:
        """Each token from a whole forward pass, encoders and all."""
        batch = to_device(collate([sample]), self.theirs.device)
        ids, tokens, times = batch.input_ids, [], []
        for _ in range(UNCACHED):
            with torch.no_grad():
                logits = self.ours(ids, modality_inputs=batch.modality_inputs)
            tokens.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[tokens[-1]]], device=ids.device)], dim=1)
            times.append(_now())
        return Timed([tokens], times[-1] - times[0])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prompts(config: MimoConfig, count: int, seed: int) -> list[Sample]:
    """Prompts of `PROMPT` tokens, each with a picture, a recording and words of its own."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        media = {n: [m.encoder.mock_inputs(generator)] for n, m in config.inputs.items()}
        ids = []
        for name, modality in config.inputs.items():
            ids += [modality.token_id] * modality.encoder.num_tokens(media[name][0])
        words = torch.randint(6, 8000, (PROMPT - len(ids),), generator=generator)
        tokens = TokenSequence(ids + words.tolist(), [0] * PROMPT, [0] * PROMPT)
        samples.append(Sample(str(number), tokens, media, {name: ["mock"] for name in media}))
    return samples


def compare(pair: Pair, batch: int, rounds: int) -> tuple[list[str], float]:
    """A row of the table, and the median ratio to the faster kind of cache."""
    rates: dict[str, list[float]] = {name: [] for name in ("ours", *CACHES)}
    for number in range(rounds + 1):
        samples = prompts(pair.config, batch, seed=number)
        timings = {"ours": pair.generate(samples)[0]}
        timings |= {cache: pair.peer(samples, cache) for cache in CACHES}
        for name, timed in timings.items():
            assert timed.tokens == timings["ours"].tokens, f"{name} chose other tokens"
            # The first round warms up.
            if number:
                rates[name].append(timed.rate)
    best = max(CACHES, key=lambda cache: statistics.median(rates[cache]))
    ratio = statistics.median(o / t for o, t in zip(rates["ours"], rates[best], strict=True))
    middle = [f"{statistics.median(rates[name]):.1f}" for name in ("ours", *CACHES)]
    return [str(batch), *middle, f"{ratio:.2f}"], ratio


def against_uncached(pair: Pair) -> float:
    """How many times as fast as a loop without a cache."""
    (sample,) = prompts(pair.config, 1, seed=99)
    timed, _ = pair.generate([sample])
    loop = pair.uncached(sample)
    assert loop.tokens[0] == timed.tokens[0][:UNCACHED]
    return timed.rate / loop.rate


def second_question(pair: Pair) -> float:
    """How many times sooner the first token of a second question about the same media comes."""
    (sample,) = prompts(pair.config, 1, seed=98)
    _, engine = pair.generate([sample], prefix_cache=1)
    ids = sample.tokens.ids[:-20] + list(range(100, 120))
    second = dataclasses.replace(sample, tokens=TokenSequence(ids, [], []))
    fresh = Engine(pair.ours, pair.config, end_ids=())

    def seconds(work: Engine) -> float:
        started = _now()
        work.start([SequenceRequest(9, second, 1)])
        return _now() - started

    return seconds(fresh) / seconds(engine)


def main() -> None:
    """Measure, print and write the page; status 1 below a bound."""
    parser = argparse.ArgumentParser(description="Tokens a second beside transformers.")
    parser.add_argument("--output", type=Path, help="write the page to this Markdown file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    args = parser.parse_args()
    initialize_single_process(seed=0)
    page, passed = measure(args.models, args.batches, args.rounds)
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")
    sys.exit(0 if passed else 1)


def measure(models: list[str], batches: list[int], rounds: int) -> tuple[str, bool]:
    """The page, and whether all bounds hold."""
    rows, more, passed = [], [], True
    for name in models:
        with tempfile.TemporaryDirectory() as folder, command.stdout_to(os.devnull):
            pair = Pair(MODELS[name], Path(folder))
        for batch in batches:
            row, ratio = compare(pair, batch, rounds)
            rows.append([name, *row])
            print(*rows[-1], file=sys.stderr, flush=True)
            passed &= ratio >= BOUND
        loop, prefix = against_uncached(pair), second_question(pair)
        more.append([name, f"{loop:.1f}", f"{prefix:.1f}"])
        passed &= loop >= UNCACHED_BOUND and prefix >= PREFIX_BOUND
    page = PAGE.format(
        threads=torch.get_num_threads(),
        decode="\n".join(f"| {' | '.join(row)} |" for row in rows),
        more="\n".join(f"| {' | '.join(row)} |" for row in more),
    )
    return page, passed


if __name__ == "__main__":
    main()
