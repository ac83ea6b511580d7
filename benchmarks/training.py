"""python -m benchmarks.training: a training step beside transformers', and over two processes.

Two models of a CLIP, a Whisper and a Llama with two-layer projectors, fp32: tiny_avlm with 64
samples an iteration, and one of 512 x 8 layers with 4. Theirs starts from the same weights, reads
the same mock batches, and its losses must be ours. Its attention is sdpa, without a mask, as the
padding is behind the text, and its AdamW is torch's fused one. Every round starts each kind anew,
one after the other; an iteration's time is the median behind the warm-up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
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
from safetensors.torch import load_file, save_file
from torch.nn import functional

from benchmarks.generation import SMALL
from examples.mimo.compat import kernels
from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, collate
from examples.mimo.hf.from_hf import from_hf, initialize_single_process
from examples.mimo.hf.io import Folder
from examples.mimo.hf.weights import family_for_export
from examples.mimo.modalities.base import MLPProjectorConfig, first_tokens
from examples.mimo.training.inputs import MockDataset

ROOT = Path(__file__).parents[1]
SEED, WARM_UP, LEARNING_RATE = 7, 2, 1e-4
BOUND, TP_BOUND = 1.3, 0.9
# Losses of the first iterations differ by rounding alone.
TOLERANCE = 1e-3
PAGE = """# A training step, beside transformers

`python -m benchmarks.training --output benchmarks/training.md` wrote this on {processors} CPUs:
tokens a second without padding, medians of {rounds} rounds in turn. `times` is the median over the
rounds of ours by theirs, each one process with {processors} threads. `packed` is ours with
`--pack-sequences`, `TP 2` and `DP 2` are so too, two processes of one thread each, beside packed.
Losses differ by at most {difference:.0e}.

| model | transformers | ours | times | packed | times | TP 2 | of packed | DP 2 | of packed |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}
"""


@dataclass(frozen=True)
class Case:
    """A model, by the name that `--model-provider` takes, and how it is trained."""

    provider: str
    batch_size: int
    seq_length: int
    iterations: int

    @property
    def config(self) -> MimoConfig:
        """What the model is."""
        return get_model_config(self.provider)


CASES = {
    "tiny_avlm x 64": Case("tiny_avlm", 64, 128, 12),
    "512 x 8 layers x 4": Case("benchmarks.training:medium_avlm", 4, 768, 6),
}
PACKED = ("--pack-sequences",)
# Processes, threads of each, and flags.
KINDS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "ours": (1, os.cpu_count() or 1, ()),
    "packed": (1, os.cpu_count() or 1, PACKED),
    "TP 2": (2, 1, ("--tensor-model-parallel-size", "2", *PACKED)),
    "DP 2": (2, 1, PACKED),
}


def medium_avlm() -> MimoConfig:
    """512 x 8 layers with pictures of 168 pixels and ten seconds of sound."""
    base = get_model_config("tiny_avlm")
    language = dataclasses.replace(SMALL, seq_length=768, tie_embeddings=False)
    sizes = {"num_layers": 4, "hidden_size": 384, "num_attention_heads": 6, "ffn_hidden_size": 1536}
    encoders: dict[str, dict[str, Any]] = {
        "images": {"image_size": 168, "patch_size": 14},
        "audios": {"num_mel_bins": 80, "hop_samples": 160, "window_seconds": 10.0},
    }
    modalities = {
        name: dataclasses.replace(
            modality,
            encoder=dataclasses.replace(modality.encoder, **sizes, **encoders[name]),
            projector=MLPProjectorConfig(ffn_hidden_size=512),
        )
        for name, modality in base.modalities.items()
    }
    return dataclasses.replace(base, language=language, modalities=modalities)


class Peer(torch.nn.Module):
    """The model of a config in transformers' classes, joined as LLaVA joins them."""

    def __init__(self, config: MimoConfig) -> None:
        super().__init__()
        language, vit = config.language, config.inputs["images"].encoder
        whisper = config.inputs["audios"].encoder
        self.token_ids = {name: m.token_id for name, m in config.inputs.items()}
        self.frames_per_token = whisper.frames_per_token
        self.language = hf.LlamaForCausalLM(family_for_export(language).config(language))
        clip = hf.CLIPVisionModel(family_for_export(vit).config(vit))
        whole = hf.WhisperModel(family_for_export(whisper).config(whisper))
        self.encoders = torch.nn.ModuleDict({"images": clip, "audios": whole.encoder})
        self.projectors = torch.nn.ModuleDict(
            {
                name: torch.nn.Sequential(
                    torch.nn.Linear(
                        modality.encoder.output_size, modality.projector.ffn_hidden_size
                    ),
                    torch.nn.GELU(),
                    torch.nn.Linear(modality.projector.ffn_hidden_size, language.hidden_size),
                )
                for name, modality in config.inputs.items()
            }
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """The mean loss of the targets."""
        assert batch.input_ids is not None
        embeddings = self.language.get_input_embeddings()(batch.input_ids)
        for name, inputs in batch.modality_inputs.items():
            media = self.projectors[name](getattr(self, name)(**inputs))
            mask = (batch.input_ids == self.token_ids[name]).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(mask, media)
        logits = self.language(inputs_embeds=embeddings).logits
        labels = batch.labels.masked_fill(batch.loss_mask == 0, -100)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, side, side) -> (tokens, H): all patches but the class token."""
        return self.encoders["images"](pixel_values).last_hidden_state[:, 1:].flatten(0, 1)

    def audios(self, input_features: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
        """(N, M, 2F) -> (tokens, k * H): k frames side by side, of each window what holds sound."""
        frames = self.encoders["audios"](input_features).last_hidden_state
        frames = functional.pad(frames, (0, 0, 0, -frames.shape[1] % self.frames_per_token))
        tokens = frames.unflatten(1, (-1, self.frames_per_token)).flatten(2)
        return first_tokens(tokens, -(-num_frames // self.frames_per_token))

    def save_parts(self, folder: Path) -> dict[str, Folder]:
        """A folder of each part, as transformers would have it, to convert."""
        self.language.save_pretrained(folder / "language")
        for name, encoder in self.encoders.items():
            encoder.save_pretrained(folder / f"{name}.encoder")
        for name, projector in self.projectors.items():
            path = folder / f"{name}.projector"
            hf.LlavaConfig().save_pretrained(path)
            layers = {"linear_1": projector[0], "linear_2": projector[2]}
            weights = {
                f"multi_modal_projector.{layer}.{kind}": getattr(linear, kind).detach()
                for layer, linear in layers.items()
                for kind in ("weight", "bias")
            }
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return {path.name: Folder(path) for path in folder.iterdir()}


def prepare(case: Case, folder: Path) -> None:
    """Random weights in `folder`: theirs, and ours made of them."""
    torch.manual_seed(SEED)
    peer = Peer(case.config)
    save_file(peer.state_dict(), folder / "theirs.safetensors")
    with tempfile.TemporaryDirectory() as parts, command.stdout_to(os.devnull):
        folders = peer.save_parts(Path(parts))
        from_hf(case.config, folders, folder / "ours", lambda text: None)


def train_theirs(case: Case, folder: Path) -> None:
    """Train, and print each iteration's loss, tokens and seconds as a line of JSON."""
    for entry in kernels.cpu_replacements():  # theirs computes with torch's own functions
        if entry.owner is functional:
            setattr(functional, entry.attribute, getattr(functional, entry.attribute).__wrapped__)
    peer = Peer(case.config)
    peer.load_state_dict(load_file(folder / "theirs.safetensors"))
    data = MockDataset(case.config, case.seq_length, case.iterations * case.batch_size, SEED)
    optimizer = torch.optim.AdamW(peer.parameters(), LEARNING_RATE, weight_decay=0, fused=True)
    for iteration in range(case.iterations):
        started, first = time.perf_counter(), iteration * case.batch_size
        batch = collate([data[first + number] for number in range(case.batch_size)])
        loss = peer(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        record = {"loss": loss.item(), "tokens": batch.num_tokens}
        print(json.dumps({**record, "seconds": time.perf_counter() - started}), flush=True)


def train_ours(case: Case, folder: Path, kind: str) -> list[dict[str, float]]:
    """Train with `train.py`: each iteration's metrics."""
    processes, threads, flags = KINDS[kind]
    with tempfile.TemporaryDirectory() as scratch:
        metrics = Path(scratch, "metrics.jsonl")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        launch += [str(ROOT / "examples/mimo/train.py"), "--model-provider", case.provider, *flags]
        launch += ["--dataset-provider", "mock", "--seq-length", str(case.seq_length)]
        launch += ["--global-batch-size", str(case.batch_size), "--micro-batch-size"]
        launch += [str(case.batch_size // (2 if kind == "DP 2" else 1))]
        launch += ["--train-iters", str(case.iterations), "--seed", str(SEED)]
        launch += ["--lr", str(LEARNING_RATE), "--lr-decay-style", "constant"]
        launch += ["--weight-decay", "0", "--pretrained-checkpoint", str(folder / "ours")]
        _run([*launch, "--metrics-file", str(metrics)], threads)
        return [json.loads(line) for line in metrics.read_text().splitlines()]


def _run(arguments: list[str], threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: status {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout


def rate(records: list[dict[str, float]]) -> float:
    """Tokens a second: the median of the iterations behind the warm-up."""
    return statistics.median(r["tokens"] / r["seconds"] for r in records[WARM_UP:])


def compare(name: str, kinds: list[str], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Tokens a second of every kind and round, and by how much losses differ at most."""
    case = CASES[name]
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    difference = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(case, folder)
        theirs_too = ["-m", "benchmarks.training", "--theirs", name, "--folder", scratch]
        for number in range(rounds):
            losses = {}
            for kind in kinds:
                if kind == "transformers":
                    lines = _run(theirs_too, KINDS["ours"][1]).splitlines()
                    records = [json.loads(line) for line in lines]
                else:
                    records = train_ours(case, folder, kind)
                rates[kind].append(rate(records))
                losses[kind] = [record["loss"] for record in records]
                print(name, number + 1, kind, f"{rates[kind][-1]:.0f}", file=sys.stderr, flush=True)
            for values in losses.values():
                pairs = zip(values, losses[kinds[0]], strict=True)
                difference = max(difference, *(abs(one - other) for one, other in pairs))
    assert difference <= TOLERANCE, f"{name}: losses differ by {difference}"
    return rates, difference


def times(rates: dict[str, list[float]], kind: str, peer: str) -> float:
    """The median over the rounds of one kind's tokens a second by another's."""
    return statistics.median(a / b for a, b in zip(rates[kind], rates[peer], strict=True))


def main() -> None:
    """Measure, print and write the page; status 1 below a bound."""
    parser = argparse.ArgumentParser(description="A training step beside transformers'.")
    parser.add_argument("--output", type=Path, help="write the page to this Markdown file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--theirs", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        train_theirs(CASES[args.theirs], args.folder)
        return
    initialize_single_process(seed=SEED)
    page, passed = measure(args.cases, args.rounds)
    print(page)
    if args.output:
        args.output.write_text(page, encoding="utf-8")
    sys.exit(0 if passed else 1)


def measure(cases: list[str], rounds: int) -> tuple[str, bool]:
    """The page, and whether all bounds hold."""
    rows, passed, largest = [], True, 0.0
    for name in cases:
        rates, difference = compare(name, ["transformers", *KINDS], rounds)
        ratios = {kind: times(rates, kind, "transformers") for kind in ("ours", "packed")}
        ratios |= {kind: times(rates, kind, "packed") for kind in ("TP 2", "DP 2")}
        cells = [f"{statistics.median(rates['transformers']):.0f}"]
        for kind, ratio in ratios.items():
            cells += [f"{statistics.median(rates[kind]):.0f}", f"{ratio:.2f}"]
        rows.append(f"| {' | '.join([name, *cells])} |")
        passed &= ratios["packed"] >= BOUND and ratios["TP 2"] >= TP_BOUND
        largest = max(largest, difference)
    page = PAGE.format(
        processors=os.cpu_count(), rounds=rounds, difference=largest, rows="\n".join(rows)
    )
    return page, passed


if __name__ == "__main__":
    main()
