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


def row_of(turns, counts, tiny, tokenizer):
    return tokenise(to_pieces(turns, tiny), counts, tiny, tokenizer)


def learned_answers(row, tokenizer):
    """The texts that carry loss, split at the end tokens, which must carry it too."""
    learned = [label for label, mask in zip(row.labels, row.loss_mask, strict=True) if mask]
    assert not learned or learned[-1] == tokenizer.eos_id
    texts, current = [], []
    for label in learned:
        if label == tokenizer.eos_id:
            texts.append(tokenizer.decode(current))
            current = []
        else:
            current.append(label)
    return texts


def test_placeholders_become_runs_of_their_items_length(tiny, tokenizer):
    turns = [Turn(False, "a <image> b <audio><image>"), Turn(True, "c")]
    row = row_of(turns, {"images": [3, 2], "audios": [4]}, tiny, tokenizer)
    image, audio = tiny.modalities["images"].token_id, tiny.modalities["audios"].token_id
    runs = [i for i in row.ids if i in (image, audio)]
    assert runs == [image] * 3 + [audio] * 4 + [image] * 2


def test_labels_are_the_next_ids(tiny, tokenizer):
    turns = [Turn(False, "<image>What?"), Turn(True, "seven")]
    row = row_of(turns, {"images": [2]}, tiny, tokenizer)
    assert row.labels[:-1] == row.ids[1:]
    assert row.loss_mask[-1] == 0


def test_random_conversations_learn_exactly_their_answers(tiny, tokenizer):
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
        row = row_of(turns, counts, tiny, tokenizer)
        assert learned_answers(row, tokenizer) == answers


def test_an_answer_that_stands_in_the_question_is_learned_once(tiny, tokenizer):
    turns = [Turn(False, "seven or seven?"), Turn(True, "seven")]
    row = row_of(turns, {}, tiny, tokenizer)
    assert learned_answers(row, tokenizer) == ["seven"]
    assert sum(row.loss_mask) == len(tokenizer.encode("seven")) + 1


def test_an_answer_that_reads_otherwise_in_context_is_learned_as_it_stands_alone(tiny, tokenizer):
    config = dataclasses.replace(tiny, chat=ChatTemplate(human="{}"))
    question, answer = "seven th", "ree"
    alone = tokenizer.encode(answer)
    assert tokenizer.encode(question + answer)[-len(alone) :] != alone
    row = row_of([Turn(False, question), Turn(True, answer)], {}, config, tokenizer)
    assert learned_answers(row, tokenizer) == [answer]
    assert row.ids[-len(alone) - 1 :] == [*alone, tokenizer.eos_id]


def test_a_placeholder_in_an_answer_is_text(tiny, tokenizer):
    pieces = to_pieces([Turn(False, "q"), Turn(True, "<image>")], tiny)
    assert not any(isinstance(piece, MediaPiece) for piece in pieces)
    row = tokenise(pieces, {}, tiny, tokenizer)
    assert tiny.modalities["images"].token_id not in row.ids


def test_from_value_and_role_content_are_the_same():
    shapes = ({"from": "human", "value": "q"}, {"role": "user", "content": "q"})
    assert parse_turns([shapes[0]], "k") == parse_turns([shapes[1]], "k") == [Turn(False, "q")]


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
def test_turns_that_are_not(conversations, message):
    with pytest.raises(ValueError, match=f"sample k.*{message}"):
        parse_turns(conversations, "k")


@pytest.mark.parametrize(("text", "files"), [("<image><image>", 1), ("none", 1), ("<image>", 0)])
def test_placeholders_and_files_must_agree(tiny, text, files):
    pieces = to_pieces([Turn(False, text)], tiny)
    with pytest.raises(ValueError, match=rf"sample k: {text.count('<image>')} <image>.*{files}"):
        check_media(pieces, {"images": ["f"] * files}, tiny, "k")


def test_text_around_the_turns_is_the_templates(tiny):
    from examples.mimo.configs import get_model_config

    pieces = to_pieces([Turn(False, "hi"), Turn(True, "yo")], get_model_config("llava_vlm"))
    assert pieces[1:] == [TextPiece("USER: hi ASSISTANT:", False), TextPiece(" yo", True)]
