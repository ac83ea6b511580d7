"""Run by test_answers.py on every rank: answers to held-out samples at a layout.

answer_many.py CHECKPOINT DATA TP PP SAMPLES [greedy]: on one process it also compares decoding from
the cache with whole forward passes; with `greedy` it gives greedy answers alone.
"""

import json
import os
import sys
from pathlib import Path

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
command.single_process_unless_launched()
compat.install()

import torch
from megatron.core import mpu

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.data.batch import collate, read_records
from examples.mimo.data.turns import FilesInside
from examples.mimo.generation.api import Mimo
from examples.mimo.generation.engine import Engine, SequenceRequest
from examples.mimo.generation.sampling import Options, Sampling

folder, data, tp, pp, count = *map(Path, sys.argv[1:3]), *map(int, sys.argv[3:6])
with command.stdout_to(os.devnull):
    model = Mimo(open_checkpoint(folder), tp, pp)
reader = model.sample_encoder()
samples = [
    reader.encode({**record, "conversations": record["conversations"][:1]}, FilesInside(data))
    for record in read_records(data / "heldout.jsonl")[:count]
]
encoded = []
if pp == 1:
    for name, modality in model.model.modality_submodules.items():
        modality.register_forward_hook(lambda *_, name=name: encoded.append(name))
# Of a model with outputs an answer takes its text, and then that.
steps = 24 if model.config.outputs else 12
greedy = Options(steps)
drawn = Options(steps, Sampling(temperature=1.5, top_k=40, repetition_penalty=1.2, seed=7))
scored = Options(steps, logprobs=True, prompt_logprobs=True)
penalties = Sampling(2.0, frequency_penalty=-1.5, presence_penalty=-0.5, seed=7)
penalised = Options(steps, penalties, logprobs=True, top_logprobs=5)


def tokens(options, **more):
    return [answer.tokens for answer in model.answer(samples, options, **more)]


def left_early():
    """One answer of several, left; and what is met beside a stream, which is left too."""
    answers = model.iter_answers(iter(enumerate(samples)), greedy)
    number, answer = next(answers)
    answers.close()
    pieces = model.stream_answer(samples[0], greedy)
    next(pieces)
    try:
        met = len(model.answer(samples[:1], greedy))
    except ValueError as error:
        met = str(error)
    pieces.close()
    return number, answer.tokens, met


if sys.argv[6:] == ["greedy"]:
    print(json.dumps({"tokens": tokens(greedy)}))
    command.leave_process_group()
    sys.exit()
left = left_early()
told = model.answer(samples, scored)
result = {
    "left early": left,
    "tokens": tokens(greedy),
    "alone": tokens(greedy, batch_size=1),
    "seven": tokens(greedy, batch_size=7),
    "streamed": [list(model.stream_answer(s, greedy))[-1].answer.tokens for s in samples],
    "drawn": tokens(drawn),
    "drawn alone": tokens(drawn, batch_size=1),
    "penalised": tokens(penalised),
    "unpenalised": tokens(Options(steps, Sampling(2.0, seed=7))),
    "top": [
        [piece.output.top_logprobs for piece in model.stream_answer(sample, penalised)]
        for sample in samples
    ],
    "logprobs": [answer.logprobs for answer in told],
    "prompt logprobs": [answer.prompt_logprobs for answer in told],
    "outputs": [answer.outputs for answer in told],
    "text alone": tokens(Options(steps, outputs=())),
}


def without_a_cache(sample, steps):
    """Greedy tokens, each from a forward pass over everything before it, and its logits."""
    batch = collate([sample])
    ids, chosen = batch.input_ids, []
    for _ in range(steps):
        with torch.no_grad():
            logits = model.model(ids, modality_inputs=batch.modality_inputs)
        chosen.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[chosen[-1]]])], dim=1)
    return chosen, logits[0].log_softmax(dim=-1), ids[0]


def cached(sample, steps):
    engine = Engine(model.model, model.config, end_ids=())
    outputs = engine.start([SequenceRequest(0, sample, steps, logprobs=True, prompt_logprobs=True)])
    while engine.sequences:
        outputs += engine.step()
    prompt = outputs[0].prompt_logprobs
    return [r.token for r in outputs], [r.logprob for r in outputs], prompt


def error(sample, steps):
    """The largest difference of any log-probability, or None where the tokens differ."""
    chosen, expected, ids = without_a_cache(sample, steps)
    mine, logprobs, prompt = cached(sample, steps)
    if mine != chosen:
        return None
    pairs = enumerate([*prompt, *logprobs])
    return max(abs(p - float(expected[i - 1, ids[i]])) for i, p in pairs if p is not None)


if mpu.get_tensor_model_parallel_rank() > 0:
    # Were its own choice to count, ranks would go apart.
    model.engine._choose = lambda logits, sequences: torch.zeros(len(sequences))
result["one rank chooses"] = tokens(greedy)
if tp * pp == 1:
    result["errors"] = [error(sample, 12) for sample in samples[:5]]
    encoded.clear()
    cached(samples[0], 12)
    result["encoded"] = encoded
if int(os.environ["RANK"]) == 0:
    print(json.dumps(result))
command.leave_process_group()
