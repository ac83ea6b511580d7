"""The run observer: errors it explains, and the phase it reports for a lost rank."""

from types import SimpleNamespace

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingException

from examples.mimo.cli.observer import RunObserver
from examples.mimo.cli.output import end_last_line


@pytest.fixture
def observer(tiny):
    args = SimpleNamespace(curr_iteration=6, load="folder", pretrained_checkpoint=None)
    return RunObserver(args, tiny)


def explained(observer, error):
    """The line that ends the command, or the error itself if nothing explains it."""
    try:
        with observer.explains_errors():
            raise error
    except ValueError as explanation:
        return str(explanation)
    except Exception as same:
        return same


def test_a_lost_rank_is_reported_with_the_phase(observer):
    observer.enter("iteration {iteration}, computing")
    line = explained(observer, RuntimeError("gloo: Connection closed by peer [127.0.0.1]"))
    assert line.startswith("lost another rank in: iteration 7, computing (Connection closed by ")


def test_a_damaged_checkpoint_names_the_folder_while_weights_load(observer):
    error = CheckpointingException("shape mismatch\nand more")
    assert explained(observer, error) == "--load folder: damaged or unfit (shape mismatch)"
    observer.model_is_built = True
    assert explained(observer, error) is error


def test_a_missing_package_is_named(observer):
    assert explained(observer, ImportError("no module wandb")).endswith("flags: no module wandb")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AssertionError("a bug")])
def test_other_errors_pass_unchanged(observer, error):
    assert explained(observer, error) is error


@pytest.mark.parametrize(
    ("before", "after"), [(b"", b""), (b"a\n", b"a\n"), (b'a\n{"iter', b'a\n{"iter\n')]
)
def test_a_line_that_a_kill_has_cut_off_is_ended(tmp_path, before, after):
    file = tmp_path / "metrics"
    file.write_bytes(before)
    end_last_line(file)
    assert file.read_bytes() == after
    end_last_line(tmp_path / "none")
    assert not (tmp_path / "none").exists()
