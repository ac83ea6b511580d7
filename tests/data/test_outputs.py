"""Answers that hold more than text: tokens, labels, mock samples, packing, and what is refused."""

import dataclasses
import shutil
from itertools import groupby

import pytest

from examples.mimo.configs import copy_codecs, get_model_config, with_codec_folder
from examples.mimo.configs.schema import ModalityConfig
from examples.mimo.data.batch import collate, collate_packed
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.data.turns import FilesInside, without_last_answer
from examples.mimo.training.inputs import MockDataset
from tests.helpers import outputs
from tests.helpers.outputs import LevelCodec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aloud")
    outputs.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return with_codec_folder(get_model_config(outputs.SPEECH), folder)


@pytest.fixture
def encode(config, tokenizer, folder):
    """A function from a record to its sample."""
    encoder = SampleEncoder(config, tokenizer, 256)
    return lambda record: encoder.encode(record, FilesInside(folder))


def turn(side, content):
    return {"role": side, "content": content}


def conversation(*answers, **files):
    """Questions with these answers; `files` are those of the record."""
    turns = [t for a in answers for t in (turn("user", "What?"), turn("assistant", a))]
    return {"key": "k", "conversations": turns, **files}


def targets(sample):
    """The runs of tokens that carry loss."""
    tokens = sample.tokens
    pairs = zip(tokens.labels, tokens.loss_mask, strict=True)
    return [[t for t, _ in run] for mask, run in groupby(pairs, lambda p: p[1]) if mask]


def test_ids_lie_behind_the_text(config):
    speech = config.outputs["speech"]
    assert (speech.begin_id, speech.end_id, speech.first_id) == (512, 513, 514)
    assert speech.ids == range(512, 514 + 16)
    # Tensor-parallel sizes divide the table.
    assert config.vocab_size == config.built_language.vocab_size == 640
    assert config.language.vocab_size == 512
    assert list(config.inputs) == ["images", "audios"]
    assert dataclasses.replace(config, modalities={}).vocab_size == 512


def test_outputs_follow_one_another(config):
    drawn = ModalityConfig(singular="drawing", placeholder="<drawing>", codec=LevelCodec(base=60))
    both = dataclasses.replace(config, modalities={**config.modalities, "drawings": drawn})
    assert both.outputs["speech"] == config.outputs["speech"]
    assert both.outputs["drawings"].ids == range(530, 530 + 2 + 120)
    assert both.vocab_size == 768


def test_an_answer_becomes_markers_and_codes_that_are_targets(encode, config, tokenizer, folder):
    speech = config.outputs["speech"]
    sample = encode(outputs.record(3))
    codes = speech.codec.encode(speech.read(folder / "3.wav"))
    assert len(codes) == 2 * 4
    said = [speech.begin_id, *(514 + code for code in codes), speech.end_id]
    assert targets(sample) == [[*tokenizer.encode("It is 3. "), *said, tokenizer.eos_id]]
    assert sample.tokens.ids[1:] == sample.tokens.labels[:-1]
    assert sample.outputs == {"speech": [str(folder / "3.wav")]}
    assert (sample.media, sample.sources) == ({}, {})


@pytest.mark.parametrize(
    ("answer", "files"),
    [
        ("a<speech>b <speech>", {"speech": ["1.wav", "2.wav"]}),
        ([{"type": "text", "text": "a"}, {"type": "speech", "speech": "1.wav"}], {}),
    ],
    ids=["a string", "parts"],
)
def test_places_stand_anywhere_in_an_answer(encode, config, folder, answer, files):
    (said,) = targets(encode(conversation(answer, **files)))
    names = files.get("speech", ["1.wav"])
    expected = [config.outputs["speech"].tokens_of(folder / name) for name in names]
    assert [token for token in said if token >= 512] == [t for tokens in expected for t in tokens]


def test_answers_of_earlier_turns_are_encoded_alike(encode):
    first, both = (
        encode(conversation(*answers, speech=["4.wav", "2.wav"][: len(answers)]))
        for answers in (["It is 4. <speech>"], ["It is 4. <speech>", "<speech>"])
    )
    assert targets(both)[0] == targets(first)[0]
    assert both.tokens.ids[: len(first.tokens.ids)] == first.tokens.ids


def test_what_people_spell_is_no_output(encode):
    words = [{"type": "text", "text": "say <speech> aloud"}]
    assert max(encode({"conversations": [turn("user", words)]}).tokens.ids) < 512
    assert max(encode(conversation(words)).tokens.ids) < 512


def test_answers_of_a_model_without_outputs_are_text(tiny, tokenizer):
    encoder = SampleEncoder(tiny, tokenizer, 256)
    ((*said, end),) = targets(encoder.encode(conversation("<speech> and <image>"), None))
    assert (tokenizer.decode(said), end) == ("<speech> and <image>", tokenizer.eos_id)


def test_a_modality_may_go_in_and_out(folder, tokenizer, tmp_path):
    shutil.copytree(folder / "codecs/speech", tmp_path / "codecs/audios")
    spoken = with_codec_folder(outputs.with_spoken_audios(), tmp_path)
    record = {
        "audios": ["1.wav", "3.wav"],
        "conversations": [turn("user", "<audio>?"), turn("assistant", "<audio>")],
    }
    sample = SampleEncoder(spoken, tokenizer, 256).encode(record, FilesInside(folder))
    placeholder = spoken.inputs["audios"].token_id
    # 40 ms of sound are one frame of the encoder, which is a token.
    assert sample.tokens.ids.count(placeholder) == 1
    said = spoken.outputs["audios"].tokens_of(folder / "3.wav")
    assert targets(sample) == [[*said, tokenizer.eos_id]]
    assert sample.sources == {"audios": [str(folder / "1.wav")]}
    assert sample.outputs == {"audios": [str(folder / "3.wav")]}
    assert len(sample.media["audios"]) == 1


def test_blanked_and_augmented_outputs_are_the_same(config, tokenizer, folder):
    plain = SampleEncoder(config, tokenizer, 256)
    changed = dataclasses.replace(plain, augment=True, blank=["speech", "audios"])
    first, second = (e.encode(outputs.record(3), FilesInside(folder)) for e in (plain, changed))
    assert first.tokens == second.tokens


def test_a_question_keeps_the_files_of_its_own_turns(config):
    record = conversation("It is 4. <speech>", "<speech>", speech=["4.wav", "2.wav"])
    question, answer = without_last_answer(record, config)
    assert question["speech"] == ["4.wav"]
    assert len(question["conversations"]) == 3
    assert answer == ""
    assert record["speech"] == ["4.wav", "2.wav"]


def test_collated_and_packed_batches_hold_codes(encode):
    samples = [encode(outputs.record(number)) for number in range(4)]
    batch = collate(samples)
    for ids, sample in zip(batch.input_ids.tolist(), samples, strict=True):
        assert ids[: len(sample.tokens.ids)] == sample.tokens.ids
    packed = collate_packed(samples)
    assert packed.input_ids[0].tolist() == [t for s in samples for t in s.tokens.ids]


def test_mock_answers_hold_whole_outputs(config):
    speech, counts = config.outputs["speech"], set()
    for index in range(60):
        sample = MockDataset(config, 128, 60, seed=3)[index]
        ids, is_target = sample.tokens.ids, [0, *sample.tokens.loss_mask]
        assert len(ids) <= 128
        begins = [place for place, token in enumerate(ids) if token == speech.begin_id]
        ends = [ids.index(speech.end_id, begin) for begin in begins]
        counts.add(len(begins))
        assert len(begins) == len(sample.outputs.get("speech", ()))
        for begin, end in zip(begins, ends, strict=True):
            speech.codec.check_codes([token - speech.first_id for token in ids[begin + 1 : end]])
            assert all(is_target[begin : end + 1])
        lengths = [end - begin + 1 for begin, end in zip(begins, ends, strict=True)]
        assert sum(token in speech.ids for token in ids) == sum(lengths)
    assert counts == {0, 1, 2}


def test_mock_answers_keep_to_what_a_codec_allows(config):
    """A longest length, and codes that are no whole range."""
    speech = dataclasses.replace(config.modalities["speech"], codec=Short())
    short = dataclasses.replace(config, modalities={**config.modalities, "speech": speech})
    output, counts = short.outputs["speech"], set()
    for index in range(20):
        codes = [t - output.first_id for t in MockDataset(short, 128, 20, seed=3)[index].tokens.ids]
        codes = [code for code in codes if code >= 0]
        counts.add(len(codes))
        assert all(code % 2 == 0 for code in codes)
    assert counts == {0, 2, 4}


class OutOfRange(LevelCodec):
    """Numbers that are no codes."""

    def encode(self, raw):
        return [0, 16]


class Unfinished(LevelCodec):
    """Half a frame."""

    def encode(self, raw):
        return [0, 8, 1]


class Silent(LevelCodec):
    """No codes."""

    def encode(self, raw):
        return []


class Failing(LevelCodec):
    """An error of its own."""

    def encode(self, raw):
        raise IndexError("no such level\nin line 2")


class Boastful(LevelCodec):
    """A code more than there are, which would be another modality's token."""

    def allowed(self, position):
        return range(2 * self.base + 1)

    def encode(self, raw):
        return [0, 16]


class Short(LevelCodec):
    """One unit, and no more; even levels alone."""

    def allowed(self, position):
        codes = super().allowed(position)
        return range(codes.start, codes.stop, 2) if position < 2 else range(0)


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (OutOfRange, "code 16 at position 1, but 8 to 15 may stand there"),
        (Unfinished, "3 codes, but an output is whole units of 2"),
        (Silent, "0 codes, but an output is whole units of 2"),
        (Failing, "IndexError: no such level in line 2"),
        (Boastful, "code 16 at position 1, but 0 to 15 may stand there"),
        (Short, "8 codes, but 2 are all that fit an output"),
    ],
)
def test_what_is_no_output_is_refused(config, tokenizer, folder, codec, message):
    speech = dataclasses.replace(config.modalities["speech"], codec=codec())
    config = dataclasses.replace(config, modalities={**config.modalities, "speech": speech})
    encoder = SampleEncoder(with_codec_folder(config, folder), tokenizer, 256)
    with pytest.raises(ValueError, match=f"^sample k3, .*3.wav, speech: {message}$"):
        encoder.encode(outputs.record(3), FilesInside(folder))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (conversation("<speech>"), "1 <speech> in the text, but 0 speech files"),
        (conversation("a", speech=["1.wav"]), "0 <speech> in the text, but 1 speech files"),
        (conversation("<speech>", speech=["none.wav"]), "none.wav, speech: no such audio file"),
        (conversation("<speech>", speech=["train.jsonl"]), "train.jsonl, speech: not sound that"),
        (conversation("<speech>", speech=["../1.wav"]), "lies outside the data folder"),
        (conversation([{"type": "image"}]), "an answer holds <image>, but .* says text, speech"),
        (
            {"conversations": [turn("user", "<speech>?")], "speech": ["1.wav"]},
            "a turn from user holds <speech>, but .* takes text, images, audios",
        ),
        (
            {"conversations": [turn("user", [{"type": "speech", "speech": "1.wav"}])]},
            "a turn from user holds <speech>, but .* takes text, images, audios",
        ),
    ],
)
def test_answers_that_cannot_be_encoded_are_one_line(encode, record, message):
    with pytest.raises(ValueError, match=message) as error:
        encode(record)
    assert "\n" not in str(error.value)


def test_codes_that_do_not_fit_are_counted(config, tokenizer, folder):
    encoder = SampleEncoder(config, tokenizer, 8)
    with pytest.raises(ValueError, match=r"10 tokens \(10 for speech\) do not fit a sequence of 8"):
        encoder.encode(outputs.record(3), FilesInside(folder))


def test_outputs_of_a_model_without_them_are_refused(tiny, tokenizer, folder):
    encoder = SampleEncoder(tiny, tokenizer, 256)
    with pytest.raises(ValueError, match="holds speech, but tiny_avlm takes images, audios"):
        encoder.encode(outputs.record(3), FilesInside(folder))


def test_a_codec_without_its_files_is_one_line(config, tokenizer, tmp_path):
    bound = with_codec_folder(config, tmp_path)
    expected = f"{tmp_path}/codecs/speech/scale.json: no such file, but speech need it; tests write"
    with pytest.raises(ValueError, match=expected):
        SampleEncoder(bound, tokenizer, 256)


def test_a_codec_is_no_link_to_elsewhere(config, tokenizer, tmp_path):
    """What it leads to would be copied into the checkpoint."""
    (tmp_path / "secret.json").write_text('{"scale": 1}')
    folder = tmp_path / "data/codecs/speech"
    folder.mkdir(parents=True)
    (folder / "scale.json").symlink_to(tmp_path / "secret.json")
    bound = with_codec_folder(config, tmp_path / "data")
    with pytest.raises(ValueError, match=r"speech/scale.json: a link that leads out of its folder"):
        SampleEncoder(bound, tokenizer, 256)
    with pytest.raises(ValueError, match="a link that leads out of its folder"):
        copy_codecs(bound, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint/codecs/speech/scale.json").exists()


@pytest.mark.parametrize("sides", [{}, {"token_id": 3, "codec": LevelCodec()}])
def test_a_modality_needs_a_whole_side(sides):
    with pytest.raises(ValueError, match="speech: an input needs encoder, projector and token_id"):
        ModalityConfig(singular="speech", placeholder="<speech>", **sides)


def test_a_codec_says_what_it_cannot_write(config, tmp_path):
    codec = config.outputs["speech"].codec
    raw = codec.decode([0, 8] * 3)
    for suffix in codec.suffixes:
        codec.save(raw, tmp_path / f"a{suffix}")
        assert codec.encode(codec.read(tmp_path / f"a{suffix}")) == [0, 8] * 3
    with pytest.raises(ValueError, match=r"sound cannot be written as 'docx'"):
        codec.encode_bytes(raw, "docx")
    assert codec.encode_bytes(raw, "flac")[:4] == b"fLaC"
    assert codec.mime_type("flac") == "audio/flac"
