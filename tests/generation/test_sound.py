"""The server's answers with sound: what clients get is what `Mimo.generate` gives."""

import base64
import io
import itertools
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import soundfile

from demos.digits.questions import NUMBERS
from examples.mimo.generation import scheduler
from examples.mimo.generation.sampling import Options, Sampling
from examples.mimo.generation.scheduler import AnswerParts, KeptAnswers, OutputPiece
from examples.mimo.modalities.base import CodedItem
from tests.helpers import known_answers, outputs
from tests.helpers.served import Served, says, until

pytest.importorskip("starlette")
from examples.mimo.serving import media
from examples.mimo.serving.media import PCM_HZ, Decoders, PcmStream, Sound, SoundStream

CANDIDATES = [
    f"{verb} {number}." for verb in ("Name", "Add", "Which is", "After") for number in NUMBERS
]
COUNT = 4
WAV = {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}
STREAM = {**WAV, "audio": {"voice": "alloy", "format": "pcm16"}, "stream": True}
# Half a step of 16 bits, and what is rounded on the way.
STEP = 1.01 / 32_768


@pytest.fixture(scope="module")
def server(speaking):
    return speaking


@pytest.fixture(scope="module")
def model(server):
    return server.model


def messages(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def alone(model):
    """Question -> its answer without a server, and the same as `generate` returns it.

    Of questions whose answers are different sounds.
    """
    samples = [model.encode({"key": q, "conversations": messages(q)}) for q in CANDIDATES]
    answers = model.answer(samples, Options(outputs=("speech",)))
    different = {str(a.outputs): (q, a) for q, a in zip(CANDIDATES, answers, strict=True)}
    chosen = dict(list(different.values())[:COUNT])
    assert len(chosen) == COUNT
    generated = model.generate([messages(q)[0]["content"] for q in chosen], outputs=["speech"])
    return {q: (a, g) for (q, a), g in zip(chosen.items(), generated, strict=True)}


@pytest.fixture(scope="module")
def questions(alone):
    return list(alone)


@pytest.fixture(params=range(COUNT))
def text(request, questions):
    return questions[request.param]


@pytest.fixture(scope="module")
def question(alone):
    """One whose answer has several units of codes."""
    return max(alone, key=lambda q: len(alone[q][0].outputs["speech"][0]))


def ask(server, text, **more):
    return server.client().chat.completions.create(
        model="m", messages=messages(text), max_tokens=64, **more
    )


def samples_of(data):
    return soundfile.read(io.BytesIO(data), dtype="float32")


def levels(data):
    return np.frombuffer(data, "<i2") / 32_767


def as_pcm(samples, rate=outputs.RATE_HZ):
    return PcmStream(rate)(np.asarray(samples, np.float32), is_last=True)


class Streamed:
    """What a client has of a stream: of each choice the text, the sound and the end."""

    def __init__(self, chunks, choice=0):
        chunks = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].index == choice]
        deltas = [chunk.choices[0].delta for chunk in chunks]
        audios = [delta.audio for delta in deltas if delta.audio]
        (self.id,) = [audio.id for audio in audios if audio.id]
        (self.expires_at,) = [audio.expires_at for audio in audios if audio.expires_at]
        self.transcript = "".join(audio.transcript or "" for audio in audios)
        self.pieces = [base64.b64decode(audio.data) for audio in audios if audio.data]
        # Joined as they are, they are base64 as well.
        self.data = base64.b64decode("".join(audio.data or "" for audio in audios), validate=True)
        assert self.data == b"".join(self.pieces)
        assert audios[-1].expires_at
        assert all(not delta.content for delta in deltas)
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        *others, self.finish_reason = [chunk.choices[0].finish_reason for chunk in chunks]
        assert set(others) == {None}


def test_a_whole_answer_is_what_generate_gives(server, alone, text):
    answer, generated = alone[text]
    reply = ask(server, text, **WAV)
    choice = reply.choices[0]
    assert choice.message.content is None
    assert choice.message.audio.transcript == generated.text
    assert choice.finish_reason == "stop"
    samples, rate = samples_of(base64.b64decode(choice.message.audio.data))
    (expected,) = generated.speech
    assert rate == outputs.RATE_HZ
    assert np.abs(samples - expected).max() < STEP
    assert abs(choice.message.audio.expires_at - reply.created - 3600) < 60
    num_codes = len(answer.outputs["speech"][0])
    usage = reply.usage
    assert usage.completion_tokens == len(answer.tokens)
    assert usage.completion_tokens_details.audio_tokens == num_codes > 0
    assert usage.completion_tokens_details.text_tokens == len(answer.tokens) - num_codes


def test_a_stream_is_the_same_text_and_sound(server, alone, text):
    answer, generated = alone[text]
    chunks = list(ask(server, text, **STREAM, stream_options={"include_usage": True}))
    streamed = Streamed(chunks)
    assert streamed.transcript == generated.text
    assert streamed.finish_reason == "stop"
    expected = as_pcm(generated.speech[0])
    # Resampled in pieces, a sample may be rounded otherwise.
    assert np.abs(levels(streamed.data) - levels(expected)).max() < 1.01 / 32_767
    assert chunks[-1].usage.completion_tokens == len(answer.tokens)
    audio_tokens = chunks[-1].usage.completion_tokens_details.audio_tokens
    assert audio_tokens == len(answer.outputs["speech"][0])
    whole = ask(server, text, **{**STREAM, "stream": False}).choices[0].message.audio
    assert np.abs(levels(base64.b64decode(whole.data)) - levels(expected)).max() < STEP


def test_openais_stream_helper_joins_the_sound(server, alone, question):
    with server.client().chat.completions.stream(
        model="m",
        messages=messages(question),
        modalities=["text", "audio"],
        audio={"voice": "alloy", "format": "pcm16"},
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    generated = alone[question][1]
    assert message.audio.transcript == generated.text
    assert len(base64.b64decode(message.audio.data)) == len(as_pcm(generated.speech[0]))


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus"])
def test_formats(server, alone, question, kind):
    body = {**WAV, "audio": {"voice": {"id": "voice_1"}, "format": kind}}
    data = base64.b64decode(ask(server, question, **body).choices[0].message.audio.data)
    header = {"wav": b"RIFF", "flac": b"fLaC", "opus": b"OggS", "mp3": data[:1]}[kind]
    assert data.startswith(header)
    samples, rate = samples_of(data)
    # An MP3 has whole frames, and some more around the sound.
    seconds = len(alone[question][1].speech[0]) / outputs.RATE_HZ
    assert abs(len(samples) / rate - seconds) < (0.15 if kind == "mp3" else 0.01)


def test_text_is_all_that_is_sent_and_generated_unless_sound_is_asked_for(
    server, model, alone, questions
):
    for text in questions[:2]:
        answer, generated = alone[text]
        for more in ({}, {"modalities": ["text"]}):
            reply = ask(server, text, **more)
            message = json.loads(reply.to_json())["choices"][0]["message"]
            assert message == {"role": "assistant", "content": generated.text, "refusal": None}
            begin = answer.tokens.index(model.config.outputs["speech"].begin_id)
            assert reply.usage.completion_tokens == begin
        chunks = list(ask(server, text, stream=True))
        assert not any(chunk.choices[0].delta.audio for chunk in chunks)


def test_the_first_sound_comes_before_the_last_code(server, alone, question, monkeypatch):
    """The step of the second unit waits until the client has the sound of the first."""
    answer = alone[question][0]
    (codes,) = answer.outputs["speech"]
    assert len(codes) >= 4
    # With the end marker and the end-of-text token.
    steps_left = len(codes) - 2 + 2
    heard, in_time, steps = threading.Event(), [], itertools.count(1)
    step = server.worker.scheduler.step

    def wait_and_step():
        # The first token comes of the prompt, not of a step.
        if next(steps) == len(answer.tokens) + 1 - steps_left:
            in_time.append(heard.wait(60))
        return step()

    # An idle worker steps too, which counts no token.
    monkeypatch.setattr(
        server.worker.scheduler, "step", lambda: wait_and_step() if server.busy else step()
    )
    for chunk in ask(server, question, **STREAM):
        audio = chunk.choices[0].delta.audio
        if audio and audio.data:
            heard.set()
    assert in_time == [True]


def test_a_slow_codec_keeps_neither_the_model_nor_other_clients_waiting(
    server, alone, question, monkeypatch
):
    """While all decoders are busy, texts are answered; then the sound comes."""
    go_on, decode = threading.Event(), outputs.LevelCodec.decode_pieces

    def decode_late(codec, codes):
        for piece in decode(codec, codes):
            go_on.wait(60)
            yield piece

    monkeypatch.setattr(outputs.LevelCodec, "decode_pieces", decode_late)
    with ThreadPoolExecutor(4) as clients:
        spoken = [clients.submit(lambda: list(ask(server, question, **STREAM))) for _ in range(4)]
        try:
            until(lambda: server.metric("mimo_answer_tokens_total") > 0)
            for text in alone:
                assert ask(server, text).choices[0].message.content == alone[text][1].text
            assert not any(client.done() for client in spoken)
        finally:
            go_on.set()
        for client in spoken:
            assert Streamed(client.result()).transcript == alone[question][1].text


def test_clients_at_once_get_what_each_gets_alone(server, alone, questions):
    def listen(number):
        text = questions[number % COUNT]
        if number % 2:
            streamed = Streamed(list(ask(server, text, **STREAM)))
            return streamed.transcript, len(streamed.data)
        audio = ask(server, text, **{**STREAM, "stream": False}).choices[0].message.audio
        return audio.transcript, len(base64.b64decode(audio.data))

    with ThreadPoolExecutor(6) as clients:
        results = list(clients.map(listen, range(18)))
    for number, result in enumerate(results):
        generated = alone[questions[number % COUNT]][1]
        assert result == (generated.text, len(as_pcm(generated.speech[0])))


def test_choices_have_sounds_of_their_own(server, model, question):
    options = Options(64, Sampling(1.3, seed=5), outputs=("speech",))
    sample = model.encode({"key": "k", "conversations": messages(question)})
    until(lambda: not server.worker.num_running)
    expected = [model.answer([sample], options.with_seed_offset(n))[0] for n in range(3)]
    assert len({answer.text for answer in expected}) == 3
    sampling = {"n": 3, "temperature": 1.3, "seed": 5}
    codec = model.config.outputs["speech"].codec
    whole = ask(server, question, **WAV, **sampling).choices
    chunks = list(ask(server, question, **STREAM, **sampling))
    for number, answer in enumerate(expected):
        message, streamed = whole[number].message, Streamed(chunks, number)
        assert streamed.transcript == answer.text
        if not answer.outputs:
            assert (message.audio, message.content) == (None, answer.text)
            assert streamed.data == b""
            continue
        sound = np.concatenate([codec.decode(codes) for codes in answer.outputs["speech"]])
        assert message.audio.transcript == answer.text
        samples, _ = samples_of(base64.b64decode(message.audio.data))
        assert np.abs(samples - sound).max() < STEP
        assert len(streamed.data) == len(as_pcm(sound))
    assert any(answer.outputs for answer in expected)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_an_answer_without_sound_is_text(server, alone, question, is_stopped):
    """In a stream, where nobody knows before its end, it is a transcript without data."""
    more = {"stop": alone[question][1].text[8:12]} if is_stopped else {"max_tokens": 3}
    body = {"messages": messages(question), "max_tokens": 64} | more
    message = server.ask({**body, **WAV})["choices"][0]["message"]
    assert message["audio"] is None
    assert message["content"]
    chunks = server.client().chat.completions.create(model="m", **body, **STREAM)
    streamed = Streamed(list(chunks))
    assert streamed.transcript == message["content"]
    assert streamed.data == b""
    spoken = {"role": "assistant", "audio": {"id": streamed.id}}
    written = {"role": "assistant", "content": message["content"]}
    usages = [
        server.ask({"messages": [*messages(question), said, *messages("And now?")]})["usage"]
        for said in (spoken, written)
    ]
    assert usages[0]["prompt_tokens"] == usages[1]["prompt_tokens"]


def test_logprobs_are_those_of_the_transcript(server, question):
    body = {"logprobs": True, "top_logprobs": 3}
    choice = ask(server, question, **WAV, **body).choices[0]
    content = choice.logprobs.content
    transcript = choice.message.audio.transcript
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == transcript
    assert len(content) == known_answers.SENTENCE_LENGTH
    # The marker of an output was likely behind the last word, and has no text to be shown with.
    assert all(1 <= len(entry.top_logprobs) <= 3 for entry in content)
    streamed = [
        entry.token
        for chunk in ask(server, question, **STREAM, **body)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert streamed == [entry.token for entry in content]


@pytest.mark.parametrize("stream", [False, True])
def test_a_later_turn_names_an_answer_by_its_id(server, model, alone, question, stream):
    answer, generated = alone[question]
    if stream:
        name = Streamed(list(ask(server, question, **STREAM))).id
        said = {"role": "assistant", "audio": {"id": name}}
    else:
        # As a client that sends back what it got.
        reply = ask(server, question, **WAV)
        said = json.loads(reply.choices[0].message.to_json())
    item = CodedItem("an answer", b"", answer.outputs["speech"][0])
    parts = [{"type": "text", "text": generated.text}, {"type": "speech", "speech": item}]
    turns = [*messages(question), {"role": "assistant", "content": parts}, *messages("And now?")]
    sample = model.encode({"key": "k", "conversations": turns})
    until(lambda: not server.worker.num_running)
    (expected,) = model.answer([sample], Options(outputs=("speech",)))
    body = {"messages": [*messages(question), said, *messages("And now?")], "max_tokens": 64}
    reply = server.ask({**body, **WAV})
    assert reply["usage"]["prompt_tokens"] == len(sample.tokens.ids)
    assert reply["usage"]["completion_tokens"] == len(expected.tokens)
    assert reply["choices"][0]["message"]["audio"]["transcript"] == expected.text
    # Its words may stand beside the id, and no others.
    said["content"] = generated.text
    assert server.ask({**body, **WAV})["usage"] == reply["usage"]
    said["content"] = "other words"
    error = server.ask(body, status=400)["error"]["message"]
    assert error.startswith("messages[1].audio names an answer of other words than content has")


def test_a_stop_string_that_may_begin_holds_no_text_back_behind_the_sound(model, alone, question):
    answer = alone[question][0]
    sample = model.encode({"key": "k", "conversations": messages(question)})
    options = Options(64, stops=(f"{answer.text[-3:]}!",), outputs=("speech",))
    parts = AnswerParts(model.config)
    for piece in model.stream_answer(sample, options):
        parts.add(piece)
    assert piece.answer.tokens == answer.tokens
    assert [part["type"] for part in parts.parts] == ["text", "speech"]
    assert parts.parts[0]["text"] == answer.text


def test_named_answers_beyond_what_fits_are_refused(server, model, question):
    name = Streamed(list(ask(server, question, **STREAM))).id
    kept = server.application.kept
    item = CodedItem("it", b"", [0, 8] * model.config.language.seq_length)
    kept.add("audio_long", [{"type": "speech", "speech": item}])
    turns = []
    for audio in (name, "audio_long"):
        turns += [*messages("hi"), {"role": "assistant", "audio": {"id": audio}}]
    said = server.ask({"messages": [*turns, *messages("hi")]}, status=400)["error"]["message"]
    assert "the answers that messages name have" in said
    assert "tokens fit; leave some out" in said


def test_answers_are_kept_for_a_time_and_within_a_size(model, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(scheduler.time, "time", lambda: now[0])
    kept = KeptAnswers(max_bytes=40_000, seconds=60)
    item = CodedItem("it", b"", range(1_000))
    parts = [{"type": "text", "text": "said"}, {"type": "speech", "speech": item}]
    assert kept.add("a", parts) == 1060
    (text, output) = kept.get("a")
    assert (text, list(output["speech"].codes)) == (parts[0], list(range(1_000)))
    for number in range(20):
        now[0] += 1
        kept.add(f"b{number}", parts)
        assert kept.num_bytes <= 40_000
    assert kept.get("a") is None
    assert kept.get("b19") is not None
    sizes = [kept.get(f"b{number}") is not None for number in range(20)]
    assert sizes == sorted(sizes)
    assert 4 <= sum(sizes) < 10
    now[0] += 60
    assert kept.get("b19") is None
    kept.add("c", parts)
    assert len(kept.answers) == 1
    # One that is larger than the whole room is not kept.
    huge = [{"type": "speech", "speech": CodedItem("it", b"", range(100_000))}]
    kept.add("d", huge)
    assert (kept.get("d"), kept.num_bytes) == (None, 0)


WRONG = [
    ({"audio": None}, 'audio must be an object, such as {"voice": "alloy", "format": "wav"}'),
    ({"audio": "wav"}, "audio must be an object"),
    ({"audio": {"voice": "alloy"}}, "audio.format None is not written; choose one of wav, mp3, "),
    ({"audio": {"voice": "alloy", "format": "aac"}}, "audio.format 'aac' is not written"),
    ({"audio": {"voice": "alloy", "format": ["wav"]}}, "audio.format ['wav'] is not written"),
    ({"audio": {"voice": "alloy", "format": "x" * 10_000}}, "is not written"),
    ({"audio": {"format": "wav"}}, "audio.voice must be a name"),
    ({"audio": {"voice": 5, "format": "wav"}}, "audio.voice must be a name"),
    ({"audio": {"voice": {"id": ""}, "format": "wav"}}, "audio.voice must be a name"),
    ({"audio": {"voice": "v" * 1_000, "format": "wav"}}, "audio.voice must be a name"),
    ({"modalities": ["audio", "image"]}, 'modalities must be ["text"], or ["text", "audio"]'),
    ({"modalities": ["text"]}, 'audio is for answers with sound; add "audio" to modalities too'),
    (
        {"stream": True},
        "audio.format wav cannot be streamed; ask for pcm16, or leave stream out",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_cannot_be_asked_for_is_one_sentence(server, change, message):
    said = server.ask({**says(), **WAV, **change}, status=400)["error"]["message"]
    assert message in said
    assert "\n" not in said
    assert len(said) < 200


def test_a_rate_that_a_format_does_not_have_is_refused_first(server, monkeypatch):
    speech = server.model.config.outputs["speech"].codec
    monkeypatch.setitem(vars(speech), "sample_rate_hz", 11_025)
    body = {**WAV, "audio": {"voice": "alloy", "format": "opus"}}
    said = server.ask({**says(), **body}, status=400)["error"]["message"]
    assert "audio.format: libsndfile writes no opus at 11,025 Hz" in said


def test_a_codec_that_fails_is_status_500_and_an_event(server, question, monkeypatch):
    def fail(codec, codes):
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(outputs.LevelCodec, "decode", fail)
        assert "log says why" in server.ask({**says(), **WAV}, status=500)["error"]["message"]
        with pytest.raises(openai.APIError, match="log says why"):
            list(ask(server, question, **STREAM))
    assert Streamed(list(ask(server, question, **STREAM))).data


def test_a_client_that_leaves_ends_its_sound(server, question, alone, monkeypatch):
    """After its first sound, while the codec waits for codes; then others are answered."""
    left, cancelled = threading.Event(), threading.Event()
    step, cancel, codes_came = server.worker.scheduler.step, SoundStream.cancel, []

    def step_until_left():
        if codes_came:
            left.wait(60)
        pieces = step()
        codes_came.extend(piece for piece in pieces if piece.codes)
        return pieces

    def see_cancel(stream):
        cancel(stream)
        cancelled.set()

    with monkeypatch.context() as patch:
        patch.setattr(server.worker.scheduler, "step", step_until_left)
        patch.setattr(SoundStream, "cancel", see_cancel)
        before = server.metric("mimo_left_total")
        with ask(server, question, **STREAM) as stream:
            for chunk in stream:
                if chunk.choices[0].delta.audio.data:
                    break
        assert cancelled.wait(60)
        left.set()
        until(lambda: not server.worker.num_running)
        assert server.metric("mimo_left_total") == before + 1
    for text in alone:
        assert Streamed(list(ask(server, text, **STREAM))).transcript == alone[text][1].text


class Listener:
    """Sound that is decoded in these threads."""

    def __init__(self, model, decoders):
        self.pieces, self.ended = [], threading.Event()
        codec = model.config.outputs["speech"].codec
        self.stream = SoundStream(Sound("speech", codec, "pcm16"), decoders, 0, self.hear)

    def hear(self, piece):
        self.pieces.append(piece)
        if piece.is_last:
            self.ended.set()

    def add(self, items):
        """Outputs of an answer, in units as they come."""
        unit = self.stream.codec.unit
        for number, codes in enumerate(items):
            for part in itertools.batched(codes, unit):
                self.stream.add(OutputPiece("speech", number, part))
            self.stream.add(OutputPiece("speech", number, (), is_last=True))
        self.stream.finish()


def test_sound_that_nobody_waits_for_frees_its_thread(model, monkeypatch):
    """Twice as many as there are threads wait for codes, and are left; another is decoded."""
    monkeypatch.setattr(media, "MAX_DECODERS", 3)
    decoders = Decoders()
    listeners = [Listener(model, decoders) for _ in range(6)]
    for listener in listeners:
        listener.stream.add(OutputPiece("speech", 0, (0, 8)))
    # Others decode while these wait, however few may decode at once.
    until(lambda: sum(bool(listener.pieces) for listener in listeners) == 3)
    for listener in listeners:
        listener.stream.cancel()
    last = Listener(model, decoders)
    last.add([[0, 8]])
    assert last.ended.wait(60)
    assert sum(len(listener.pieces) for listener in listeners) == 3


def test_several_sounds_of_an_answer_follow_one_another(model):
    codec = model.config.outputs["speech"].codec
    items = known_answers.spoken(model.config)[:3]
    expected = np.concatenate([codec.decode(codes) for codes in items])
    samples, _ = samples_of(Sound("speech", codec, "flac").encode(items))
    assert np.abs(samples - expected).max() < STEP
    listener = Listener(model, Decoders())
    listener.add(items)
    assert listener.ended.wait(60)
    pieces = listener.pieces
    data = b"".join(piece.data for piece in pieces)
    assert np.abs(levels(data) - levels(as_pcm(expected))).max() < 1.01 / 32_767
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100])
def test_pcm_is_at_openais_rate_whatever_the_codecs(rate):
    """A tone has its pitch, and pieces are the whole."""
    seconds = np.arange(rate) / rate
    tone = (0.5 * np.sin(2 * np.pi * 440 * seconds)).astype(np.float32)
    whole = as_pcm(tone, rate)
    assert len(whole) == 2 * PCM_HZ
    spectrum = np.abs(np.fft.rfft(levels(whole)))
    assert spectrum.argmax() == 440
    stream, pieces = PcmStream(rate), []
    for start in range(0, rate, 1_001):
        pieces.append(stream(tone[start : start + 1_001]))
        assert len(pieces[-1]) % 3 == 0
    pieces.append(stream(tone[:0], is_last=True))
    assert np.abs(levels(b"".join(pieces)) - levels(whole)).max() < 1.01 / 32_767


def test_outputs_are_listed_and_the_first_sound_is_timed(server, question):
    listed = json.loads(server.get("/modalities"))
    assert listed["outputs"] == [{"name": "speech", "singular": "speech", "asked_as": "audio"}]
    before = server.metric("mimo_first_sound_seconds_count")
    list(ask(server, question, **STREAM))
    ask(server, question, **WAV)
    ask(server, question)
    assert server.metric("mimo_first_sound_seconds_count") == before + 2
    assert server.metric("mimo_kept_bytes") > 0


@pytest.mark.slow
def test_ranks_answer_aloud_and_the_flags_bound_what_is_kept(aloud, alone, question):
    flags = ("--tp", "2", "--kept-seconds", "0.001")
    ranks = Served(aloud, *flags, processes=2)
    streamed = Streamed(list(ask(ranks, question, **STREAM)))
    assert streamed.transcript == alone[question][1].text
    assert len(streamed.data) == len(as_pcm(alone[question][1].speech[0]))
    said = {"role": "assistant", "audio": {"id": streamed.id}}
    status, reply = ranks.ask({"messages": [*messages(question), said, *messages("And now?")]})
    assert status == 400
    assert "this server keeps no such answer (any more)" in reply["error"]["message"]
    ranks.process.send_signal(signal.SIGINT)
    ranks.process.wait(timeout=60)
    assert "the model failed" not in ranks.said()
