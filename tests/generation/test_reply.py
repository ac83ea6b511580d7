"""Log-probabilities of a reply: their bytes are the answer's, in whole and in streamed replies."""

import pytest
import sentencepiece
import torch

from examples.mimo.configs.tiny_avlm import tiny_avlm
from examples.mimo.data.conversation import Sample, TokenSequence
from examples.mimo.data.tokenizer import load_tokenizer
from examples.mimo.generation.engine import LENGTH, STOP, TokenOutput
from examples.mimo.generation.sampling import Grammar, Options
from examples.mimo.generation.scheduler import Scheduler
from tests.helpers import tokenizers

pytest.importorskip("starlette")
from examples.mimo.serving.openai import Chat, Reply

TEXTS = (
    "plain words",
    "漢字 and 😀, naïve 👩‍👩‍👧 end",
    " a space first",
    "two\n\nlines,  two spaces",
    "😀",
)
LEARNED = ["plain words and more words of two lines", "a space first, two spaces at the end"] * 20


class Scripted:
    """An engine whose answer is known; the last token ends it."""

    def __init__(self, tokens, eos_id):
        self.tokens, self.eos_id, self.sequences = tokens, eos_id, []
        self.count = self.stopped = 0
        self.grammar = Grammar(tiny_avlm(), (), (eos_id,), torch.device("cpu"))

    def start(self, requests):
        return self.step()

    def step(self):
        token = self.tokens[self.count]
        self.count += 1
        ends = STOP if token == self.eos_id else None
        finish = LENGTH if not ends and self.count == len(self.tokens) else ends
        others = [(other, -2.0) for other in self.tokens[:2]]
        return [TokenOutput(0, token, finish, -float(self.count), None, others)]

    def stop(self, number):
        self.stopped += 1


def chunks_and_reply(tokenizer, tokens, stops=()):
    """The chunks of the streamed reply, and the whole one."""
    options = Options(len(tokens), stops=tuple(stops), logprobs=True, top_logprobs=2)
    scheduler = Scheduler(Scripted(tokens, tokenizer.eos_id), tokenizer, 10_000)
    sample = Sample("s", TokenSequence([5], [5], [0]), {}, {})
    reply = Reply(Chat({}, options, 1, True, False, "m"), tokenizer, 1)
    pieces = scheduler.start([(0, sample, options)])
    while not pieces[-1].answer:
        pieces += scheduler.step()
    chunks = [chunk for piece in pieces for chunk in reply.add(0, piece)]
    return chunks, reply.completion([pieces[-1].answer], {})["choices"][0]


def dummy_prefix(folder):
    """As of Llama 2: a space before every text, which decoding takes away again."""
    sentencepiece.SentencePieceTrainer.train(
        **{"sentence_iterator": iter(LEARNED), "model_prefix": str(folder / "tokenizer")},
        **{"model_type": "bpe", "vocab_size": 330, "hard_vocab_limit": False, "pad_id": 3},
        **{"byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2},
        remove_extra_whitespaces=False,
    )
    return folder


KINDS = {
    "dummy prefix": dummy_prefix,
    "bytes": lambda folder: tokenizers.byte_level(folder, tokenizers.QWEN3),
    "first": lambda folder: tokenizers.metaspace(folder, tokenizers.VICUNA, "first"),
    "always": lambda folder: tokenizers.metaspace(folder, tokenizers.VICUNA, "always"),
}


@pytest.fixture(scope="module", params=["as it is", *KINDS])
def spelled(request, tmp_path_factory, tokenizer):
    """Tokenizers that spell bytes and the space at the start of a text in each common way."""
    if request.param == "as it is":
        return tokenizer
    return load_tokenizer(KINDS[request.param](tmp_path_factory.mktemp("tokenizer")))


def joined(entries):
    return b"".join(bytes(entry["bytes"]) for entry in entries)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ends", [True, False])
def test_bytes_are_the_answers(spelled, text, ends):
    tokens = [*spelled.encode(text), *[spelled.eos_id] * ends]
    chunks, choice = chunks_and_reply(spelled, tokens)
    content = choice["logprobs"]["content"]
    # Some tokenizers lose a space at the start of a text.
    assert choice["message"]["content"].strip() == text.strip()
    assert joined(content) == choice["message"]["content"].encode()
    assert [entry["logprob"] for entry in content] == [
        -float(n) for n in range(1, 1 + len(tokens) - ends)
    ]
    streamed = []
    for chunk in chunks:
        (part,) = chunk["choices"]
        if part["logprobs"]:
            streamed += part["logprobs"]["content"]
            # Each comes with its text.
            assert joined(part["logprobs"]["content"]).decode() == part["delta"]["content"]
    assert streamed == content
    assert sum(chunk["choices"][0]["logprobs"] is not None for chunk in chunks) > 1 or text == "😀"


def test_a_token_that_stands_first_is_spelled_alike_where_it_is_only_likely(spelled):
    _, choice = chunks_and_reply(spelled, spelled.encode("plain words"))
    first, second = choice["logprobs"]["content"][:2]
    assert first["top_logprobs"][0]["bytes"] == first["bytes"]
    assert second["top_logprobs"][1] == {
        "token": second["token"],
        "bytes": second["bytes"],
        "logprob": -2.0,
    }


@pytest.mark.parametrize("stop", ["word", "ds a", "rds", "漢", "e", "字 a"])
def test_what_a_stop_string_cuts_off_has_no_logprobs(spelled, stop):
    text = "plain words and 漢字 a end"
    chunks, choice = chunks_and_reply(spelled, spelled.encode(text), [stop])
    assert choice["finish_reason"] == STOP
    answer = text[: text.index(stop)]
    assert choice["message"]["content"] == answer
    assert joined(choice["logprobs"]["content"]) == answer.encode()
    streamed = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == choice["logprobs"]["content"]


def test_bytes_that_are_no_character_are_kept(spelled):
    """The answer shows U+FFFD in their place; the log-probabilities show what the model said."""
    tokens = spelled.encode("a🧊b")
    data = [spelled.token_bytes(token) for token in tokens]
    broken = [token for token, of in zip(tokens, data, strict=True) if of != b"\x8a"]
    assert len(broken) < len(tokens)
    chunks, choice = chunks_and_reply(spelled, broken)
    assert "\ufffd" in choice["message"]["content"]
    content = choice["logprobs"]["content"]
    assert len(content) == len(broken)
    assert joined(content).strip() == b"a\xf0\x9f\xa7b"
    streamed = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content
