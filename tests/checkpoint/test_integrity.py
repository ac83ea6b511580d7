"""Manifests: what is not what was saved is noticed, before any of it is used."""

import functools
import hashlib
import json
import os
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state

from examples.mimo.checkpoint.description import (
    FILE_NAME,
    TOKENIZER,
    TRACKER,
    open_checkpoint,
    save_description,
)
from examples.mimo.checkpoint.integrity import (
    BLOCK_BYTES,
    MANIFEST,
    begin_check,
    checked_first,
    finish_check,
    sealed,
    with_manifest,
    write_manifest,
)
from tests.helpers.commands import run_command, run_train
from tests.helpers.damage import Damage, files, random_damages, refusal

REMEDY = (
    "; copy the checkpoint anew or load another, or take it as it is with --no-verify-integrity"
)
CHANGED = "is not what was saved (its SHA-256 differs)"


def save(model, folder, verify=True):
    """The weights of `model` as training saves them."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": model.sharded_state_dict(metadata=metadata), "iteration": 3}
    folder.mkdir(parents=True, exist_ok=True)
    with_manifest(dist_checkpointing.save)(state, str(folder), verify_integrity=verify)


@pytest.fixture(scope="module")
def saved(tiny, build_model, data_folder, tmp_path_factory):
    """A whole checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    save_description(folder, tiny, data_folder)
    save(build_model(tiny), folder / "iter_0000003")
    (folder / TRACKER).write_text("3")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def test_a_whole_checkpoint_loads(saved, capsys):
    assert refusal(saved) is None
    assert capsys.readouterr().err == ""
    names = {file.name for file in files(saved)}
    assert names == {
        *("__0_0.distcp", ".metadata", "metadata.json", MANIFEST),
        *(FILE_NAME, "tokenizer.model"),
    }


def test_random_damage_is_noticed(saved):
    for damage in random_damages(saved, count=60, seed=0):
        with damage.done():
            message = refusal(saved)
        assert message, damage
        assert message.startswith(f"--ckpt {saved}: "), message
        assert "\n" not in message
    assert refusal(saved) is None


@pytest.mark.parametrize("name", [f"iter_0000003/{MANIFEST}", FILE_NAME])
def test_every_byte_of_what_holds_digests_counts(saved, name):
    file = saved / name
    for position in range(file.stat().st_size):
        with Damage(file, position, bit=position % 7).done():
            assert refusal(saved), position


def test_the_padding_between_tensors_counts(saved):
    """Of zeros between tensors a loader reads none."""
    shard = saved / "iter_0000003/__0_0.distcp"
    gap = shard.read_bytes().index(bytes(32)) + 16
    with Damage(shard, gap, bit=0).done():
        message = f"--ckpt {saved}: iter_0000003/__0_0.distcp {CHANGED}{REMEDY}"
        assert refusal(saved) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: (w / "__0_0.distcp").unlink(), "__0_0.distcp is missing ("),
        (lambda w: (w / "metadata.json").unlink(), "has no whole .metadata and metadata.json; no"),
        (lambda w: (w / "common.pt").write_bytes(b"x"), "common.pt was not saved with the che"),
        (
            lambda w: shutil.copy(w / "__0_0.distcp", w / "__1_0.distcp"),
            "__1_0.distcp was not saved with the checkpoint (",
        ),
        (
            lambda w: os.truncate(w / ".metadata", 7),
            ".metadata has 7 bytes, but ",
        ),
        (
            lambda w: (w.parent / TOKENIZER / "tokenizer.json").write_text("{}"),
            "tokenizer/tokenizer.json was not saved with the checkpoint: remove it; copy",
        ),
        (
            lambda w: (w.parent / TOKENIZER / "tokenizer.model").unlink(),
            "tokenizer/tokenizer.model is missing; copy",
        ),
        (lambda w: (w / MANIFEST).write_text("[" * 10**5), f"{MANIFEST} is damaged (maximum rec"),
        (lambda w: (w / MANIFEST).write_text(sealed({"files": 5})), "is of another version of"),
        (
            lambda w: (w / MANIFEST).write_text(
                sealed(
                    {
                        "block_bytes": BLOCK_BYTES,
                        "files": {"../../passwd": {"bytes": 1, "sha256": ["0"]}},
                    }
                )
            ),
            "is of another version of",
        ),
    ],
)
def test_other_files_are_named(folder, change, message):
    change(folder / "iter_0000003")
    assert message in refusal(folder)


def test_a_note_beside_the_weights_does_no_harm(folder):
    (folder / "iter_0000003/README.txt").write_text("from cluster 7")
    (folder / "eval.json").write_text("{}")
    assert refusal(folder) is None


def test_a_tracker_that_lost_its_number_names_what_is_there(folder):
    (folder / TRACKER).write_bytes(b"\xff")
    assert refusal(folder).endswith(
        "the last one there is iter_0000003; write 3 into it to load that"
    )
    (folder / TRACKER).write_text("4")
    shutil.copytree(folder / "iter_0000003", folder / "release")
    (folder / "iter_0000003" / MANIFEST).unlink()
    message = refusal(folder)
    assert "iter_0000004, which" in message
    assert message.endswith("the last one there is release; write release into it to load that")


def test_an_older_checkpoint_loads_with_a_line(folder, capsys):
    (folder / "iter_0000003" / MANIFEST).unlink()
    saved = json.loads((folder / FILE_NAME).read_text())
    del saved["sha256"], saved[TOKENIZER]
    (folder / FILE_NAME).write_text(json.dumps(saved))
    assert refusal(folder) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--ckpt {folder}: iter_0000003 has no {MANIFEST}, so damage" in said


def test_without_verification_nothing_is_compared(folder):
    with Damage(folder / FILE_NAME, 30, bit=0).done():
        assert not open_checkpoint(folder).verify
        with pytest.raises(ValueError, match=r"mimo\.json is not what was saved"):
            open_checkpoint(folder, verify=True)


def test_a_large_file_is_digested_in_blocks(tmp_path):
    weights = tmp_path / "iter_0000001"
    weights.mkdir()
    with (weights / "__0_0.distcp").open("wb") as stream:
        stream.truncate(2 * BLOCK_BYTES + 5)
    write_manifest(weights)
    listed = json.loads((weights / MANIFEST).read_text())["files"]["__0_0.distcp"]
    assert listed["bytes"] == 2 * BLOCK_BYTES + 5
    assert len(listed["sha256"]) == 3
    for position, place in ((BLOCK_BYTES - 1, ""), (2 * BLOCK_BYTES, " behind byte 33,554,432")):
        with Damage(weights / "__0_0.distcp", position, bit=7).done():
            begin_check(weights, "--ckpt x")
            with pytest.raises(ValueError, match=rf"saved \(its SHA-256{place} differs\)"):
                finish_check(weights)


def test_a_digest_of_one_block_is_that_of_the_file(saved):
    """So that sha256sum checks it too."""
    listed = json.loads((saved / "iter_0000003" / MANIFEST).read_text())["files"]["metadata.json"]
    content = (saved / "iter_0000003/metadata.json").read_bytes()
    assert listed["sha256"] == [hashlib.sha256(content).hexdigest()]


def test_a_manifest_fits_the_last_save(folder, tiny, build_model):
    """Saving over an iteration, with and without a manifest, as after a run that was killed."""
    weights = folder / "iter_0000003"
    (weights / "__9_0.distcp").write_bytes(b"of a larger run")
    save(build_model(tiny), weights)
    assert refusal(folder) is None
    save(build_model(tiny), weights, verify=False)
    assert not (weights / MANIFEST).exists()


def test_megatron_reads_nothing_before_the_check(folder):
    """Neither common state nor weights; and a common state that is none ends in one line."""
    weights = folder / "iter_0000003"
    reads = []

    def load(state, checkpoint_dir, verify_integrity=False):
        reads.append(checkpoint_dir)
        return state

    with (
        Damage(weights / "__0_0.distcp", 5000, bit=1).done(),
        pytest.raises(ValueError, match=r"__0_0\.distcp is not what was saved"),
    ):
        checked_first(load)({}, str(weights), verify_integrity=True)
    assert not reads
    common = checked_first(dist_checkpointing.load_common_state_dict)
    assert common(str(weights))["iteration"] == 3
    torch.save([1], weights / "common.pt")
    with pytest.raises(ValueError, match=r"does not load .its common state names no iteration"):
        common(str(weights))


@pytest.fixture(scope="module")
def two_ranks(data_folder, tmp_path_factory):
    """What two ranks save with the distributed optimizer while training goes on."""
    folder = tmp_path_factory.mktemp("ranks") / "checkpoint"
    train = functools.partial(
        run_train,
        *("--dataset-provider", "spoken_questions", "--data-path", str(data_folder)),
        *("--micro-batch-size", "1", "--global-batch-size", "2", "--use-distributed-optimizer"),
        processes=2,
    )
    layout = ("--tensor-model-parallel-size", "2", "--async-save", "--save-interval", "1")
    done = train(*layout, "--train-iters", "2", "--save", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, train


def test_ranks_write_one_manifest_and_fail_with_one_line(two_ranks):
    folder, train = two_ranks
    for iteration in ("iter_0000001", "iter_0000002"):
        listed = json.loads((folder / iteration / MANIFEST).read_text())["files"]
        there = {path.name for path in (folder / iteration).iterdir()} - {MANIFEST}
        assert set(listed) == there
        assert {"__0_0.distcp", "__1_0.distcp"} < there
    with Damage(folder / "iter_0000002/__0_0.distcp", 70_000, bit=6).done():
        flags = ("--train-iters", "3", "--override-opt_param-scheduler", "--load", str(folder))
        done = train(*flags)
    assert done.returncode == 2
    lines = [line.partition("error: ")[2] for line in done.stderr.splitlines()]
    message = f"--load {folder}: iter_0000002/__0_0.distcp {CHANGED}{REMEDY}"
    assert lines.count(message) == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("avlm_inference.py", ("--prompt", "Which?", "--ckpt")),
        ("evaluate.py", ("--data", "nowhere", "--ckpt")),
        ("serve.py", ("--port", "8731", "--ckpt")),
        ("convert.py", ("to-hf", "--save", "OUT", "--load")),
        ("train.py", ("--train-iters", "1", "--pretrained-checkpoint")),
    ],
)
def test_every_command_that_loads_checks_first(folder, tmp_path, script, flags):
    os.truncate(folder / "iter_0000003/__0_0.distcp", 1_000_000)
    flags = [str(tmp_path / "out") if flag == "OUT" else flag for flag in flags]
    done = run_command(script, *flags, str(folder))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"error: {flags[-1]} {folder}: iter_0000003/__0_0.distcp has 1,000,000 b" in done.stderr
    assert (
        "--no-verify-integrity"
        in run_command(script, *(flags[:1] if script == "convert.py" else ()), "--help").stdout
    )


@pytest.mark.slow
def test_two_hundred_damages_at_every_layout(saved, two_ranks, data_folder, tmp_path):
    """Flips and truncations over all files, and none that is taken for what was saved."""
    folders = [saved, two_ranks[0]]
    sizes = ("--micro-batch-size", "1", "--global-batch-size", "1", "--train-iters", "1")
    four = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    data = ("--dataset-provider", "spoken_questions", "--data-path", str(data_folder))
    for name, layout, processes in (("one", (), 1), ("four", four, 4)):
        for optimizer in ((), ("--use-distributed-optimizer",)):
            folders.append(tmp_path / f"{name}{len(optimizer)}")
            done = run_train(
                *(*sizes, *data, *layout, *optimizer, "--save", str(folders[-1])),
                processes=processes,
            )
            assert done.returncode == 0, done.stderr
    hf, start = tmp_path / "hf", tmp_path / "start"
    for flags in (
        ("to-hf", "--load", saved, "--save", hf),
        ("from-hf", "--model-provider", "tiny_avlm", "--folders", hf, "--save", start),
    ):
        done = run_command("convert.py", *map(str, flags))
        assert done.returncode == 0, done.stderr
    folders.append(start)
    for number, folder in enumerate(folders):
        assert refusal(folder) is None
        for damage in random_damages(folder, count=200, seed=number):
            with damage.done():
                assert refusal(folder), f"{folder}: {damage}"
        assert refusal(folder) is None
