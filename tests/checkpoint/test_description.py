"""`mimo.json`: what travels with the weights, and which runs share a model."""

import dataclasses
import json

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

from examples.mimo.checkpoint.description import (
    FILE_NAME,
    TRACKER,
    check_parts,
    check_same_model,
    open_checkpoint,
    paths_of_fresh,
    save_description,
    weight_fields,
)
from examples.mimo.cli.overrides import with_fields
from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from examples.mimo.data.tokenizer import copy_tokenizer, load_tokenizer
from tests.helpers import tokenizers


@pytest.fixture
def folder(tiny, tmp_path):
    """A checkpoint of `tiny` without weights in it."""
    save_description(tmp_path, tiny, None)
    (tmp_path / TRACKER).write_text("3")
    make_weights(tmp_path / "iter_0000003")
    return tmp_path


def make_weights(folder):
    """The files of an iteration that are looked for before weights are loaded."""
    folder.mkdir()
    (folder / ".metadata").touch()
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


@pytest.mark.parametrize("name", MODEL_PROVIDERS)
def test_a_config_travels_whole(name, tmp_path):
    config = get_model_config(name)
    save_description(tmp_path, config, None)
    (tmp_path / TRACKER).write_text("release")
    make_weights(tmp_path / "release")
    assert open_checkpoint(tmp_path).config == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:getcwd", "os defines no function `def getcwd() -> MimoConfig:`, and nothing else"),
        ("shutil:disk_usage", "shutil defines no function `def disk_usage() -> MimoConfig:`"),
        ("builtins:breakpoint", "builtins defines no function `def breakpoint() -> MimoConfig:`"),
        ("my_absent_models:mine", "importing my_absent_models failed: ModuleNotFoundError"),
        ("my_absent_models:mine", "; install it, or put its folder on PYTHONPATH"),
        ("gpt", "names the model 'gpt', which this package does not have; use the version that"),
        (None, "names the model None, which this package does not have"),
    ],
)
def test_a_checkpoint_cannot_call_what_builds_no_model(folder, name, message):
    description = json.loads((folder / FILE_NAME).read_text())
    description["config"]["name"] = name
    (folder / FILE_NAME).write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"^--ckpt .*mimo.json names the model") as error:
        open_checkpoint(folder)
    assert message in str(error.value)
    assert "--model-provider" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "assignment",
    [
        "images.encoder.augment_shift=0.5",
        "images.encoder.max_tiles=2",
        "images.encoder.fit=pad",
        "audios.encoder.max_windows=3",
        "audios.encoder.overflow=truncate",
    ],
)
def test_runs_of_one_model_may_differ_in_what_shapes_no_weight(folder, tiny, assignment):
    check_same_model("--load", folder, with_fields(tiny, [assignment]))
    language = dataclasses.replace(tiny.language, seq_length=64, init_method_std=0.1)
    other = dataclasses.replace(tiny, language=language, prompt="?", frozen=("language",))
    check_same_model("--load", folder, dataclasses.replace(other, name="another"))


@pytest.mark.parametrize(
    ("assignment", "place"),
    [
        ("images.encoder.num_layers=1", "modalities.images.encoder.num_layers 2"),
        ("audios.encoder.frames_per_token=1", "modalities.audios.encoder.frames_per_token 3"),
        ("images.projector.ffn_hidden_size=8", "modalities.images.projector.ffn_hidden_size 256"),
        ("images.token_id=9", "modalities.images.token_id 4"),
    ],
)
def test_other_weights_are_another_model(folder, tiny, assignment, place):
    other = with_fields(tiny, [assignment])
    with pytest.raises(ValueError, match=r"^--load .*change the run") as error:
        check_same_model("--load", folder, other)
    assert f"this folder's model has {place}, but this run's has" in str(error.value)


def test_a_part_that_starts_afresh_is_not_compared(folder, tiny):
    other = with_fields(tiny, ["images.projector.ffn_hidden_size=8"])
    check_same_model("--load", folder, other, fresh_parts=["images.projector"])
    with pytest.raises(ValueError, match=r"images\.projector\.ffn_hidden_size"):
        check_same_model("--load", folder, other, fresh_parts=["images.encoder"])


def test_a_modality_that_the_checkpoint_lacks_must_start_afresh(folder, tiny):
    checkpoint_config = dataclasses.replace(tiny, modalities={"images": tiny.modalities["images"]})
    fresh = ["audios.encoder", "audios.projector"]
    check_parts("--load", folder, checkpoint_config, tiny, fresh)
    with pytest.raises(ValueError, match=r"this checkpoint has no audios\.projector; add "):
        check_parts("--load", folder, checkpoint_config, tiny, fresh[:1])
    paths = paths_of_fresh(checkpoint_config, tiny, fresh)
    assert "modalities.audios.token_id".startswith(paths)
    assert not "modalities.images.token_id".startswith(paths)


@pytest.mark.parametrize("damaged", [None, 5, "language"])
def test_a_value_of_another_type_is_named(folder, damaged):
    description = json.loads((folder / FILE_NAME).read_text())
    description["config"]["frozen"] = damaged
    (folder / FILE_NAME).write_text(json.dumps(description))
    with pytest.raises(
        ValueError, match=r"^--ckpt \S+: mimo\.json\.frozen is .* in the checkpoint, but this"
    ):
        open_checkpoint(folder)


def test_fields_say_themselves_whether_weights_depend_on_them():
    @dataclasses.dataclass(frozen=True)
    class Part:
        width: int = 1
        speed: int = dataclasses.field(default=2, metadata={"shapes_weights": False})

    assert weight_fields({"part": Part()}) == {"part.width": 1}


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / FILE_NAME).unlink(), "mimo.json is missing"),
        (lambda folder: (folder / FILE_NAME).write_text("{"), "mimo.json is damaged"),
        (lambda folder: (folder / FILE_NAME).write_text("[]"), "mimo.json is damaged"),
        (lambda folder: (folder / TRACKER).unlink(), "nothing has been saved here yet"),
        (lambda folder: (folder / TRACKER).write_text("x"), "names no iteration: 'x'"),
        (
            lambda folder: (folder / TRACKER).write_text("4"),
            "iter_0000004, which latest_checkpointed_iteration.txt names, has no whole",
        ),
    ],
)
def test_a_broken_folder_is_named_with_the_flag_that_named_it(folder, break_it, message):
    break_it(folder)
    with pytest.raises(ValueError, match=r"^--from ") as error:
        open_checkpoint(folder, flag="--from")
    assert message in str(error.value)


def test_a_field_that_is_younger_than_the_checkpoint_has_its_default(folder, tiny):
    """Such as those of the chat template; a field of no default must be there."""
    saved = json.loads((folder / FILE_NAME).read_text())
    for name in ("start", "past_start", "system_turn"):
        del saved["config"]["chat"][name]
    del saved["config"]["modalities"]["images"]["encoder"]["max_tiles"]
    (folder / FILE_NAME).write_text(json.dumps(saved))
    assert open_checkpoint(folder).config == tiny
    del saved["config"]["language"]["num_layers"]
    (folder / FILE_NAME).write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"language has the fields .* use the package version"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["smollm2_avlm", "llava_avlm"])
def test_a_template_of_before_start_and_system_turn_is_the_same_model(folder, name):
    config = get_model_config(name)
    saved = {"format": 1, "config": dataclasses.asdict(config)}
    chat = saved["config"]["chat"]
    chat["human"] += chat.pop("start")
    del chat["past_start"], chat["system_turn"]
    (folder / FILE_NAME).write_text(json.dumps(saved))
    loaded = open_checkpoint(folder).config
    assert loaded.chat.human == config.chat.human + config.chat.start
    assert (loaded.chat.start, loaded.chat.system_turn) == ("", config.chat.system_turn)
    check_same_model("--load", folder, config)
    # Another text is another template, and the message is one line whatever is in it.
    chat["human"] += "<think>\n"
    (folder / FILE_NAME).write_text(json.dumps(saved))
    with pytest.raises(
        ValueError, match=r"has chat.human '.*<think>.n', but this run's has '"
    ) as error:
        check_same_model("--load", folder, config)
    assert "\n" not in str(error.value)


def test_what_ends_an_answer_travels_with_the_tokenizer(tiny, tmp_path):
    source = tokenizers.byte_level(tmp_path / "hf", tokenizers.QWEN3)
    ends = {load_tokenizer(source).symbols[end] for end in ("<|endoftext|>", "<|im_end|>")}
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(ends)}))
    save_description(tmp_path / "checkpoint", tiny, source)
    copy_tokenizer(tmp_path / "checkpoint/tokenizer", tmp_path)
    assert load_tokenizer(tmp_path).end_ids == ends
    assert (tmp_path / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()
