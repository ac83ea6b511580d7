"""Shows shards: statistics for a terminal, and an HTML page of samples as the model sees them."""

from __future__ import annotations

import base64
import html
import itertools
import json
import statistics
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from examples.mimo.configs.schema import MimoConfig, OutputModality
from examples.mimo.data.conversation import Sample, SampleEncoder, TokenSequence
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.data.turns import errors_named
from examples.mimo.shards.manifest import TarParts, error_reason, tar_samples
from examples.mimo.shards.write import REJECTED, generic_reason

COMMON_SIZES, COMMON_REASONS = 4, 5


@dataclass
class Statistics:
    """What the samples of a folder are like; `media` counts sizes of items by modality.

    Of what answers consist of they are numbers of codes, in `outputs`.
    """

    samples: Counter[str] = field(default_factory=Counter)
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    target_tokens: list[int] = field(default_factory=list)
    media: dict[str, Counter[str]] = field(default_factory=dict)
    outputs: dict[str, Counter[str]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def add(
        self, split: str, sample: Sample, raw: dict[str, list[Any]], config: MimoConfig
    ) -> None:
        """Counts a sample, whose decoded media are `raw`."""
        self.samples[split] += 1
        self.tokens.append(len(sample.tokens.ids))
        self.target_tokens.append(sum(sample.tokens.loss_mask))
        # Each run of target tokens is one answer.
        self.turns.append(sum(has_loss for has_loss, _ in groupby(sample.tokens.loss_mask)))
        for name, items in raw.items():
            sizes = self.media.setdefault(name, Counter())
            sizes.update(config.inputs[name].encoder.describe(item) for item in items)
        for name in sample.outputs:
            sizes = self.outputs.setdefault(name, Counter())
            sizes.update(f"{len(codes)} codes" for codes in codes_of(sample, config.outputs[name]))

    def lines(self) -> list[str]:
        """The statistics as lines for a terminal."""
        counts = ", ".join(f"{name} {count:,}" for name, count in sorted(self.samples.items()))
        lines = [f"samples   {sum(self.samples.values()):,} ({counts})"]
        lines.append(f"turns     {_spread(self.turns)}")
        lines.append(f"tokens    {_spread(self.tokens)}")
        share = 100 * sum(self.target_tokens) / max(1, sum(self.tokens))
        lines.append(f"targets   {_spread(self.target_tokens)} tokens, {share:.0f} % of all tokens")
        said = {f"{name} in answers": sizes for name, sizes in self.outputs.items()}
        for name, sizes in (self.media | said).items():
            common = ", ".join(f"{s} ({count:,})" for s, count in sizes.most_common(COMMON_SIZES))
            others = len(sizes) - COMMON_SIZES
            more = f" and {others} other sizes" if others > 0 else ""
            lines.append(f"{name:<9} {sizes.total():,}: {common}{more}")
        if self.refused:
            lines.append(f"refused   {self.refused.total():,}")
            most = self.refused.most_common(COMMON_REASONS)
            lines += [f"{count:>9,} {reason}" for reason, count in most]
        return lines


def codes_of(sample: Sample, output: OutputModality) -> list[list[int]]:
    """The codes of each of a sample's outputs of a modality."""
    ids = sample.tokens.ids
    begins = [place for place, token_id in enumerate(ids) if token_id == output.begin_id]
    runs = [ids[begin + 1 : ids.index(output.end_id, begin)] for begin in begins]
    return [[token_id - output.first_id for token_id in run] for run in runs]


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return f"{min(values):,} to {max(values):,}, median {statistics.median(values):,.0f}"


@dataclass(frozen=True)
class ShownSample:
    """A sample for the page; `previews` holds (MIME type, content) of its media, by modality."""

    sample: Sample
    split: str
    previews: dict[str, list[tuple[str, bytes]]]


def inspect_shards(
    folder: Path, reader: SampleEncoder, limit: int, num_shown: int
) -> tuple[Statistics, list[ShownSample]]:
    """Statistics of the first `limit` samples of each shard, and the first samples to show."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder}: no shards (.tar) in this folder")
    totals = Statistics()
    shown: list[ShownSample] = []
    for tar in tars:
        split = tar.name.rpartition("-")[0] or tar.stem
        for parts in itertools.islice(_samples(tar), limit):
            try:
                sample, raw = _read_sample(parts, reader)
            # A damaged file can make a decoder fail in any way.
            except Exception as error:
                totals.refused[generic_reason(error_reason(error))] += 1
                continue
            totals.add(split, sample, raw, reader.config)
            if len(shown) < num_shown:
                previews = {name: _previews(name, raw[name], reader.config) for name in raw}
                for name in sample.outputs:
                    output = reader.config.outputs[name]
                    with errors_named(f"sample {sample.key}, {output.singular}, decoded"):
                        decoded = _decoded(codes_of(sample, output), output)
                    previews[f"{name}, decoded"] = decoded
                shown.append(ShownSample(sample, split, previews))
    # What was refused when the shards were written is listed beside them.
    if (folder / REJECTED).is_file():
        with (folder / REJECTED).open(encoding="utf-8") as lines:
            totals.refused.update(generic_reason(json.loads(line)["reason"]) for line in lines)
    return totals, shown


def _previews(name: str, items: Sequence[Any], config: MimoConfig) -> list[tuple[str, bytes]]:
    """What a browser can show of decoded items; their sizes in words if it is nothing."""
    encoder = config.inputs[name].encoder
    return [
        preview
        for item in items
        for preview in encoder.preview(item) or [("text/plain", encoder.describe(item).encode())]
    ]


def _decoded(runs: Sequence[Sequence[int]], output: OutputModality) -> list[tuple[str, bytes]]:
    """What an answer's codes stand for, in the format that an answer is saved in."""
    codec = output.codec
    suffix = next(iter(codec.suffixes), ".bin").removeprefix(".")
    kind = codec.mime_type(suffix)
    return [(kind, codec.encode_bytes(codec.decode(codes), suffix)) for codes in runs]


def _samples(tar: Path) -> Iterator[TarParts]:
    try:
        yield from tar_samples(tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{tar}: a damaged tar file ({error})") from None


def _read_sample(parts: TarParts, reader: SampleEncoder) -> tuple[Sample, dict[str, list[Any]]]:
    """A sample, and its decoded media by modality."""
    record = parts.record(reader.config)
    sample = reader.encode(record, parts)
    raw = {
        name: [reader.config.inputs[name].encoder.read(parts(file)) for file in files]
        for name, files in sample.sources.items()
    }
    return sample, raw


def render_page(
    folder: Path, totals: Statistics, shown: Iterable[ShownSample], reader: SampleEncoder
) -> str:
    """An HTML page that loads nothing from elsewhere and runs no script."""
    lines = html.escape("\n".join(totals.lines()))
    samples = "\n".join(_section(sample, reader) for sample in shown)
    return _PAGE.format(title=html.escape(folder.name), statistics=lines, samples=samples)


def _section(shown: ShownSample, reader: SampleEncoder) -> str:
    tokens = shown.sample.tokens
    media = "".join(
        f"<figure>{_media_element(mime_type, content, f'{name} of {shown.sample.key}')}"
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, previews in shown.previews.items()
        for mime_type, content in previews
    )
    spans = "".join(_token_spans(tokens, reader.config, reader.tokenizer))
    return (
        f"<section><h2>{html.escape(shown.sample.key)} <small>{html.escape(shown.split)}, "
        f"{len(tokens.ids)} tokens</small></h2>"
        f'<div class="media">{media}</div><p class="tokens">{spans}</p></section>'
    )


def _media_element(mime_type: str, content: bytes, label: str) -> str:
    """The element that shows a preview of this MIME type; a link to save it if there is none."""
    kind = mime_type.partition("/")[0]
    label = html.escape(label)
    if kind == "text":
        return f"<pre>{html.escape(content.decode(errors='replace'))}</pre>"
    source = f"data:{html.escape(mime_type)};base64,{base64.b64encode(content).decode()}"
    if kind == "image":
        return f'<img src="{source}" alt="{label}">'
    if kind in ("audio", "video"):
        return f'<{kind} controls src="{source}" aria-label="{label}"></{kind}>'
    return f'<a download href="{source}">{label} ({len(content):,} bytes)</a>'


def _token_spans(tokens: TokenSequence, config: MimoConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """A span for each token, one for a run of placeholders or codes; target tokens are marked."""
    names = {modality.token_id: name for name, modality in config.inputs.items()}
    for modality, output in config.outputs.items():
        names |= dict.fromkeys(output.ids, modality)
    colours = {name: number % NUM_COLOURS for number, name in enumerate(config.modalities)}
    special = {tokenizer.bos_id: "⟨begin⟩", tokenizer.eos_id: "⟨end⟩"}
    # The loss mask stands where a token is predicted, one position earlier.
    is_target = [0, *tokens.loss_mask[:-1]]
    pairs = list(zip(tokens.ids, is_target, strict=True))
    for name, run in groupby(pairs, key=lambda pair: names.get(pair[0])):
        members = list(run)
        if name is not None:
            is_said = members[0][1]
            text = f"{config.modalities[name].placeholder} x {len(members)}"
            if is_said:
                text = _codes_text([token for token, _ in members], config.outputs[name])
            style = f"media-{colours[name]}{' target' * is_said}"
            yield f'<span class="{style}">{html.escape(text)}</span>'
            continue
        for token, has_loss in members:
            text = special.get(token) or tokenizer.decode([token]).replace("\n", "⏎") or "·"
            target = ' class="target"' if has_loss else ""
            yield f'<span{target} title="{token}">{html.escape(text)}</span>'


def _codes_text(ids: Sequence[int], output: OutputModality) -> str:
    """Outputs as their codes: `<speech> 3 141 59`."""
    words = {output.begin_id: output.placeholder, output.end_id: ""}
    return " ".join(words.get(token, str(token - output.first_id)) for token in ids).strip()


# As many as the page's style has classes media-N.
NUM_COLOURS = 3
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
 color: #222; background: #fff; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; }}
section {{ border-top: 1px solid #ccc; padding: .5rem 0; }}
h2 {{ font-size: 1rem; margin: .5rem 0; }} small {{ font-weight: normal; color: #666; }}
.media {{ display: flex; flex-wrap: wrap; gap: 1rem; align-items: end; }}
figure {{ margin: 0; }} figcaption {{ font-size: .75rem; color: #666; }}
img, video {{ min-width: 96px; max-width: 224px; image-rendering: pixelated;
 border: 1px solid #ccc; }}
.tokens span {{ padding: .1rem .15rem; border-radius: .2rem; outline: 1px solid #e4e4e4;
 white-space: pre-wrap; }}
.tokens .target {{ background: #c9f2c9; outline-color: #3a3; font-weight: 600; }}
.tokens .media-0 {{ background: #cfe3ff; }} .tokens .media-1 {{ background: #ffe0b8; }}
.tokens .media-2 {{ background: #e7d5ff; }}
</style>
</head>
<body>
<h1>{title}</h1>
<pre>{statistics}</pre>
<p>Each sample as the model sees it: its media after preprocessing, and its token sequence.
<span class="tokens"><span class="target">Green tokens</span></span> are target tokens: they carry
loss.</p>
{samples}
</body>
</html>
"""
