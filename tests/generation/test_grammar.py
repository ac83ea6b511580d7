"""What a model puts out beside text: alike at every layout, in whole units, always decodable."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.configs.schema import ModalityConfig
from examples.mimo.generation.api import Mimo
from examples.mimo.generation.engine import Engine
from examples.mimo.generation.sampling import Grammar, Options, Sampling
from examples.mimo.generation.scheduler import Scheduler
from tests.helpers import known_answers, ranks
from tests.helpers.commands import QUESTION
from tests.helpers.outputs import LevelCodec

SAMPLES = 8
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
FORBIDDEN = {4, 5}


@pytest.fixture(scope="module")
def answers(aloud, data_folder):
    result = {}
    for tp, pp in LAYOUTS:
        flags = (str(aloud), str(data_folder), str(tp), str(pp), str(SAMPLES))
        done = ranks.run("tests/generation/answer_many.py", *flags, processes=tp * pp)
        assert done.returncode == 0, done.stderr
        result[tp, pp] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_codes_are_the_same_alone_batched_streamed_and_at_every_layout(answers, tp, pp):
    result = answers[tp, pp]
    for name in ("tokens", "drawn", "penalised", "outputs", "text alone", "one rank chooses"):
        expected = answers[1, 1]["tokens" if name == "one rank chooses" else name]
        assert result[name] == expected, name
    assert result["alone"] == result["seven"] == result["streamed"] == result["tokens"]
    assert result["drawn alone"] == result["drawn"] != result["tokens"]


def test_greedy_answers_are_known_sentences_and_known_codes(answers, aloud, tokenizer, sentences):
    config = open_checkpoint(aloud).config
    result, speech = answers[1, 1], config.outputs["speech"]
    assert max(result["errors"]) <= 1e-4
    said = set()
    for tokens, put_out, alone in zip(
        result["tokens"], result["outputs"], result["text alone"], strict=True
    ):
        text = [token for token in tokens if token not in speech.ids]
        assert tokenizer.decode(text) in sentences
        ((codes,),) = put_out.values()
        assert list(put_out) == ["speech"]
        assert codes in known_answers.spoken(config)
        assert tokens == text + speech.tokens(codes)
        # Where nothing else is wanted, the text ends as it would have.
        assert alone == text
        said.add(tuple(codes))
    assert len(said) > 1


@pytest.fixture(scope="module")
def model(aloud, build_model):
    return Mimo(open_checkpoint(aloud))


def prompt(model, text=QUESTION):
    turns = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return model.encode({"key": text, "conversations": turns})


def test_an_answer_that_a_limit_cuts_ends_at_its_last_whole_unit(model):
    (whole,) = model.answer([prompt(model)])
    ((codes,),) = whole.outputs.values()
    begin = whole.tokens.index(model.config.outputs["speech"].begin_id)
    for length in range(1, len(whole.tokens) + 1):
        options = Options(length)
        *_, last = pieces = list(model.stream_answer(prompt(model), options))
        cut = last.answer
        assert cut.tokens == whole.tokens[:length]
        num_codes = min(max(length - begin - 1, 0) // 2 * 2, len(codes))
        assert cut.outputs == ({"speech": [codes[:num_codes]]} if num_codes else {})
        new = [piece.codes for piece in pieces if piece.codes]
        assert [code for piece in new for code in piece.codes] == codes[:num_codes]
        assert [piece.is_last for piece in new] == [False] * (len(new) - 1) + [True] * bool(new)
        assert {(piece.modality, piece.number) for piece in new} <= {("speech", 0)}
        assert "".join(piece.text for piece in pieces) == cut.text
        assert whole.text.startswith(cut.text)
        assert cut.finish == "length"


def with_drawings(config):
    """Codes of units of three beside those of two."""

    @dataclasses.dataclass(frozen=True)
    class Triples(LevelCodec):
        unit = 3

        def allowed(self, position):
            return range(position % 3, 9, 3) if position < 6 else range(0)

    codec = Triples(base=5, folder=config.outputs["speech"].codec.folder)
    drawing = ModalityConfig(singular="drawing", placeholder="<drawing>", codec=codec)
    return dataclasses.replace(config, modalities={**config.modalities, "drawings": drawing})


def broken(tokens, config):
    """Why these tokens are not text with whole outputs in it, or None; `tokens` may be cut."""
    begins = {output.begin_id: output for output in config.outputs.values()}
    output, codes = None, []
    for token in tokens:
        if output is None:
            output, codes = begins.get(token), []
            if output is None and (token >= config.language.vocab_size or token in FORBIDDEN):
                return "code or marker in text"
        elif token == output.end_id:
            try:
                output.codec.check_codes(codes)
            except ValueError as error:
                return str(error)
            output = None
        else:
            codes.append(token - output.first_id)
            if codes[-1] not in output.codec.allowed(len(codes) - 1):
                return "no code that may stand here"
    return None


@pytest.fixture
def hot(model, build_model, monkeypatch):
    """A function from a config to an engine whose model begins an output every few tokens."""

    def engine(config):
        forbidden = {*FORBIDDEN, *range(model.tokenizer.size, config.language.vocab_size)}
        engine = Engine(build_model(config), config, model.tokenizer.end_ids, forbidden, 4)
        bonus = torch.zeros(config.vocab_size)
        for output in config.outputs.values():
            bonus[output.begin_id], bonus[output.end_id] = 7.0, 4.0
        bonus[list(model.tokenizer.end_ids)] = 6.0
        logits = engine.transformer.logits
        monkeypatch.setattr(engine.transformer, "logits", lambda hidden: logits(hidden) + bonus)
        return engine

    return engine


def sampled(engine, model, count, outputs=None, **sampling):
    """Tokens of `count` answers, and the answers; sequences join and leave all the time."""
    scheduler = Scheduler(engine, model.tokenizer, 256)
    sample = prompt(model)
    done, waiting = {}, iter(range(count))
    tokens = {number: [] for number in range(count)}
    while len(done) < count:
        new = list(itertools.islice(waiting, 50 - len(scheduler)))
        samplings = [Sampling(2.0, seed=n, **sampling) for n in new]
        requests = [
            (n, sample, Options(40, s, outputs=outputs))
            for n, s in zip(new, samplings, strict=True)
        ]
        for piece in [*scheduler.start(requests), *scheduler.step()]:
            assert piece.error is None
            if piece.output.finish != "stop":
                tokens[piece.number].append(piece.output.token)
            if piece.answer:
                done[piece.number] = piece.answer
    return [tokens[n] for n in range(count)], [done[n] for n in range(count)]


def test_a_thousand_hot_answers_can_all_be_decoded(hot, model, monkeypatch):
    engine = hot(model.config)
    tokens, answers = sampled(engine, model, 1_000)
    assert [broken(t, model.config) for t in tokens] == [None] * 1_000
    codec = model.config.outputs["speech"].codec
    decoded = [codec.decode(codes) for a in answers for o in a.outputs.values() for codes in o]
    assert len(decoded) > 1_000
    assert len({len(item) for item in decoded}) > 5
    # Some are cut by the limit, most end.
    assert {answer.finish for answer in answers} == {"stop", "length"}
    # Without the grammar hardly one is.
    monkeypatch.setattr(
        Grammar, "mask", lambda self, logits, _: logits.index_fill(1, self.forbidden, -torch.inf)
    )
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "")
    tokens, _ = sampled(hot(model.config), model, 100)
    assert sum(broken(t, model.config) is None for t in tokens) < 50


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 0.5},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0},
        {"top_k": 3},
        {"top_p": 0.3},
        {"min_p": 0.2},
    ],
)
def test_no_penalty_or_cut_breaks_an_output(hot, model, sampling):
    tokens, answers = sampled(hot(model.config), model, 60, **sampling)
    assert [broken(t, model.config) for t in tokens] == [None] * 60
    assert sum(len(a.outputs.get("speech", [])) for a in answers) > 10


def test_two_outputs_in_one_model(hot, model):
    config = with_drawings(model.config)
    for wanted in (None, ("drawings",), ("speech",), ()):
        tokens, answers = sampled(hot(config), model, 100, wanted)
        assert [broken(t, config) for t in tokens] == [None] * 100
        names = {name for answer in answers for name in answer.outputs}
        assert names == set(config.outputs if wanted is None else wanted)
        for answer in answers:
            for codes in answer.outputs.get("drawings", []):
                # Behind two units nothing may follow but the end.
                assert len(codes) in (3, 6)
                config.outputs["drawings"].codec.check_codes(codes)


def state_of(config, names, tokens=()):
    state = Grammar(config, (), (3,), torch.device("cpu")).start(names)
    for token in tokens:
        state.add(token)
    return state


def test_the_mask_is_what_may_come_next(model):
    config = with_drawings(model.config)
    grammar = Grammar(config, FORBIDDEN, (3, 2), torch.device("cpu"))
    speech, drawings = config.outputs.values()
    text = {*range(512)} - FORBIDDEN
    begun = [drawings.begin_id, *(drawings.first_id + code for code in (0, 1, 2))]
    cases = [
        ((None, []), text | {speech.begin_id, drawings.begin_id}),
        ((("speech",), [7, 8]), text | {speech.begin_id}),
        (((), []), text),
        ((None, [7, speech.begin_id]), {*range(514, 522)}),
        ((None, [speech.begin_id, 514]), {*range(522, 530)}),
        ((None, [speech.begin_id, 514, 522]), {*range(514, 522), speech.end_id}),
        ((None, [speech.begin_id, 514, 522, speech.end_id]), text | {512, drawings.begin_id}),
        ((None, begun[:1]), {drawings.first_id + code for code in (0, 3, 6)}),
        ((None, begun), {drawings.first_id + c for c in (0, 3, 6)} | {drawings.end_id}),
        ((None, begun + begun[1:]), {drawings.end_id}),
    ]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(cases), config.vocab_size, generator=generator)
    before = logits.clone()
    masked = grammar.mask(logits, [state_of(config, *case) for case, _ in cases])
    assert torch.equal(logits, before)
    for number, ((names, _), allowed) in enumerate(cases):
        assert {*masked[number].isfinite().nonzero()[:, 0].tolist()} == allowed, number
        wanted = config.outputs if names is None else names
        others = [o.begin_id for n, o in config.outputs.items() if n not in wanted]
        kept = [token for token in allowed if token != 2 or not others]
        assert torch.equal(masked[number, kept], logits[number, kept])
        if others:  # the probability of beginning one is the end's
            ends = logits[number, [2, *others]].logsumexp(dim=0)
            assert float(masked[number, 2]) == pytest.approx(float(ends), abs=1e-6)


def test_a_model_of_text_alone_is_masked_as_ever(tiny):
    grammar = Grammar(tiny, FORBIDDEN, (3,), torch.device("cpu"))
    logits = torch.randn(3, tiny.vocab_size)
    states = [grammar.start(names) for names in (None, (), ())]
    expected = logits.index_fill(1, torch.tensor([4, 5]), float("-inf"))
    assert torch.equal(grammar.mask(logits, states), expected)


def test_answers_of_several_wishes_share_a_batch(model):
    sample = prompt(model)
    wishes = [None, (), ("speech",)]
    alone = [model.answer([sample], Options(24, outputs=w))[0] for w in wishes]
    scheduler = model.scheduler()
    pieces = scheduler.start([(n, sample, Options(24, outputs=w)) for n, w in enumerate(wishes)])
    answers = {}
    while pieces:
        answers |= {piece.number: piece.answer for piece in pieces if piece.answer}
        pieces = scheduler.step()
    assert [answers[n] for n in range(3)] == alone
    assert alone[0] == alone[2] != alone[1]


def test_in_python(model):
    (answer,) = model.answer([prompt(model)])
    question = [{"type": "text", "text": QUESTION}]
    codec = model.config.outputs["speech"].codec
    expected = codec.decode(answer.outputs["speech"][0])
    assert model.generate(question) == "".join(model.stream(question)) == answer.text
    result = model.generate(question, outputs=["speech"])
    assert result.text == answer.text
    assert result.outputs == {"speech": result.speech}
    np.testing.assert_array_equal(result.speech, [expected])
    with pytest.raises(AttributeError, match="no output 'drawings': speech"):
        _ = result.drawings
    short, again = model.generate([question, question], outputs=["speech"], max_new_tokens=13)
    assert (short.text, short.speech) == (again.text, again.speech) == (answer.text, [])
    assert model.generate(question, outputs=[]).outputs == {}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["sound"],
            "outputs: 'sound', but tests.helpers.outputs:with_speech puts out text, speech",
        ),
        ("speech", "outputs must be a list of modalities, not 'speech'"),
        ([3], "outputs: 3, but "),
    ],
)
def test_an_output_that_the_model_lacks_is_refused(model, wanted, message):
    with pytest.raises(ValueError, match=message):
        model.generate(QUESTION, outputs=wanted)
    with pytest.raises(ValueError, match=message):
        model.answer([prompt(model)], SimpleNamespace(outputs=wanted))


def test_an_earlier_answer_is_its_codes_and_is_reused(model, monkeypatch):
    """Decoding and encoding again would give other codes, which the prefix cache does not hold."""
    from examples.mimo.generation.scheduler import AnswerParts

    # Shorter prefixes are computed anew; the text in front of the codes must be encoded as it was.
    for number in range(30):
        question, parts = f"{QUESTION} {QUESTION} {number}", AnswerParts(model.config)
        for piece in model.stream_answer(prompt(model, question)):
            parts.add(piece)
        text = model.tokenizer.encode(piece.answer.text)
        if piece.answer.tokens[: len(text)] == text:
            break
    else:
        pytest.fail("no answer's text has the tokens that it was made of")
    codes = piece.answer.outputs["speech"][0]
    assert parts.outputs == [("speech", codes)]
    assert [part["type"] for part in parts.parts] == ["text", "speech"]
    assert parts.parts[0]["text"] == piece.answer.text
    turns = [
        {"role": "user", "content": [{"type": "text", "text": question}]},
        {"role": "assistant", "content": parts.parts},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    sample = model.encode({"key": "k", "conversations": turns})
    said = model.config.outputs["speech"].tokens(codes)
    start = sample.tokens.ids.index(said[0])
    assert sample.tokens.ids[start : start + len(said)] == said
    lengths = []
    forward = model.engine.transformer.forward

    def counted(hidden, *more):
        lengths.append(hidden.shape[1])
        return forward(hidden, *more)

    monkeypatch.setattr(model.engine.transformer, "forward", counted)
    reused = model.answer([sample])
    # All is reused but what follows the answer, with the end-of-text token that was chosen last.
    assert lengths[0] == len(sample.tokens.ids) - start - len(said)
    monkeypatch.undo()
    fresh = Engine(model.model, model.config, model.tokenizer.end_ids, prefix_cache=0)
    monkeypatch.setattr(model, "engine", fresh)
    assert model.answer([sample]) == reused


def test_a_user_cannot_type_codes(model):
    """A place in a user's turn is refused, and in text its name is words."""
    ids = prompt(model, "Say <speech> now").tokens.ids
    assert max(ids) < model.config.language.vocab_size
    turns = [{"role": "user", "content": [{"type": "speech", "speech": "a.wav"}]}]
    with pytest.raises(ValueError, match="takes text, images, audios"):
        model.encode({"conversations": turns})
