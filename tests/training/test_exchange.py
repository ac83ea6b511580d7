"""A checkpoint of any layout resumes at any other; loaded and saved again it is bit-identical."""

import json

import pytest
from megatron.core.dist_checkpointing import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader

from tests.helpers import layouts
from tests.helpers.commands import run_train

SAVED_AFTER, ITERATIONS = 3, 6
WHOLE = ("--train-iters", str(ITERATIONS))
# Savers and loaders of one kind of optimizer state; Megatron does not turn one into the other.
EXCHANGES = (
    (
        (
            "TP 2",
            "PP 2, 2 virtual stages",
            "CP 2 x PP 2",
            "TP 2 x PP 2, encoders TP 1",
            "non-colocated: images TP 2, audios 1, language TP 2",
            "non-colocated: encoders 1 + 1, language PP 2",
        ),
        (
            "non-colocated: encoders 1 + 1, language DP 2",
            "non-colocated: encoders DP 2, language 1",
            "PP 4, balanced stages",
            "packed, CP 2",
            "TP 2 x PP 2, sequence parallel",
            "TP 2, encoders TP 1",
        ),
    ),
    (
        (
            "TP 2 x DP 2, distributed optimizer",
            "PP 2 x DP 2, overlap",
            "non-colocated: encoders DP 2, language DP 2, distributed optimizer, overlap",
        ),
        (
            "non-colocated: encoders DP 2, language DP 2, distributed optimizer, overlap",
            "TP 2 x DP 2, encoders TP 1, distributed optimizer, overlap",
            "DP 2, distributed optimizer, overlap",
        ),
    ),
)
LAYOUTS = {layout.name: layout for layout in (layouts.ONE, *layouts.LAYOUTS)}
# These pairs run on every change; the others are slow.
ALWAYS = (
    ("TP 2", "non-colocated: encoders 1 + 1, language DP 2"),
    ("CP 2 x PP 2", "PP 4, balanced stages"),
    ("non-colocated: images TP 2, audios 1, language TP 2", "TP 2 x PP 2, sequence parallel"),
    ("TP 2 x PP 2, encoders TP 1", "packed, CP 2"),
    (
        "non-colocated: encoders DP 2, language DP 2, distributed optimizer, overlap",
        "TP 2 x DP 2, encoders TP 1, distributed optimizer, overlap",
    ),
)
PAIRS = [(saver, loader) for savers, loaders in EXCHANGES for saver in savers for loader in loaders]
assert set(ALWAYS) <= set(PAIRS), "a pair that is not run"
AGAIN = (
    "PP 2, 2 virtual stages",
    "TP 2 x PP 2, encoders TP 1",
    "TP 2 x DP 2, distributed optimizer",
    "non-colocated: encoders DP 2, language DP 2, distributed optimizer, overlap",
)


def train(name, *flags):
    layout = LAYOUTS[name]
    done = run_train(*layouts.COMMON, *layout.flags, *flags, processes=layout.processes)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The weights all runs begin with; random ones differ from layout to layout."""
    folder = layouts.start_checkpoint(tmp_path_factory.mktemp("start"))
    return ("--load", str(folder), "--finetune")


@pytest.fixture(scope="module")
def saved(start, tmp_path_factory):
    """A function from a layout's name to the folder it saved, trained when first asked for."""
    work = tmp_path_factory.mktemp("saved")
    folders = {}

    def save(name):
        if name not in folders:
            folders[name] = work / str(len(folders))
            halfway = ("--save", str(folders[name]), "--exit-interval", str(SAVED_AFTER))
            train(name, *WHOLE, *start, *halfway)
        return folders[name]

    return save


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    metrics = tmp_path_factory.mktemp("uninterrupted") / "metrics.jsonl"
    train(layouts.ONE.name, *WHOLE, *start, "--metrics-file", str(metrics))
    return losses(metrics)


def losses(metrics):
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {row["iteration"]: row["loss"] for row in rows}


@pytest.mark.parametrize(
    ("saver", "loader"),
    [pytest.param(*p, marks=() if p in ALWAYS else pytest.mark.slow) for p in PAIRS],
)
def test_goes_on_at_another_layout(saver, loader, saved, uninterrupted, tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    train(loader, *WHOLE, "--load", str(saved(saver)), "--metrics-file", str(metrics))
    expected = {i: loss for i, loss in uninterrupted.items() if i > SAVED_AFTER}
    assert losses(metrics) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", AGAIN)
def test_loaded_and_saved_again_is_the_same_bytes(name, saved, tmp_path):
    nothing_left = ("--train-iters", str(SAVED_AFTER), "--use-checkpoint-opt_param-scheduler")
    train(name, *nothing_left, "--load", str(saved(name)), "--save", str(tmp_path))
    before, after = contents(saved(name)), contents(tmp_path)
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] != after[key]] == []
    assert any("optimizer.state.exp_avg" in key for key, *_ in before)
    assert any("rng_state" in key for key, *_ in before)


def contents(folder):
    """What a checkpoint holds: name and place in the whole -> bytes."""
    weights = folder / f"iter_{SAVED_AFTER:07d}"
    tensors = {}
    for index, place in FileSystemReader(weights).read_metadata().storage_data.items():
        if index.fqn.startswith("common_state"):
            continue
        with (weights / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            tensors[index.fqn, index.offset, index.index] = file.read(place.length)
    common = load_common_state_dict(weights)
    for key in (
        "iteration",
        "opt_param_scheduler",
        "optimizer",
        "num_floating_point_operations_so_far",
    ):
        tensors[key, None, None] = repr(common[key]).encode()
    return tensors


@pytest.mark.parametrize(
    "optimizer", [(), layouts.DISTRIBUTED_OPTIMIZER], ids=["plain", "distributed optimizer"]
)
def test_tied_embeddings_go_on_at_other_numbers_of_stages(optimizer, tmp_path):
    """A stage that gets its copy of the embedding goes on like the one that saved it."""
    common = (*layouts.COMMON, *layouts.TIED, *optimizer, *WHOLE)

    def run(name, stages, *more):
        metrics = tmp_path / name
        layout = ("--pipeline-model-parallel-size", str(stages), "--metrics-file", str(metrics))
        done = run_train(*common, *layout, *more, processes=stages)
        assert done.returncode == 0, done.stderr
        return losses(metrics)

    folder = layouts.start_checkpoint(tmp_path / "start", layouts.TIED)
    start = ("--load", str(folder), "--finetune")
    expected = run("whole", 1, *start)
    saved = str(tmp_path / "saved")
    run("first", 2, *start, "--save", saved, "--exit-interval", str(SAVED_AFTER))
    expected = {i: loss for i, loss in expected.items() if i > SAVED_AFTER}
    for stages in (1, 4):
        again = run(f"again {stages}", stages, "--load", saved)
        assert again == pytest.approx(expected, rel=1e-6)
