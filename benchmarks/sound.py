"""python -m benchmarks.sound: when the sound of an answer is heard, of a server on this machine.

Models of two sizes with random weights, fp32, which are made to answer with ten seconds of sound in
the codes of a VectorQuantisedMel that has learned eSpeak NG's voice. OpenAI's client asks for it as
a stream and as a whole; times are from the request, medians of a few, one thread each for the model
and for the codec.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from examples.mimo.cli import command

command.prepare_environment(uses_gpus=False)  # the page compares CPUs
command.single_process_unless_launched()

from examples.mimo import compat

compat.install()

import torch

from demos.digits.speech import Synthesiser
from examples.mimo.checkpoint.description import (
    RELEASE,
    TRACKER,
    open_checkpoint,
    save_description,
)
from examples.mimo.configs import get_model_config, with_codec_folder
from examples.mimo.configs.schema import MimoConfig, ModalityConfig
from examples.mimo.generation.api import Mimo
from examples.mimo.generation.sampling import AnswerState, Options
from examples.mimo.hf.from_hf import initialize_single_process, sharded_state
from examples.mimo.hf.io import Chunk
from examples.mimo.hf.io import write_checkpoint as write_chunks
from examples.mimo.modalities.speech import VectorQuantisedMel
from examples.mimo.model.parts import part_names
from tests.helpers.served import InProcess

ROUNDS, NUM_CODES, SURE = 3, 210, 1e4
HEADING = """| language model | codes alone | first sound | last sound | as a whole |
| --- | ---: | ---: | ---: | ---: |"""
BODY = {"model": "m", "messages": [{"role": "user", "content": "Say it."}], "max_tokens": 400}


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a data folder with a tokenizer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    synthesiser = Synthesiser()
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    texts = [f"{a} and {b} is {c}." for a in words for b in words for c in words[:2]]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "codecs/speech")
        place.mkdir(parents=True)
        codec = VectorQuantisedMel(folder=str(place))
        codec.learn(synthesiser.say(text, "m3") for text in texts)
        print(HEADING)
        for name, provider in {"tiny_avlm": tiny, "SmolLM2-135M": smollm2}.items():
            config = with_codec_folder(provider(), Path(folder))
            write_checkpoint(config, args.data, Path(folder, name))
            print(f"| {name} | {' | '.join(measure(Path(folder, name)))} |", flush=True)
    seconds = NUM_CODES * codec.patch_samples / codec.sample_rate_hz
    print(f"\n{NUM_CODES} codes are {seconds:.1f} s of sound.")


def tiny() -> MimoConfig:
    """The demo's model, with speech as an output."""
    return with_speech("tiny", "tiny_avlm")


def smollm2() -> MimoConfig:
    """The same with a language model of SmolLM2-135M's sizes."""
    return with_speech("smollm2", "smollm2_avlm")


def with_speech(name: str, sizes: str) -> MimoConfig:
    """The demo's model with a language model of these sizes, and speech as an output."""
    base = get_model_config("tiny_avlm")
    language = dataclasses.replace(
        get_model_config(sizes).language, vocab_size=base.language.vocab_size, seq_length=512
    )
    speech = ModalityConfig(singular="speech", placeholder="<speech>", codec=VectorQuantisedMel())
    modalities = {**base.modalities, "speech": speech}
    name = f"benchmarks.sound:{name}"
    return dataclasses.replace(base, name=name, language=language, modalities=modalities)


def write_checkpoint(config: MimoConfig, data: Path, folder: Path) -> None:
    """A checkpoint with random weights."""
    initialize_single_process(seed=1)
    chunks, objects = [], []
    for part in part_names(config):
        tensors, others = sharded_state(config, part, "cpu")
        objects += others
        for key, pieces in tensors.items():
            for piece in pieces:
                weight = piece.data.detach()
                shape = (*[1] * piece.prepend_axis_num, *piece.local_shape)
                where = key, tuple(piece.global_offset), shape, tuple(piece.global_shape)
                chunks.append(Chunk(*where, weight.dtype, lambda weight=weight: weight))
    (folder / RELEASE).mkdir(parents=True)
    write_chunks(folder / RELEASE, chunks, objects)
    save_description(folder, config, data)
    (folder / TRACKER).write_text(RELEASE)


def speaks_at_once(model: Mimo) -> None:
    """Make every answer that may hold speech NUM_CODES of it and nothing else."""
    grammar, speech = model.engine.grammar, model.config.outputs["speech"]
    mask, end = grammar.mask, grammar.end_ids[0]

    def force(logits: torch.Tensor, states: Sequence[AnswerState]) -> torch.Tensor:
        logits = logits.clone()
        for row, state in zip(logits, states, strict=True):
            if state.modality is None:
                row[end if state.codes else speech.begin_id] += SURE
            else:
                row[speech.end_id] += SURE if len(state.codes) >= NUM_CODES else -SURE
        return mask(logits, states)

    grammar.mask = force


def measure(folder: Path) -> list[str]:
    """Seconds to all codes without a server, to first and last sound, and to a whole answer."""
    model = Mimo(open_checkpoint(folder))
    speaks_at_once(model)
    sample = model.encode({"key": "k", "conversations": BODY["messages"]})
    rows = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        (answer,) = model.answer([sample], Options(BODY["max_tokens"], outputs=("speech",)))
        rows.append([time.perf_counter() - began])
        assert [len(codes) for codes in answer.outputs["speech"]] == [NUM_CODES]
    server = InProcess(model)
    for row in rows:
        row += streamed(server)
        row.append(whole(server))
    server.end()
    # The first round of each fills caches.
    medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    return [f"{seconds:.2f} s" for seconds in medians]


def streamed(server: InProcess) -> tuple[float, float]:
    """Seconds from a request to its first and to its last sound."""
    sound = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "pcm16"}}
    began, times = time.perf_counter(), []
    for chunk in server.client().chat.completions.create(**BODY, **sound, stream=True):
        audio = chunk.choices[0].delta.audio
        if audio and audio.data:
            times.append(time.perf_counter() - began)
    return times[0], times[-1]


def whole(server: InProcess) -> float:
    """Seconds to an answer with a WAV file."""
    sound = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
    began = time.perf_counter()
    reply = server.client().chat.completions.create(**BODY, **sound)
    assert reply.usage.completion_tokens_details.audio_tokens == NUM_CODES
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
