"""Three lines of Python answer as the command answers; importing them changes nothing."""

import os
import subprocess
import sys

import pytest

from examples.mimo import Mimo
from examples.mimo.checkpoint.description import open_checkpoint
from tests.helpers.commands import QUESTION, ROOT

IMPORT_ONLY = """
import sys
import torch
before = {name: vars(torch.Tensor)[name] for name in vars(torch.Tensor)}
before |= {f"cuda.{name}": value for name, value in vars(torch.cuda).items()}
before |= {f"Module.{name}": value for name, value in vars(torch.nn.Module).items()}
from examples.mimo import Mimo
after = {name: vars(torch.Tensor)[name] for name in vars(torch.Tensor)}
after |= {f"cuda.{name}": value for name, value in vars(torch.cuda).items()}
after |= {f"Module.{name}": value for name, value in vars(torch.nn.Module).items()}
assert Mimo.load
changed = [name for name in before if before[name] is not after.get(name)]
print(changed, [name for name in sys.modules if name.split(".")[0] == "megatron"])
"""


def test_importing_replaces_nothing_and_imports_no_megatron():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ONLY],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "[] []\n", done.stderr


@pytest.fixture(scope="module")
def model(checkpoint, build_model):
    return Mimo(open_checkpoint(checkpoint))


@pytest.fixture(scope="module")
def files(media):
    return {"images": [media / "white.png"], "audios": [str(media / "second.wav")]}


def test_a_prompt_is_answered_as_the_command_answers_it(model, files, media, command):
    flags = ("--image-path", str(media / "white.png"), "--audio-path", str(media / "second.wav"))
    expected = command(*flags, "--prompt", "What is it?")
    assert model.generate("What is it?", **files) == expected
    assert "".join(model.stream("What is it?", **files)) == expected
    data = {"images": [(media / "white.png").read_bytes()], "audios": files["audios"]}
    assert model.generate("What is it?", **data) == expected
    assert model.generate(**files) == command(*flags)


def test_sampling_options_are_the_commands(model, command):
    sampling = {"temperature": 2.0, "seed": 3, "top_k": 50, "max_new_tokens": 9}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    assert model.generate(QUESTION, **sampling) == command("--prompt", QUESTION, *flags)
    sampling |= {"frequency_penalty": -1.5, "presence_penalty": -0.5}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    assert model.generate(QUESTION, **sampling) == command("--prompt", QUESTION, *flags)
    whole = model.generate(QUESTION)
    stop = whole[1:3]
    for stops in (stop, [stop]):
        assert model.generate(QUESTION, stop=stops) == whole[: whole.index(stop)]


def test_a_list_of_prompts_gives_a_list(model, media):
    prompts, picture = [QUESTION, "What is it?", QUESTION], media / "white.png"
    answers = model.generate(prompts, images=[[], [picture], None], batch_size=2)
    assert answers == [
        model.generate(QUESTION),
        model.generate("What is it?", images=[picture]),
        model.generate(QUESTION),
    ]
    assert model.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "keywords", "message"),
    [
        ("x", {"videos": ["a.mp4"]}, "videos: neither a modality of tiny_avlm nor a sampling"),
        ("x", {"temprature": 1.0}, "choose from images, audios, max_new_tokens, temperature"),
        ("x", {"temperature": "hot"}, "temperature 'hot': from 0 to 100"),
        ("x", {"top_k": 1.5}, "top_k 1.5: from 0 to 2.14748e+09, a whole number"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens 0: at least 1"),
        ("x", {"frequency_penalty": 3}, "frequency_penalty 3: from -2 to 2"),
        ("x", {"images": "white.png"}, "images must be a list of files, not 'white.png'"),
        ("x", {"images": [5]}, "images[0] must be a path or the bytes of a file, not 5"),
        ("x", {"images": ["none.png"]}, "none.png, images: no such image file"),
        ("x", {"images": [b"no picture"]}, "images[0], images: not an image"),
        (" ", {}, "nothing to answer"),
        (["x", "y"], {"images": [["a.png"]]}, "images: 2 prompts need 2 lists of files"),
        ([5], {}, "a prompt must be a str, not 5"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(model, prompt, keywords, message):
    with pytest.raises(ValueError, match=r".") as error:
        model.generate(prompt, **keywords)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_whatever_reading_raises_is_the_users_error(model, media, monkeypatch):
    encoder = type(model.config.modalities["images"].encoder)

    def broken(self, source):
        raise RuntimeError("a decoder that fails")

    monkeypatch.setattr(encoder, "read", broken)
    with pytest.raises(ValueError, match=r"sample prompt.*a decoder that fails"):
        model.generate("x", images=[media / "white.png"])


def test_a_conversation_goes_on_after_an_empty_answer(model, media):
    turns = [
        {"role": "user", "content": "<image>Name it."},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": QUESTION},
    ]
    sample = model.encode({"conversations": turns, "images": [media / "white.png"]})
    assert len(sample.media["images"]) == 1


def test_files_without_a_placeholder_come_before_the_last_prompt(model, media):
    picture = media / "white.png"
    turns = [
        {"from": "human", "value": "<image>Name it."},
        {"from": "gpt", "value": "white"},
        {"from": "human", "value": "And this?"},
    ]
    record = {"conversations": turns, "images": [picture, picture]}
    named = [*turns[:2], {"from": "human", "value": "<image>And this?"}]
    expected = model.encode({**record, "conversations": named}).tokens
    assert model.encode(record).tokens == expected


def test_words_that_spell_a_placeholder_are_answered(model, media, command):
    words = "What does <image> mean?"
    parts = [{"type": "image"}, {"type": "text", "text": words}]
    alone, seen = model.generate([parts[1:], parts], images=[[], [media / "white.png"]])
    assert model.generate(words) == command("--prompt", words) == alone
    assert model.generate(parts, images=[media / "white.png"]) == seen
    record = {"conversations": [{"role": "user", "content": parts}]}
    sample = model.encode({**record, "images": [media / "white.png"]})
    assert model.tokenizer.decode(sample.tokens.ids).endswith(f">{words}\n")
    # Where there are files, placeholders of a plain text are their places.
    with pytest.raises(ValueError, match="1 <audio> in the text, but 0 audio files"):
        model.generate("<image>What is <audio>?", images=[media / "white.png"])
    # Files alone are asked about too, such as a spoken question.
    files = {"images": [media / "white.png"], "audios": [media / "second.wav"]}
    alone = [model.generate(text, **files) for text in ("", " ", "<image><audio>")]
    assert alone[0] == alone[1] == alone[2] != ""


def test_a_system_turn_is_the_templates(model):
    turns = [{"role": "system", "content": "Be <image> brief."}, {"role": "user", "content": "it"}]
    ids = model.encode({"conversations": turns}).tokens.ids
    assert model.tokenizer.decode(ids) == "Be <image> brief.\nit\n"
