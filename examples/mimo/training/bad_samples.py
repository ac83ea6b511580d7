"""Samples of the shards that could not be read: counted, named in a file, bounded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron.core import mpu

from examples.mimo.data.batch import BadSample
from examples.mimo.models.placement import LANGUAGE
from examples.mimo.training.layout import own_module

FILE_NAME = "bad_samples.jsonl"


class BadSamples:
    """Those of this data-parallel rank since training began; a checkpoint remembers the count."""

    def __init__(self) -> None:
        self.count = 0
        self.last: BadSample | None = None

    def add(self, args: argparse.Namespace, found: Sequence[BadSample]) -> None:
        """Count them; of the ranks that read the same data one writes them to `--save`."""
        if not found:
            return
        self.count += len(found)
        self.last = found[-1]
        if args.save and _is_writer(args):
            file = Path(args.save) / FILE_NAME
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = [{"iteration": args.curr_iteration + 1, **asdict(bad)} for bad in found]
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows))

    def check(self, args: argparse.Namespace, total: int) -> None:
        """ValueError when all ranks together have met more than `--max-bad-samples`."""
        if total > args.max_bad_samples:
            last = f"; the last: {self.last.reason}" if self.last else ""
            raise ValueError(
                f"--data-path {args.data_path[0]}: {total} samples could not be read, more than "
                f"--max-bad-samples {args.max_bad_samples}{last}"
            )


BAD_SAMPLES = BadSamples()


def _is_writer(args: argparse.Namespace) -> bool:
    return own_module(args) in (None, LANGUAGE) and bool(
        mpu.is_pipeline_last_stage(ignore_virtual=True)
        and mpu.get_tensor_model_parallel_rank() == 0
        and mpu.get_context_parallel_rank() == 0
    )
