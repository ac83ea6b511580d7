"""Every family computes what transformers computes, at every layout, and comes back bit for bit."""

import pytest
import torch
from safetensors.torch import load_file

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.hf.from_hf import from_hf
from examples.mimo.hf.io import Folder
from examples.mimo.hf.to_hf import to_hf
from tests.helpers import ranks
from tests.hf.cases import CASES

LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))
LANGUAGE = [name for name, case in CASES.items() if case.part == "language"]
BOUND = 1e-5


@pytest.fixture(scope="module")
def work(tmp_path_factory, build_model):
    """All families saved by transformers, converted, and run at every layout."""
    folder = tmp_path_factory.mktemp("parity")
    for name, case in CASES.items():
        case.build().save_pretrained(folder / name / "theirs")
        source = {case.part: Folder(folder / name / "theirs")}
        from_hf(case.config, source, folder / name / "ours", lambda text: None)
    for tp, pp in LAYOUTS:
        flags = (str(folder), str(tp), str(pp))
        done = ranks.run("tests/hf/run_parity.py", *flags, processes=tp * pp)
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_output_is_transformers(work, name, tp):
    assert difference(work, name, tp, 1) <= BOUND


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_output_is_transformers_over_two_stages(work, name):
    assert difference(work, name, 1, 2) <= BOUND


def difference(work, name, tp, pp):
    """The largest one between our output and transformers', which is no constant."""
    case = CASES[name]
    with torch.no_grad():
        expected = case.output(case.build(), case.inputs)
    result = torch.load(work / name / f"output_{tp}_{pp}.pt", weights_only=True)
    if case.part == "language":
        result = result[..., : expected.shape[-1]]
    assert expected.std() > 0.05
    return float((result.reshape(expected.shape) - expected).abs().max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", ["ours", "again"])
def test_the_round_trip_is_bit_equal(work, name, which, tmp_path):
    part = CASES[name].part
    to_hf(open_checkpoint(work / name / which), tmp_path / "back", lambda text: None)
    before = load_file(work / name / "theirs/model.safetensors")
    after = load_file(tmp_path / "back" / part / "model.safetensors")
    roots = ("", "model.encoder.")
    before = {key.removeprefix(roots[1]): tensor for key, tensor in before.items()}
    assert len(after) > 10
    for key, tensor in after.items():
        assert torch.equal(tensor, before[key]), key
        assert tensor.dtype == before[key].dtype
