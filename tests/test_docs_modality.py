"""The depth.py that docs/modalities.md prints is a modality that reads, refuses and trains."""

import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

from examples.mimo.configs import get_model_config
from examples.mimo.data.batch import collate
from examples.mimo.modalities.files import Blob
from examples.mimo.training.inputs import MockDataset
from tests.helpers.commands import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where depth.py lies, on the path of this process."""
    page = (ROOT / "docs/modalities.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (block,) = (block for block in blocks if "class DepthConfig" in block)
    (tmp_path / "depth.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("depth", None)


def test_maps_of_both_kinds_become_patches(folder):
    encoder = get_model_config("depth:depth_lm").modalities["depth"].encoder
    millimetres = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(millimetres).save(folder / "0.png")
    array = io.BytesIO()
    np.save(array, millimetres)
    for source in (folder / "0.png", Blob("messages[0].content[0]", array.getvalue())):
        inputs = encoder.preprocess(encoder.read(source))
        assert encoder.num_tokens(inputs) == encoder.max_tokens == 16
        # Patches row by row: the second begins eight pixels to the right of the first.
        second = millimetres[:8, 8:16].astype(np.float32) / 1000 - 2
        assert inputs["patches"][0, 1].tolist() == second.ravel().tolist()
    Image.new("I;16", (32, 16)).save(folder / "wrong.png")
    with pytest.raises(ValueError, match=r"shape \(16, 32\), but \(32, 32\) is needed"):
        encoder.read(folder / "wrong.png")


def test_the_model_has_a_loss_and_gradients(folder, build_model):
    config = get_model_config("depth:depth_lm")
    batch = collate([MockDataset(config, 128, 1, seed=0)[0]])
    assert batch.modality_inputs["depth"]["patches"].shape == (1, 16, 64)
    model = build_model(config)
    losses = model(batch.input_ids, batch.labels, batch.modality_inputs)
    assert losses.shape == batch.labels.shape
    (losses * batch.loss_mask).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "depth" in name}
    assert len(gradients) > 20
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
