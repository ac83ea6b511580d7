"""Shards as a person sees them: statistics, and a page of samples as the model sees them."""

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

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import Sample, SampleEncoder, TokenSequence
from examples.mimo.data.tokenizer import Tokenizer
from examples.mimo.shards.manifest import TarParts, members
from examples.mimo.shards.read import words_of
from examples.mimo.shards.write import REJECTED


@dataclass
class Statistics:
    """What the samples of a folder are like; `media` describes items, by modality."""

    samples: Counter[str] = field(default_factory=Counter)
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    media: dict[str, Counter[str]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """For a terminal."""
        counts = ", ".join(f"{name} {count:,}" for name, count in sorted(self.samples.items()))
        found = [f"samples   {sum(self.samples.values()):,} ({counts})"]
        for name, values in (("turns", self.turns), ("tokens", self.tokens)):
            found.append(f"{name:<9} {_spread(values)}")
        share = 100 * sum(self.learned) / max(1, sum(self.tokens))
        found.append(f"learned   {_spread(self.learned)} tokens, {share:.0f} % of all")
        for name, kinds in self.media.items():
            common = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common(4))
            others = f" and {len(kinds) - 4} other kinds" if len(kinds) > 4 else ""
            found.append(f"{name:<9} {sum(kinds.values()):,}: {common}{others}")
        if self.refused:
            found.append(f"refused   {sum(self.refused.values()):,}")
            found += [f"{count:>9,} {reason}" for reason, count in self.refused.most_common(5)]
        return found


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "none"
    return (
        f"{min(values):,} to {max(values):,}, half of them up to {statistics.median(values):,.0f}"
    )


@dataclass(frozen=True)
class Shown:
    """A sample for the page: what it holds, and what each item looks or sounds like."""

    sample: Sample
    split: str
    previews: dict[str, list[tuple[str, bytes]]]


def look(
    folder: Path, reader: SampleEncoder, limit: int, shown: int
) -> tuple[Statistics, list[Shown]]:
    """Statistics of the first `limit` samples of each shard, and `shown` samples for the page."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"{folder}: no shards (.tar) in this folder")
    found = Statistics()
    chosen: list[Shown] = []
    for tar in tars:
        split = tar.name.rpartition("-")[0] or tar.stem
        for parts in itertools.islice(_members(tar), limit):
            try:
                sample, raw = _read(parts, reader)
            # A damaged file can make a decoder fail in any way.
            except Exception as error:
                found.refused[_kind(words_of(error))] += 1
                continue
            _count(found, split, sample, raw, reader.config)
            if len(chosen) < shown:
                chosen.append(Shown(sample, split, _previews(raw, reader.config)))
    _add_rejected(found, folder)
    return found, chosen


def _members(tar: Path) -> Iterator[TarParts]:
    try:
        yield from members(tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{tar}: a damaged tar file ({error})") from None


def _read(parts: TarParts, reader: SampleEncoder) -> tuple[Sample, dict[str, list[object]]]:
    """A sample, and its decoded media by modality."""
    record = parts.record(reader.config)
    sample = reader.encode(record, parts)
    raw = {
        name: [reader.config.modalities[name].encoder.read(parts(file)) for file in record[name]]
        for name in sample.media
    }
    return sample, raw


def _count(
    found: Statistics, split: str, sample: Sample, raw: dict[str, list[object]], config: MimoConfig
) -> None:
    found.samples[split] += 1
    found.tokens.append(len(sample.tokens.ids))
    found.learned.append(sum(sample.tokens.loss_mask))
    # A learned run is an answer; what is asked before it makes it a turn of both.
    found.turns.append(sum(learned for learned, _ in groupby(sample.tokens.loss_mask)))
    for name, items in raw.items():
        kinds = found.media.setdefault(name, Counter())
        kinds.update(config.modalities[name].encoder.describe(item) for item in items)


def _previews(
    raw: dict[str, list[object]], config: MimoConfig
) -> dict[str, list[tuple[str, bytes]]]:
    return {
        name: [view for item in items for view in config.modalities[name].encoder.preview(item)]
        for name, items in raw.items()
    }


def _kind(reason: str) -> str:
    """A reason without the sample's name."""
    return reason.partition(": ")[2] or reason


def _add_rejected(found: Statistics, folder: Path) -> None:
    file = folder / REJECTED
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        found.refused.update(_kind(json.loads(line)["reason"]) for line in lines)


def page(folder: Path, found: Statistics, shown: Iterable[Shown], reader: SampleEncoder) -> str:
    """An HTML page that needs nothing from elsewhere and runs no script."""
    lines = html.escape("\n".join(found.lines()))
    samples = "\n".join(_section(one, reader) for one in shown)
    return _PAGE.format(title=html.escape(folder.name), statistics=lines, samples=samples)


def _section(one: Shown, reader: SampleEncoder) -> str:
    views = "".join(
        f"<figure>{_element(kind, data)}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, previews in one.previews.items()
        for kind, data in previews
    )
    row = "".join(_spans(one.sample.tokens, reader.config, reader.tokenizer))
    return (
        f"<section><h2>{html.escape(one.sample.key)} <small>{html.escape(one.split)}, "
        f"{len(one.sample.tokens.ids)} tokens</small></h2>"
        f'<div class="media">{views}</div><p class="row">{row}</p></section>'
    )


def _element(kind: str, data: bytes) -> str:
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    if kind.startswith("image/"):
        return f'<img src="{source}" alt="">'
    return f'<audio controls src="{source}"></audio>'


def _spans(row: TokenSequence, config: MimoConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """A span a token, and one for a run of placeholders; learned tokens are marked."""
    names = {modality.token_id: name for name, modality in config.modalities.items()}
    colours = {name: number for number, name in enumerate(config.modalities)}
    # The loss of a token is masked where it is predicted, one place earlier.
    learned = [0, *row.loss_mask[:-1]]
    pairs = list(zip(row.ids, learned, strict=True))
    for name, run in groupby(pairs, key=lambda pair: names.get(pair[0])):
        tokens = list(run)
        if name is not None:
            text = f"{config.modalities[name].placeholder} x {len(tokens)}"
            yield f'<span class="media-{colours[name]}">{html.escape(text)}</span>'
            continue
        for token, has_loss in tokens:
            text = _text(token, tokenizer)
            kind = ' class="learned"' if has_loss else ""
            yield f'<span{kind} title="{token}">{html.escape(text)}</span>'


def _text(token: int, tokenizer: Tokenizer) -> str:
    special = {tokenizer.bos_id: "⟨begin⟩", tokenizer.eos_id: "⟨end⟩"}
    return special.get(token) or tokenizer.decode([token]).replace("\n", "⏎") or "·"


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
img {{ min-width: 96px; max-width: 224px; image-rendering: pixelated; border: 1px solid #ccc; }}
.row span {{ padding: .1rem .15rem; border-radius: .2rem; outline: 1px solid #e4e4e4;
 white-space: pre-wrap; }}
.row .learned {{ background: #c9f2c9; outline-color: #3a3; font-weight: 600; }}
.row .media-0 {{ background: #cfe3ff; }} .row .media-1 {{ background: #ffe0b8; }}
.row .media-2 {{ background: #e7d5ff; }}
</style>
</head>
<body>
<h1>{title}</h1>
<pre>{statistics}</pre>
<p>Each sample as the model sees it: its media after preprocessing, and its row of tokens.
<span class="row"><span class="learned">Green tokens</span></span> carry loss.</p>
{samples}
</body>
</html>
"""
