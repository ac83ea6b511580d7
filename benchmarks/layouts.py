"""python -m benchmarks.layouts: every parallel layout against one process, from one checkpoint.

tests/helpers/layouts.py holds the layouts and the comparison; the tests run some of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the page is about CPUs

from tests.helpers import layouts
from tests.helpers.layouts import (
    BF16_BOUND,
    FIRST_LOSS_BOUND,
    GRADIENT_BOUND,
    SMALL_BUCKETS,
    TEN_LOSSES_BOUND,
)


def main() -> None:
    """Measure all layouts, print and write the table; status 1 if one is out of bounds."""
    parser = argparse.ArgumentParser(description="Every layout against one process.")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--only", default="", help="only layouts whose name holds this")
    options = parser.parse_args()
    rows = [
        "| layout | processes | first loss | worst gradient | ten losses | equal |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        references = layouts.References(work / "references")
        chosen = [layout for layout in layouts.LAYOUTS if options.only in layout.name]
        begun = time.monotonic()
        for number, layout in enumerate(chosen):
            difference = references.difference(layout, work / str(number))
            within = difference.within_bounds(layout.bf16)
            equal &= within
            rows.append(
                f"| {layout.name} | {layout.processes} | {difference.first_loss:.1e} | "
                f"{difference.gradient:.1e} | {difference.ten_losses:.1e} | "
                f"{'yes' if within else 'NO'} |"
            )
            left = (time.monotonic() - begun) / (number + 1) * (len(chosen) - number - 1)
            print(f"{rows[-1]} {left / 60:.0f} min left", file=sys.stderr, flush=True)
            if not within:
                print(f"    out of bounds, most {difference.worst_parameter}", file=sys.stderr)
    refused = ["| layout | processes | answer |", "| --- | ---: | --- |"]
    refused += [
        f"| {layout.name} | {layout.processes} | {layouts.refusal(layout)} |"
        for layout in layouts.REFUSED
        if options.only in layout.name
    ]
    table, refusals = "\n".join(rows), "\n".join(refused)
    print(f"{table}\n\n{refusals}")
    if options.output:
        page = _PAGE.format(table=table, refusals=refusals)
        options.output.write_text(page, encoding="utf-8")
    sys.exit(0 if equal else 1)


_PAGE = f"""# Parallel layouts against one process

`make layouts` wrote this. `tiny_avlm`, fp32, from one checkpoint, on batches that mix samples
with and without media. Relative differences from one process; the bounds are
{FIRST_LOSS_BOUND:g} for the first iteration's loss, {GRADIENT_BOUND:g} of its norm for every
parameter's gradient, {TEN_LOSSES_BOUND:g} for the losses of ten iterations; in bf16, against one
process in bf16, {BF16_BOUND:g} for all three. After the tenth iteration all copies of every weight,
on replicas and on stages, are equal to the bit. Every rank has a hash seed of its own.

- *overlap*: gradients are reduced while the backward pass runs, in buckets of
  {SMALL_BUCKETS[1]} elements.
- *text first*: of every four samples the first two have no media, so some replicas of an encoder
  never have anything to encode.
- *tied embeddings*: the head is the token embedding, which the first and the last stage both hold.
  `--freeze` freezes the language model as a whole; *layers frozen* and *embedding frozen* freeze
  parts of it in code.

{{table}}

## What cannot run

Each is refused in one line before anything is built. The words are what `train.py` answers; those
in quotes, and those about FSDP, are Megatron's.

{{refusals}}
"""


if __name__ == "__main__":
    main()
