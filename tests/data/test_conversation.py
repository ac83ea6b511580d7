import dataclasses
import random
from pathlib import Path

import pytest

from examples.mimo.configs.schema import ChatTemplate
from examples.mimo.data.conversation import (
    MediaPiece,
    SampleEncoder,
    TextPiece,
    to_pieces,
    tokenise,
)
from examples.mimo.data.turns import (
    TextEncoder,
    files_of_parts,
    find_media,
    parse_turns,
)
from examples.mimo.shards.write import without_files


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def placeholders(counts, config):
    """The tokens of items that take so many placeholders."""
    return {
        (name, False): [[config.modalities[name].token_id] * number for number in numbers]
        for name, numbers in counts.items()
    }


def tokens_of(turns, counts, config, tokenizer):
    pieces = to_pieces(parse_turns(turns, config), config)
    items = placeholders(counts, config)
    return tokenise(pieces, items, config, TextEncoder(tokenizer, config))


def target_answers(tokens, tokenizer):
    """The texts that carry loss, split at the end tokens, which must carry it too."""
    targets = [label for label, mask in zip(tokens.labels, tokens.loss_mask, strict=True) if mask]
    assert not targets or targets[-1] == tokenizer.eos_id
    texts, current = [], []
    for label in targets:
        if label == tokenizer.eos_id:
            texts.append(tokenizer.decode(current))
            current = []
        else:
            current.append(label)
    return texts


def test_placeholders_become_runs_of_their_items_length(tiny, tokenizer):
    turns = [human("a <image> b <audio><image>"), gpt("c")]
    tokens = tokens_of(turns, {"images": [3, 2], "audios": [4]}, tiny, tokenizer)
    image, audio = tiny.modalities["images"].token_id, tiny.modalities["audios"].token_id
    runs = [i for i in tokens.ids if i in (image, audio)]
    assert runs == [image] * 3 + [audio] * 4 + [image] * 2


def test_labels_are_the_next_ids(tiny, tokenizer):
    turns = [human("<image>What?"), gpt("seven")]
    tokens = tokens_of(turns, {"images": [2]}, tiny, tokenizer)
    assert tokens.labels[:-1] == tokens.ids[1:]
    assert tokens.loss_mask[-1] == 0


def test_targets_of_random_conversations_are_their_answers(tiny, tokenizer):
    draw = random.Random(0)
    words = ["seven", "seven three", "is it", "ñ", "x  y", "Answer the question."]
    for _ in range(200):
        turns, answers, counts = [], [], {"images": [], "audios": []}
        for _ in range(draw.randint(1, 5)):
            parts = [draw.choice(words)]
            for placeholder, name in (("<image>", "images"), ("<audio>", "audios")):
                for _ in range(draw.randint(0, 2)):
                    parts.insert(draw.randint(0, len(parts)), placeholder)
                    counts[name].append(draw.randint(1, 5))
            answers.append(draw.choice(words))
            turns += [human("".join(parts)), gpt(answers[-1])]
        tokens = tokens_of(turns, counts, tiny, tokenizer)
        assert target_answers(tokens, tokenizer) == answers


def test_an_answer_that_the_question_holds_too_is_a_target_once(tiny, tokenizer):
    turns = [human("seven or seven?"), gpt("seven")]
    tokens = tokens_of(turns, {}, tiny, tokenizer)
    assert target_answers(tokens, tokenizer) == ["seven"]
    assert sum(tokens.loss_mask) == len(tokenizer.encode("seven")) + 1


def test_an_answer_is_tokenised_apart_from_its_question(tiny, tokenizer):
    config = dataclasses.replace(tiny, chat=ChatTemplate(human="{}"))
    question, answer = "seven th", "ree"
    alone = tokenizer.encode(answer)
    assert tokenizer.encode(question + answer)[-len(alone) :] != alone
    tokens = tokens_of([human(question), gpt(answer)], {}, config, tokenizer)
    assert target_answers(tokens, tokenizer) == [answer]
    assert tokens.ids[-len(alone) - 1 :] == [*alone, tokenizer.eos_id]


def test_a_placeholder_in_an_answer_is_text(tiny, tokenizer):
    turns = parse_turns([human("q"), gpt("see <image>")], tiny)
    assert not any(isinstance(piece, MediaPiece) for piece in to_pieces(turns, tiny))
    tokens = tokens_of([human("q"), gpt("see <image>")], {}, tiny, tokenizer)
    assert tiny.modalities["images"].token_id not in tokens.ids
    # Nothing of it is lost.
    assert target_answers(tokens, tokenizer) == ["see <image>"]


def test_shapes_of_a_turn_are_the_same(tiny):
    text = [{"type": "text", "text": "q"}]
    shapes = [
        *({"from": "human", "value": "q"}, {"role": "user", "content": "q"}),
        *({"from": "human", "value": text}, {"role": "user", "content": text}),
    ]
    first, *others = (parse_turns([shape], tiny) for shape in shapes)
    assert [turn.parts for turn in first] == [("q",)]
    assert all(other == first for other in others)


def test_messages_is_another_name_of_conversations(tiny, tokenizer):
    encoder = SampleEncoder(tiny, tokenizer, 128)
    turns = [human("seven?"), gpt("seven")]
    samples = [encoder.encode({name: turns}, str) for name in ("conversations", "messages")]
    assert samples[0].tokens == samples[1].tokens


def test_null_is_an_absent_field(tiny, tokenizer):
    """Tables that were joined have every column in every line."""
    encoder = SampleEncoder(tiny, tokenizer, 128)
    question = {"role": "user", "content": "seven?", "from": None, "value": None}
    answer = {"from": "gpt", "value": "seven", "role": None, "content": None}
    part = {"type": "text", "text": "seven?", "image": None, "url": None}
    plain = encoder.encode({"conversations": [human("seven?"), gpt("seven")]}, str).tokens
    for first in (question, question | {"content": [part]}):
        record = {"conversations": None, "messages": [first, answer], "images": None}
        assert encoder.encode(record, str).tokens == plain
    turn = {"role": "user", "content": [{"type": "image", "path": "a.png"}], "value": None}
    assert files_of_parts([turn]) == ["a.png"]
    assert without_files([turn]) == [turn | {"content": [{"type": "image"}]}]


@pytest.mark.parametrize("name", ["https://a.org/b.png", "data:image/png;base64,AA", "S3://a/b"])
def test_addresses_are_refused_in_one_short_line(tiny, name):
    long = name + "A" * 10_000
    part = {"type": "image_url", "image_url": {"url": long}}
    for turn, record in ((human([part]), {}), (human("<image>"), {"images": [long]})):
        with pytest.raises(ValueError, match="an address, and nothing is fetched") as error:
            find_media(parse_turns([turn], tiny), record, tiny, Path)
        assert name in str(error.value)
        assert len(str(error.value)) < 200


def test_parts_and_placeholders_give_the_same_tokens(tiny, tokenizer):
    counts = {"images": [3, 2], "audios": [4]}
    parts = [
        *({"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b "}),
        *({"type": "audio"}, {"type": "image"}),
    ]
    in_parts = tokens_of([human(parts), gpt("c")], counts, tiny, tokenizer)
    in_text = tokens_of([human("a <image> b <audio><image>"), gpt("c")], counts, tiny, tokenizer)
    assert in_parts == in_text


def test_nothing_of_a_part_is_left_out(tiny):
    text, place = {"type": "text", "text": "a cat"}, {"type": "image", "image": "a.png"}
    for part, other in ((text | {"image": "a.png"}, "a.png"), (place | {"text": "cat"}, "cat")):
        with pytest.raises(ValueError, match=f"{part['type']} holds '{other}' too; give it its"):
            parse_turns([human([part])], tiny)
    # Null says that a field is absent, wherever a table has it, and the other name counts.
    nulls = {"text": None, "image": None, "audio_url": None, "detail": "high"}
    turn = {"from": None, "value": None, "role": "user", "content": [nulls | text, nulls | place]}
    assert parse_turns([turn], tiny) == parse_turns([human([text, place])], tiny)
    assert files_of_parts([turn]) == ["a.png"]


def test_in_parts_a_placeholder_is_a_word(tiny, tokenizer):
    words = "What does <image> mean in <audio>?"
    tokens = tokens_of([human([{"type": "text", "text": words}])], {}, tiny, tokenizer)
    assert not {m.token_id for m in tiny.inputs.values()} & {*tokens.ids}
    assert tokenizer.decode(tokens.ids) == f"{words}\n"


def test_places_may_name_their_files_and_the_others_take_the_records(tiny):
    turns = [
        human(
            [{"type": "image", "image": "a.png"}, {"type": "image"}, {"type": "text", "text": "?"}]
        ),
        gpt("no"),
        human(
            [{"type": "image_url", "image_url": {"url": "c.png"}}, {"type": "audio", "path": "d"}]
        ),
        gpt("yes"),
        human("<image>and?"),
    ]
    record = {"images": ["b.png", "e.png"]}
    media = find_media(parse_turns(turns, tiny), record, tiny, Path)
    assert media == {
        "images": [Path(name) for name in ("a.png", "b.png", "c.png", "e.png")],
        "audios": [Path("d")],
    }


def test_a_system_turn_stands_in_the_place_of_the_templates_own(tiny):
    chat = ChatTemplate(system="S", system_turn="[{}]", human="<{}>", start="A:", past_start="P:")
    config = dataclasses.replace(tiny, chat=chat)

    def text(*turns):
        pieces = to_pieces(parse_turns(turns, config), config)
        return "".join(p.text if isinstance(p, TextPiece) else "$" for p in pieces)

    system = {"role": "system", "content": "be brief"}
    assert text(human("q")) == "S<q>A:"
    assert text(system, human("q")) == "[be brief]<q>A:"
    assert text(system | {"content": ""}, human("q"), gpt("a")) == "[]<q>A:a$"
    assert text(human("q"), gpt("a"), system | {"role": "developer"}, human("r")) == (
        "S<q>P:a$[be brief]<r>A:"
    )
    assert text(human("q"), gpt("a"), human("r"), gpt("b")) == "S<q>P:a$<r>A:b$"


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([], "must be a list of turns"),
        ("text", "a turn must be an object"),
        ([{"from": "dog", "value": "woof"}], "from 'dog'"),
        ([{"from": ["gpt"], "value": "woof"}], r"from \['gpt'\]"),
        ([{"from": "human", "value": " "}], "has no text"),
        ([{"from": "human"}], "has no text"),
        ([{"from": "human", "value": []}], "has no text"),
        ([{"role": "assistant", "content": None}], "from assistant has no text"),
        ([{"from": "human", "value": 7}], "has no text, but 7; write a string or a list of parts"),
        ([{"from": "human", "value": ["q"]}], "a part must be an object with a type, not 'q'"),
        ([{"from": "human", "value": [{"type": "text"}]}], "must have text, not None"),
        (
            [{"from": "human", "value": [{"type": "smell"}]}],
            "type 'smell'; tiny_avlm takes text, im",
        ),
        ([{"from": "human", "value": [{"type": {}}]}], "type {}; tiny_avlm takes text"),
        ([{"from": "human", "value": [{"type": "image", "path": 3}]}], "must name its file, not 3"),
        (
            [{"from": "gpt", "value": [{"type": "image"}]}],
            "an answer holds <image>, but tiny_avlm says text",
        ),
    ],
)
def test_parse_turns_refuses(tiny, conversations, message):
    with pytest.raises(ValueError, match=message):
        parse_turns(conversations, tiny)


@pytest.mark.parametrize(("text", "files"), [("<image><image>", 1), ("none", 1), ("<image>", 0)])
def test_placeholders_and_files_must_agree(tiny, text, files):
    turns = parse_turns([human(text)], tiny)
    expected = (
        rf"{text.count('<image>')} <image>.*{files} image files.*a list of parts, where <image>"
    )
    with pytest.raises(ValueError, match=expected):
        find_media(turns, {"images": ["f"] * files}, tiny, Path)


def test_what_is_answered_may_have_empty_answers_and_files_without_a_place(tiny, tokenizer):
    encoder = SampleEncoder(tiny, tokenizer, 128, answered=True)
    turns = [human("q"), {"role": "assistant", "content": None}, human("r")]
    ids = encoder.encode({"conversations": turns}, Path).tokens.ids
    assert ids.count(tokenizer.eos_id) == 1
    with pytest.raises(ValueError, match="a turn from assistant has no text"):
        SampleEncoder(tiny, tokenizer, 128).encode({"conversations": turns}, Path)


def test_text_around_the_turns_is_that_of_the_template():
    from examples.mimo.configs import get_model_config

    config = get_model_config("llava_vlm")
    pieces = to_pieces(parse_turns([human("hi"), gpt("yo")], config), config)
    assert "".join(p.text for p in pieces[1:5]) == "USER: hi ASSISTANT:"
    assert [(p.text, p.has_loss) for p in pieces[5:7]] == [(" ", True), ("yo", True)]
