"""Run by test_real.py: compare_real.py WORK DATA; WORK holds folders/ and start/."""

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
import transformers as hf
from safetensors.torch import load_file
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.generation.api import Mimo
from examples.mimo.generation.sampling import Options
from examples.mimo.model.parts import ENCODER

PROMPTS = (
    "What is the capital of France?",
    "Name three animals.",
    "Write a short poem about the sea.",
    "What is two plus two?",
    "Who are you?",
)
TOKENS = 32


def main():
    work, data = Path(sys.argv[1]), Path(sys.argv[2])
    folders = work / "folders"
    with command.stdout_to(os.devnull):
        model = Mimo(open_checkpoint(work / "start"))
    samples = [
        model.encode({"conversations": [{"role": "user", "content": prompt}]}) for prompt in PROMPTS
    ]
    answers = model.answer(samples, Options(TOKENS), batch_size=1)
    result = {
        "ours": [answer.tokens for answer in answers],
        "texts": [answer.text for answer in answers],
        "theirs": their_answers(folders / "language"),
        "picture": picture_error(model, folders / "images"),
        "recordings": recording_errors(model, folders / "audios", data),
    }
    print(json.dumps(result))


def their_answers(folder):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    result = []
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        rows = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        tokens = rows[0, ids.input_ids.shape[1] :].tolist()
        end = tokenizer.eos_token_id
        result.append(tokens[: tokens.index(end)] if end in tokens else tokens)
    return result


@torch.no_grad()
def picture_error(model, folder):
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = hf.Dinov2Model.from_pretrained(folder).eval()(pixels).last_hidden_state[0, 1:]
    encoder = model.model.modality_submodules["images"].encoders[ENCODER]
    # transformers returns a patch a row.
    encoder.token_side = 1
    return float((encoder(pixel_values=pixels) - expected).abs().max())


@torch.no_grad()
def recording_errors(model, folder, data):
    theirs = WhisperEncoder(hf.WhisperConfig.from_pretrained(folder)).eval()
    stored = load_file(folder / "model.safetensors")
    theirs.load_state_dict({n.removeprefix("model.encoder."): t for n, t in stored.items()})
    config = model.config.modalities["audios"].encoder
    encoder = model.model.modality_submodules["audios"].encoders[ENCODER]
    encoder.frames_per_token = 1
    errors = []
    for file in sorted((data / "audios").glob("*-name.flac"))[:3]:
        inputs = config.preprocess(config.read(file))
        expected = theirs(inputs["input_features"]).last_hidden_state[0]
        result = encoder(**inputs)
        errors.append(float((result - expected[: len(result)]).abs().max()))
    return errors


if __name__ == "__main__":
    main()
