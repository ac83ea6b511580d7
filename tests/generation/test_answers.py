"""One checkpoint, saved at TP 2, answers alike everywhere; wrong questions end with one line."""

import json
import shutil
from types import SimpleNamespace

import pytest
import soundfile

from examples.mimo.generation.sampling import forbidden_tokens
from tests.helpers import ranks
from tests.helpers.commands import launch_command, run_command, run_train

SAMPLES = 20
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


@pytest.fixture(scope="module")
def answers(checkpoint, data_folder):
    result = {}
    for tp, pp in LAYOUTS:
        flags = (str(checkpoint), str(data_folder), str(tp), str(pp), str(SAMPLES))
        done = ranks.run("tests/generation/answer_many.py", *flags, processes=tp * pp)
        assert done.returncode == 0, done.stderr
        result[tp, pp] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS[1:])
def test_the_same_tokens_at_every_layout(answers, tp, pp):
    assert len(answers[1, 1]["tokens"]) == SAMPLES
    for name in ("tokens", "drawn", "penalised"):
        assert answers[tp, pp][name] == answers[1, 1][name]
    for name in ("logprobs", "prompt logprobs"):
        for result, expected in zip(answers[tp, pp][name], answers[1, 1][name], strict=True):
            assert result == pytest.approx(expected, abs=1e-4)
    for results, several in zip(answers[tp, pp]["top"], answers[1, 1]["top"], strict=True):
        for result, expected in zip(results, several, strict=True):
            assert [token for token, _ in result] == [token for token, _ in expected]
            logprobs = [logprob for _, logprob in expected]
            assert [logprob for _, logprob in result] == pytest.approx(logprobs, abs=1e-4)
            assert len(result) == 5
            assert logprobs == sorted(logprobs, reverse=True)


def test_a_checkpoint_of_noncolocated_encoders_answers_the_same(
    checkpoint, answers, data_folder, tmp_path
):
    done = run_train(
        *("--encoder-ranks", "images=0", "audios=1", "--load", str(checkpoint), "--finetune"),
        *("--dataset-provider", "spoken_questions", "--data-path", str(data_folder)),
        *("--train-iters", "1", "--lr", "0", "--save", str(tmp_path), "--save-interval", "1"),
        processes=3,
    )
    assert done.returncode == 0, done.stderr
    flags = (str(tmp_path), str(data_folder), "1", "1", str(SAMPLES), "greedy")
    again = ranks.run("tests/generation/answer_many.py", *flags)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["tokens"] == answers[1, 1]["tokens"]


def test_the_answers_differ_so_the_comparison_means_something(answers):
    """How likely they are tells every prompt apart; what is drawn leaves the known sentences."""
    assert len({tuple(values) for values in answers[1, 1]["logprobs"]}) == SAMPLES
    assert len({tuple(tokens) for tokens in answers[1, 1]["drawn"]}) > SAMPLES // 2
    assert answers[1, 1]["penalised"] != answers[1, 1]["unpenalised"]


def test_greedy_answers_are_known_sentences(answers, tokenizer, sentences):
    assert {tokenizer.decode(tokens) for tokens in answers[1, 1]["tokens"]} <= set(sentences)


def test_answers_that_are_left_early_are_out_of_the_way(answers):
    for result in answers.values():
        number, tokens, met = result["left early"]
        assert tokens == result["tokens"][number]
        assert "other answers are being generated" in met


def test_one_tensor_parallel_rank_chooses_for_all(answers):
    for result in answers.values():
        assert result["one rank chooses"] == result["tokens"]


def test_a_batch_answers_as_each_alone_and_streamed(answers):
    for result in answers.values():
        assert result["alone"] == result["seven"] == result["streamed"] == result["tokens"]
        assert result["drawn alone"] == result["drawn"] != result["tokens"]


def test_the_cache_changes_nothing_and_media_are_encoded_once(answers):
    assert max(answers[1, 1]["errors"]) <= 1e-4
    assert answers[1, 1]["encoded"] == ["images", "audios"]


def run_alone(*flags):
    """The command in a process that need not import Megatron first."""
    return ranks.run("examples/mimo/avlm_inference.py", *flags)


def test_json_is_all_that_is_printed(checkpoint, media):
    done = launch_command(
        "avlm_inference.py",
        *("--ckpt", str(checkpoint), "--json", "--max-new-tokens", "4"),
        *("--image-path", str(media / "white.png"), "--audio-path", str(media / "second.wav")),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images"] == [str(media / "white.png")]
    assert result["prompt"] == "Answer the question."
    assert len(result["tokens"]) == 4
    assert result["finish"] == "length"
    assert done.stderr == ""


DETAILS = ("--json", "--logprobs")


def media_tokens(answer):
    """The tokens of a prompt without a probability; the first one has none either."""
    return answer["prompt_logprobs"].count(None) - 1


def test_several_pictures_without_sound(checkpoint, media, tiny):
    picture = ("--image-path", str(media / "white.png"))
    prompt = ("--prompt", "<image>Name it. <image>")
    done = run_alone("--ckpt", str(checkpoint), *picture, *picture, *prompt, *DETAILS)
    assert done.returncode == 0, done.stderr
    assert media_tokens(json.loads(done.stdout)) == 2 * tiny.modalities["images"].encoder.max_tokens


def test_overflow_truncates_when_told(checkpoint, media, tiny):
    encoder = tiny.modalities["audios"].encoder
    samples, rate = soundfile.read(media / "long.flac")
    soundfile.write(media / "head.flac", samples[: round(encoder.window_seconds * rate)], rate)
    result = []
    for file in ("long.flac", "head.flac"):
        flags = ("--audio-path", str(media / file), "--audio-overflow", "truncate", *DETAILS)
        done = run_alone("--ckpt", str(checkpoint), *flags)
        assert done.returncode == 0, done.stderr
        result.append(json.loads(done.stdout))
        assert media_tokens(result[-1]) == encoder.max_tokens
    assert result[0]["tokens"] == result[1]["tokens"]
    assert result[0]["logprobs"] == pytest.approx(result[1]["logprobs"], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image-path", "none.png"), "none.png, images: no such image file"),
        (("--image-path", "empty.png"), "empty.png, images: "),
        (("--image-path", "second.wav"), "second.wav, images: "),
        (("--audio-path", "white.png"), "white.png, audios: "),
        (("--audio-path", "long.flac"), "5.00 seconds of sound, but 2.4 fit"),
        (
            ("--image-path", "white.png", "--prompt", "<image><image>?"),
            "2 <image> in the text, but 1",
        ),
        (("--image-path", "white.png", "--prompt", "<audio>?"), "1 image files"),
        (("--prompt", " "), "nothing to answer"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--tp", "2"), "--nproc-per-node 2"),
        (("--imag-path", "white.png"), "did you mean --image-path?"),
        (("--image-background", "blue"), "(choose from 'white', 'black', 'mean')$"),
        (("--top-k", "x"), "argument --top-k: invalid int value: 'x'$"),
    ],
)
def test_wrong_questions_are_refused(ask, checkpoint, media, flags, message):
    flags = [str(media / f) if f.endswith((".png", ".wav", ".flac")) else f for f in flags]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ask("--ckpt", str(checkpoint), *flags)
    assert message in f"{error.value}$"


def test_a_wrong_question_ends_with_one_line(checkpoint, media):
    long = ("--audio-path", str(media / "long.flac"))
    done = run_alone("--ckpt", str(checkpoint), *long)
    assert done.returncode == 2
    assert "5.00 seconds of sound, but 2.4 fit" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def damage_description(folder):
    (folder / "mimo.json").write_text('{"format": 1')


def other_sizes(folder):
    saved = json.loads((folder / "mimo.json").read_text())
    saved["config"]["language"]["num_layers"] = 6
    (folder / "mimo.json").write_text(json.dumps(saved))


def other_width(folder):
    saved = json.loads((folder / "mimo.json").read_text())
    saved["config"]["language"]["ffn_hidden_size"] = 256
    (folder / "mimo.json").write_text(json.dumps(saved))


def no_tokenizer(folder):
    (folder / "tokenizer/tokenizer.model").unlink()


def no_weights(folder):
    for file in folder.glob("iter_*/*.distcp"):
        file.unlink()


def truncated_weights(folder):
    for file in folder.glob("iter_*/*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])


def nothing_saved_yet(folder):
    (folder / "latest_checkpointed_iteration.txt").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_description,
        other_sizes,
        other_width,
        no_tokenizer,
        no_weights,
        truncated_weights,
        nothing_saved_yet,
    ],
)
def test_a_damaged_checkpoint_is_refused(ask, checkpoint, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    with pytest.raises(ValueError, match=str(copy)):
        ask("--ckpt", str(copy), "--prompt", "hello")


def test_a_damaged_checkpoint_ends_with_one_line(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    truncated_weights(copy)
    for flags, message in (
        ((), "were saved"),
        (("--no-verify-integrity",), "but the weights take 2,000 bytes"),
    ):
        done = run_alone("--ckpt", str(copy), "--prompt", "hello", *flags)
        assert done.returncode == 2, done.stderr[-2000:]
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_evaluate_writes_the_scores(checkpoint, data_folder, tmp_path):
    output = tmp_path / "eval.json"
    flags = ("--ckpt", str(checkpoint), "--data", str(data_folder), "--samples", "12")
    done = launch_command("evaluate.py", *flags, "--output", str(output))
    assert done.returncode == 0, done.stderr
    scores = json.loads(output.read_text())["scores"]
    assert set(scores) == {
        *("heldout", "heldout_pairs", "heldout, image blanked", "heldout, audio blanked")
    }
    assert all(score["samples"] == 12 for score in scores.values())
    low, high = scores["heldout"]["interval_95"]
    assert 0 <= low <= scores["heldout"]["exact_match"] <= high <= 1
    assert "95 % interval" in done.stdout
    # Without an answer there is nothing to compare with.
    question = {"conversations": [{"from": "human", "value": "seven?"}]}
    (tmp_path / "heldout.jsonl").write_text(json.dumps(question))
    done = run_command("evaluate.py", "--ckpt", str(checkpoint), "--data", str(tmp_path))
    assert done.returncode == 2
    assert "heldout, line 1: no answer to compare with" in done.stderr
    assert not (checkpoint / "eval.json").exists()
    # Files that parts name can be blanked; a sample without an answer is no question of a test.
    picture = next((data_folder / "images/heldout").iterdir())
    (tmp_path / "a.png").write_bytes(picture.read_bytes())
    turns = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": "nine"},
    ]
    split = tmp_path / "heldout.jsonl"
    split.write_text(json.dumps({"messages": turns}))
    flags = ("--ckpt", str(checkpoint), "--data", str(tmp_path), "--output", str(output))
    assert run_command("evaluate.py", *flags).returncode == 0
    assert set(json.loads(output.read_text())["scores"]) == {"heldout", "heldout, image blanked"}
    split.write_text(json.dumps({"messages": turns[:1], "key": "asked"}))
    done = run_command("evaluate.py", *flags)
    assert done.returncode == 2
    assert "sample asked: no answer to compare with" in done.stderr


@pytest.mark.parametrize(("pad", "eos"), [(0, 3), (3, 3)])
def test_what_may_not_be_said(tiny, pad, eos):
    tokenizer = SimpleNamespace(size=500, pad_id=pad, end_ids={eos}, special={0, 3})
    tokenizer.decode = str
    forbidden = forbidden_tokens(tokenizer, tiny)
    assert forbidden == {4, 5, *range(500, 512)} | ({0} if pad == 0 else set())
