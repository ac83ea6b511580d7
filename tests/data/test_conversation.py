import dataclasses
import random

import pytest

from examples.mimo.configs.schema import ChatTemplate
from examples.mimo.data.conversation import (
    MediaPiece,
    TextPiece,
    Turn,
    check_media,
    parse_turns,
    to_pieces,
    tokenise,
)


def tokens_of(turns, counts, tiny, tokenizer):
    return tokenise(to_pieces(turns, tiny), counts, tiny, tokenizer)


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
    turns = [Turn(False, "a <image> b <audio><image>"), Turn(True, "c")]
    tokens = tokens_of(turns, {"images": [3, 2], "audios": [4]}, tiny, tokenizer)
    image, audio = tiny.modalities["images"].token_id, tiny.modalities["audios"].token_id
    runs = [i for i in tokens.ids if i in (image, audio)]
    assert runs == [image] * 3 + [audio] * 4 + [image] * 2


def test_labels_are_the_next_ids(tiny, tokenizer):
    turns = [Turn(False, "<image>What?"), Turn(True, "seven")]
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
            turns += [Turn(False, "".join(parts)), Turn(True, answers[-1])]
        tokens = tokens_of(turns, counts, tiny, tokenizer)
        assert target_answers(tokens, tokenizer) == answers


def test_an_answer_that_the_question_holds_too_is_a_target_once(tiny, tokenizer):
    turns = [Turn(False, "seven or seven?"), Turn(True, "seven")]
    tokens = tokens_of(turns, {}, tiny, tokenizer)
    assert target_answers(tokens, tokenizer) == ["seven"]
    assert sum(tokens.loss_mask) == len(tokenizer.encode("seven")) + 1


def test_an_answer_is_tokenised_apart_from_its_question(tiny, tokenizer):
    config = dataclasses.replace(tiny, chat=ChatTemplate(human="{}"))
    question, answer = "seven th", "ree"
    alone = tokenizer.encode(answer)
    assert tokenizer.encode(question + answer)[-len(alone) :] != alone
    tokens = tokens_of([Turn(False, question), Turn(True, answer)], {}, config, tokenizer)
    assert target_answers(tokens, tokenizer) == [answer]
    assert tokens.ids[-len(alone) - 1 :] == [*alone, tokenizer.eos_id]


def test_a_placeholder_in_an_answer_is_text(tiny, tokenizer):
    pieces = to_pieces([Turn(False, "q"), Turn(True, "<image>")], tiny)
    assert not any(isinstance(piece, MediaPiece) for piece in pieces)
    tokens = tokenise(pieces, {}, tiny, tokenizer)
    assert tiny.modalities["images"].token_id not in tokens.ids


def test_from_value_and_role_content_are_the_same():
    shapes = ({"from": "human", "value": "q"}, {"role": "user", "content": "q"})
    assert parse_turns([shapes[0]]) == parse_turns([shapes[1]]) == [Turn(False, "q")]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([], "must be a list of turns"),
        ("text", "a turn must be an object"),
        ([{"from": "dog", "value": "woof"}], "from 'dog'"),
        ([{"from": "human", "value": " "}], "has no text"),
        ([{"from": "human"}], "has no text"),
    ],
)
def test_parse_turns_refuses(conversations, message):
    with pytest.raises(ValueError, match=message):
        parse_turns(conversations)


@pytest.mark.parametrize(("text", "files"), [("<image><image>", 1), ("none", 1), ("<image>", 0)])
def test_placeholders_and_files_must_agree(tiny, text, files):
    pieces = to_pieces([Turn(False, text)], tiny)
    with pytest.raises(ValueError, match=rf"{text.count('<image>')} <image>.*{files}"):
        check_media(pieces, {"images": ["f"] * files}, tiny)


def test_a_turn_that_is_parsed_already_is_taken_as_it_is():
    turns = [Turn(False, "q"), Turn(True, ""), {"role": "user", "content": "r"}]
    assert parse_turns(turns) == [*turns[:2], Turn(False, "r")]


def test_text_around_the_turns_is_that_of_the_template(tiny):
    from examples.mimo.configs import get_model_config

    pieces = to_pieces([Turn(False, "hi"), Turn(True, "yo")], get_model_config("llava_vlm"))
    assert pieces[1:] == [TextPiece("USER: hi ASSISTANT:", False), TextPiece(" yo", True)]
