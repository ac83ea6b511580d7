"""Run by test_answers.py on every rank: greedy tokens of held-out samples at a layout.

answer_many.py CHECKPOINT DATA TP PP SAMPLES; on one process also compares decoding from the cache
with whole forward passes.
"""

import json
import os
import sys
from pathlib import Path

from examples.mimo import command, host

command.prepare_environment()
command.alone_unless_launched()
host.install()

import torch  # noqa: E402

from examples.mimo.checkpoint.description import open_checkpoint  # noqa: E402
from examples.mimo.data.batch import collate  # noqa: E402
from examples.mimo.data.datasets import read_records  # noqa: E402
from examples.mimo.data.samples import Inside  # noqa: E402
from examples.mimo.inference.answerer import Answerer  # noqa: E402
from examples.mimo.inference.generate import generate  # noqa: E402

folder, data, tp, pp, count = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:])
with command.stdout_to(os.devnull):
    answerer = Answerer(open_checkpoint(folder), tp, pp)
reader = answerer.reader()
samples = [
    reader.read({**record, "conversations": record["conversations"][:1]}, Inside(data))
    for record in read_records(data / "heldout.jsonl")[:count]
]
encoded = []
if pp == 1:
    for name, modality in answerer.model.modality_submodules.items():
        modality.register_forward_hook(lambda *_, name=name: encoded.append(name))
found = {"tokens": [answer.tokens for answer in answerer.answer(samples, max_new_tokens=12)]}
found["texts"] = [answer.text for answer in answerer.answer(samples, 12, batch_size=1)]


def without_a_cache(sample, steps):
    """Greedy tokens, each from a forward pass over everything before it."""
    batch = collate([sample])
    ids, chosen = batch.input_ids, []
    for _ in range(steps):
        with torch.no_grad():
            logits = answerer.model(ids, modality_inputs=batch.modality_inputs)
        chosen.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[chosen[-1]]])], dim=1)
    return chosen


if tp * pp == 1:
    cached = [generate(answerer.model, collate([s]), 12, eos_id=-1)[0] for s in samples[:5]]
    found["cached"] = cached
    found["uncached"] = [without_a_cache(s, 12) for s in samples[:5]]
    encoded.clear()
    generate(answerer.model, collate(samples[:1]), 12, eos_id=-1)
    found["encoded"] = encoded
if int(os.environ["RANK"]) == 0:
    print(json.dumps(found))
command.leave_process_group()
