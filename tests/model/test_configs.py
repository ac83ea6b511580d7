"""What a config refuses when it is built, and how a config is found by its name."""

import dataclasses
import sys

import pytest

from examples.mimo import configs
from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from examples.mimo.configs.schema import MimoConfig


def changed(config, name="images", **fields):
    modality = dataclasses.replace(config.modalities[name], **fields)
    return dataclasses.replace(config, modalities={**config.modalities, name: modality})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"singular": "audio"}, "audios and images share singular audio"),
        ({"singular": "depth-map"}, "singular 'depth-map' becomes part of a flag"),
        ({"singular": "2d"}, "singular '2d' becomes part of a flag"),
        ({"placeholder": ""}, "image: the placeholder is empty; write <image>"),
        ({"placeholder": " "}, "the placeholder is empty"),
        ({"placeholder": "<audio>"}, "audios and images share placeholder <audio>"),
        ({"placeholder": "<audio"}, "images's placeholder <audio is a part of audios's <audio>"),
        (
            {"placeholder": "an <audio>"},
            "audios's placeholder <audio> is a part of images's an <au",
        ),
        ({"token_id": 5}, "audios and images share token id 5"),
        ({"token_id": 512}, "token id 512 of images is outside the vocabulary of 512"),
        ({"token_id": -1}, "token_id is -1; it must be a whole number from 0"),
    ],
)
def test_a_modality_that_would_not_work_is_refused(tiny, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        changed(tiny, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["language", "text", "key", "conversations", "a.b", "a-b", ""])
def test_a_modality_has_a_name_of_its_own(tiny, name):
    with pytest.raises(ValueError, match=f"a modality cannot be called {name!r}"):
        dataclasses.replace(tiny, modalities={name: tiny.modalities["images"]})


def test_a_config_with_another_name_than_its_entry_is_refused(monkeypatch):
    monkeypatch.setitem(MODEL_PROVIDERS, "llava_vlm", "examples.mimo.configs.sensor_lm")
    with pytest.raises(ValueError, match="defines no function `def llava_vlm"):
        get_model_config("llava_vlm")
    monkeypatch.setitem(MODEL_PROVIDERS, "tiny", __name__)
    with pytest.raises(ValueError, match="tiny: this config calls itself 'tiny_avlm'"):
        get_model_config("tiny")


def tiny() -> MimoConfig:
    return get_model_config("tiny_avlm")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of PYTHONPATH, with modules in it that nothing remembers afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


MODEL = """
import dataclasses
import os
from examples.mimo.configs import schema
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.configs.tiny_avlm import tiny_avlm

def mine() -> MimoConfig:
    return tiny_avlm()

def quoted() -> "schema.MimoConfig":
    return tiny_avlm()

number = 3
borrowed = os.getcwd

def unannotated():
    return tiny_avlm()

def other() -> int:
    return 3

def wrong() -> MimoConfig:
    return 3

def broken() -> MimoConfig:
    return dataclasses.replace(tiny_avlm(), nonsense=1)

def refused() -> MimoConfig:
    raise ValueError("first line\\nsecond line")

class Callable:
    def __call__(self) -> MimoConfig:
        raise SystemExit("called")

instance = Callable()
"""


def test_a_function_on_the_path_is_a_model(folder):
    (folder / "my_models").mkdir()
    (folder / "my_models" / "tiny.py").write_text(MODEL)
    config = get_model_config("my_models.tiny:mine")
    # The name leads back to the function, whatever the config called itself.
    assert config == dataclasses.replace(get_model_config("tiny_avlm"), name="my_models.tiny:mine")
    assert get_model_config("my_models.tiny:quoted").modalities == config.modalities


def test_the_current_directory_is_not_searched(tmp_path, monkeypatch):
    """A checkpoint that is opened beside a stranger's file must not run that file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text("raise SystemExit('this was not asked for')")
    with pytest.raises(ValueError, match="install it, or put its folder on PYTHONPATH"):
        get_model_config("my_model:mine")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny", "unknown --model-provider tiny; choose one of tiny_avlm"),
        ("my_tiny", "unknown --model-provider my_tiny"),
        ("my_tiny.py:mine", "No module named 'my_tiny.py'"),
        ("./my_tiny:mine", "unknown --model-provider ./my_tiny:mine"),
        ("my_tiny:", "or write package.module:function"),
        ("my_nothing:mine", "importing my_nothing failed: ModuleNotFoundError"),
        ("my_syntax:mine", "importing my_syntax failed: SyntaxError"),
        ("my_tiny:yours", r"my_tiny defines no function `def yours\(\) -> MimoConfig:`"),
        ("my_tiny:number", "my_tiny defines no function `def number"),
        ("my_tiny:borrowed", "my_tiny defines no function `def borrowed"),
        ("my_tiny:unannotated", "my_tiny defines no function `def unannotated"),
        ("my_tiny:other", "my_tiny defines no function `def other"),
        ("my_tiny:instance", "my_tiny defines no function `def instance"),
        ("my_tiny:Callable", "my_tiny defines no function `def Callable"),
        # Where it is written, not where it is imported.
        ("my_tiny:tiny_avlm", "my_tiny defines no function `def tiny_avlm"),
        ("os:getcwd", "os defines no function `def getcwd.*nothing else is called"),
        ("shutil:disk_usage", "shutil defines no function `def disk_usage"),
        ("builtins:breakpoint", "builtins defines no function `def breakpoint"),
        ("my_tiny:wrong", r"wrong\(\) returned a int, no MimoConfig"),
        ("my_tiny:broken", r"broken\(\) failed: TypeError: .*nonsense"),
        ("my_tiny:refused", r"refused\(\) failed: first line$"),
    ],
)
def test_a_model_that_cannot_be_found_is_one_line(folder, name, message):
    (folder / "my_tiny.py").write_text(MODEL)
    (folder / "my_syntax.py").write_text("def mine(:\n")
    with pytest.raises(ValueError, match=message) as error:
        get_model_config(name)
    assert "\n" not in str(error.value)
    assert "--model-provider" in str(error.value)


def test_every_entry_is_a_config_of_that_name():
    assert all(get_model_config(name).name == name for name in configs.MODEL_PROVIDERS)
