"""Export and import lose nothing, and a failure leaves nothing behind."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.hf import from_hf as importing
from examples.mimo.hf import to_hf as exporting
from examples.mimo.hf.from_hf import from_hf
from examples.mimo.hf.io import CheckpointReader, Folder
from examples.mimo.hf.to_hf import to_hf
from examples.mimo.model.parts import part_names, part_prefix
from tests.helpers.commands import launch_command, run_command, run_train
from tests.helpers.models import with_depth
from tests.hf.cases import CASES, OUR_VOCABULARY, VOCABULARY, WIDTH

PROVIDER = "tests.helpers.models:with_depth"
REMAINDER = "mimo.safetensors"
QKV_BIAS = "decoder.layers.self_attention.linear_qkv.bias"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`tiny_avlm` with a modality that has no Hugging Face family, after two iterations."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    sizes = ("--micro-batch-size", "1", "--global-batch-size", "2", "--train-iters", "2")
    evaluation = ("--eval-iters", "0", "--eval-interval", "1")
    flags = ("--model-provider", PROVIDER, *sizes, *evaluation, "--lr", "1e-2")
    run = run_train(*flags, "--save", str(folder))
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """What `convert.py to-hf` writes of it, and says."""
    folders = tmp_path_factory.mktemp("exported") / "folders"
    run = launch_command("convert.py", "to-hf", "--load", str(trained), "--save", str(folders))
    assert run.returncode == 0, run.stderr
    return folders, run.stderr


def model_tensors(folder):
    """Key -> tensor of every part in the checkpoint `folder`."""
    checkpoint = open_checkpoint(folder)
    reader = CheckpointReader(checkpoint.weights)
    prefixes = tuple(part_prefix(part) for part in part_names(checkpoint.config))
    return {key: reader.tensor(key) for key in reader.tensors if key.startswith(prefixes)}


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
        assert tensor.dtype == after[key].dtype, key


def flags_for_every_part(folders):
    flags = ["--language-model", folders / "language"]
    for name in ("images", "audios", "depths"):
        flags += [f"--{name}", folders / f"{name}.encoder"]
        flags += [f"--{name}-projector", folders / f"{name}.projector"]
    return flags


@pytest.mark.parametrize("how", ["folders", "a flag for every part"])
def test_all_parts_come_back_bit_equal(trained, exported, tmp_path, how):
    folders, _ = exported
    folder_flags = ["--folders", folders] if how == "folders" else flags_for_every_part(folders)
    flags = ("from-hf", "--model-provider", PROVIDER, *map(str, folder_flags))
    run = (launch_command if how == "folders" else run_command)(
        "convert.py", *flags, "--save", str(tmp_path / "again")
    )
    assert run.returncode == 0, run.stderr
    assert "random weights" not in run.stderr
    before = model_tensors(trained)
    # Softmax does not see them, and Whisper's files have no place for them.
    biases = before[f"{part_prefix('audios.encoder')}{QKV_BIAS}"]
    key_biases = biases.unflatten(1, (4, 3, -1))[:, :, 1]
    assert key_biases.abs().max() > 0
    assert_same(before, model_tensors(tmp_path / "again"))


def test_a_part_without_a_family_keeps_our_names(trained, exported):
    folders, said = exported
    assert "depths.encoder: no Hugging Face family describes it, so its tensors keep" in said
    assert str(folders / "depths.encoder") in said
    config = json.loads((folders / "depths.encoder/config.json").read_text())
    assert (config["model_type"], config["image_size"]) == ("mimo", 32)
    prefix = part_prefix("depths.encoder")
    before = {k: v for k, v in model_tensors(trained).items() if k.startswith(prefix)}
    after = load_file(folders / "depths.encoder/model.safetensors")
    assert_same({key.removeprefix(prefix): tensor for key, tensor in before.items()}, after)


def test_transformers_loads_the_others(exported):
    folders, _ = exported
    hf.AutoModelForCausalLM.from_pretrained(folders / "language")
    hf.CLIPVisionModel.from_pretrained(folders / "images.encoder")
    sizes = json.loads((folders / "audios.encoder/config.json").read_text())
    assert sizes["model_type"] == "whisper"
    assert (folders / "audios.encoder" / REMAINDER).is_file()


class Stop(BaseException):
    """As a user's interrupt: no Exception."""


@pytest.mark.parametrize("error", [OSError, Stop])
def test_a_failed_export_leaves_nothing_and_a_retry_works(trained, tmp_path, monkeypatch, error):
    saved = []

    def fails_on_the_third(tensors, file, **options):
        saved.append(file)
        if len(saved) == 3:
            raise error("disk full")
        save_file(tensors, file, **options)

    monkeypatch.setattr(exporting, "save_file", fails_on_the_third)
    target = tmp_path / "new" / "folders"
    with pytest.raises(error):
        to_hf(open_checkpoint(trained), target, lambda text: None)
    assert len(saved) == 3
    assert list(tmp_path.iterdir()) == []

    monkeypatch.undo()
    # What a process that was killed leaves is no obstacle.
    (tmp_path / "new" / ".folders.partial" / "language").mkdir(parents=True)
    to_hf(open_checkpoint(trained), target, lambda text: None)
    assert [path.name for path in target.parent.iterdir()] == ["folders"]
    parts = part_names(open_checkpoint(trained).config)
    assert sorted(path.name for path in target.iterdir()) == sorted(parts)


def test_a_failed_import_leaves_nothing(exported, tmp_path, monkeypatch, build_model):
    def fails(*arguments):
        raise OSError("disk full")

    folders, _ = exported
    language = {"language": Folder(folders / "language")}
    config = with_depth()
    monkeypatch.setattr(importing, "save_description", fails)
    with pytest.raises(OSError, match="disk full"):
        from_hf(config, language, tmp_path / "ours", lambda text: None)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    from_hf(config, language, tmp_path / "ours", lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_embeddings_beyond_the_vocabulary_come_back(tmp_path, build_model):
    """Embeddings that an imported config.json does not count, changed by training."""
    case = CASES["llama"]
    case.build().save_pretrained(tmp_path / "theirs")
    extra = OUR_VOCABULARY - VOCABULARY
    remainder = {}
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        remainder[f"{key}.at"] = torch.arange(VOCABULARY * WIDTH, OUR_VOCABULARY * WIDTH)
        remainder[key] = torch.randn(extra * WIDTH)
    save_file(remainder, tmp_path / "theirs" / REMAINDER)
    source = {"language": Folder(tmp_path / "theirs")}
    from_hf(case.config, source, tmp_path / "ours", lambda text: None)
    table = model_tensors(tmp_path / "ours")["language_model.output_layer.weight"]
    assert torch.equal(table[VOCABULARY:].flatten(), remainder["output_layer.weight"])
    to_hf(open_checkpoint(tmp_path / "ours"), tmp_path / "back", lambda text: None)
    assert_same(remainder, load_file(tmp_path / "back/language" / REMAINDER))


def change_config(folders):
    file = folders / "depths.encoder/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patch_size": 16}))


def change_tensors(folders, change, part="depths.encoder", file="model.safetensors"):
    tensors = load_file(folders / part / file)
    change(tensors)
    save_file(tensors, folders / part / file, metadata={"format": "pt"})


def lose_a_tensor(folders):
    change_tensors(folders, lambda tensors: tensors.pop("stem.conv1.weight"))


def add_a_tensor(folders):
    change_tensors(folders, lambda tensors: tensors.update(odd=torch.ones(1)))


def change_a_shape(folders):
    change_tensors(folders, lambda tensors: tensors.update({"stem.conv1.weight": torch.ones(1)}))


def point_outside(folders):
    def move(tensors):
        tensors[f"{QKV_BIAS}.at"] += 10**6

    change_tensors(folders, move, "audios.encoder", REMAINDER)


def add_a_part(folders):
    shutil.copytree(folders / "depths.encoder", folders / "smells.encoder")


def leave_nothing(folders):
    shutil.rmtree(folders)
    folders.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_config, f"patch_size is 16, but {PROVIDER}'s depths.encoder has 8"),
        (lose_a_tensor, "tensor stem.conv1.weight is missing"),
        (add_a_tensor, f"tensor odd has no place in {PROVIDER}'s depths.encoder"),
        (change_a_shape, "stem.conv1.weight has shape (1,), but (128, 3, 8, 8) is needed"),
        (point_outside, "linear_qkv.bias does not fit this part"),
        (add_a_part, f"{PROVIDER} has no part smells.encoder"),
        (leave_nothing, "no folder of a part in it"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_folders_that_are_wrong(exported, tmp_path, damage, message):
    folders = tmp_path / "folders"
    shutil.copytree(exported[0], folders)
    damage(folders)
    flags = ("--model-provider", PROVIDER, "--folders", str(folders))
    run = run_command("convert.py", "from-hf", *flags, "--save", str(tmp_path / "ours"))
    assert run.returncode == 2, run.stderr
    assert message in run.stderr.splitlines()[-1]
    assert [path for path in tmp_path.iterdir() if path != folders] == []


@pytest.mark.parametrize(
    ("provider", "message"),
    [
        ("without_pictures", "has 0 modalities whose encoder takes LLaVA's vision tower, and one"),
        ("with_two_picture_modalities", "has 2 modalities whose encoder takes LLaVA's vision"),
    ],
)
def test_llava_needs_one_modality_for_its_vision_tower(exported, tmp_path, provider, message):
    flags = ("--model-provider", f"tests.helpers.models:{provider}")
    flags += ("--llava", str(exported[0] / "language"), "--save", str(tmp_path / "ours"))
    run = run_command("convert.py", "from-hf", *flags)
    assert run.returncode == 2, run.stderr
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
