"""Gradients of one CLIP, one Whisper and one Llama are transformers' too."""

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from examples.mimo.checkpoint.description import open_checkpoint
from examples.mimo.checkpoint.loading import load_model
from examples.mimo.hf.from_hf import from_hf
from examples.mimo.hf.io import Folder
from examples.mimo.hf.weights import family_of
from examples.mimo.model.parts import part_config_of, part_prefix, parts
from tests.hf.cases import CASES
from tests.hf.run_parity import encode


@pytest.mark.parametrize("name", ["clip", "whisper_80", "llama"])
def test_gradients_are_transformers(name, tmp_path, build_model):
    case = CASES[name]
    theirs = case.build()
    theirs.save_pretrained(tmp_path / "theirs")
    folder = Folder(tmp_path / "theirs")
    from_hf(case.config, {case.part: folder}, tmp_path / "ours", lambda text: None)
    model = load_model(open_checkpoint(tmp_path / "ours"))

    expected = case.output(theirs, case.inputs)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * weights).mean().backward()
    if case.part == "language":
        result = model(case.inputs["input_ids"])[..., : expected.shape[-1]]
    else:
        result = encode(model, case.part, case.inputs).reshape(expected.shape)
    (result * weights).mean().backward()

    ours = part_config_of(case.config, case.part)
    family = family_of(folder.model_type, ours, "")
    named = dict(theirs.named_parameters())
    names = {n: f for n, f in folder.names(family).items() if f in named}
    mine = gradients_by_key(parts(model)[case.part], part_prefix(case.part))
    compared = 0
    for mapping in family.mappings(ours, folder.hf_config(family)):
        gradient = mine[part_prefix(case.part) + mapping.ours]
        for layer, piece in enumerate(gradient) if mapping.layered else [(None, gradient)]:
            for their_name, mine_back in zip(
                mapping.theirs, mapping.layout.split(piece), strict=True
            ):
                reference = named[names[their_name.format(i=layer)]].grad
                assert (mine_back.reshape(reference.shape) - reference).abs().max() <= 1e-5
                # A bias of the keys has no effect, so its gradient is rounding.
                assert reference.abs().max() > 1e-8 or reference.ndim == 1
                compared += 1
    assert compared >= 30


def gradients_by_key(module, prefix):
    """Checkpoint key -> the gradient as the checkpoint would hold it, layers stacked."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = parameter.grad
    state = {"part": module.sharded_state_dict(prefix=prefix)}
    apply_factories(state)
    whole = {}
    for piece in nested_values(state):
        if isinstance(piece, ShardedTensor):
            if piece.key not in whole:
                whole[piece.key] = torch.zeros(piece.global_shape)
            box = tuple(
                slice(start, start + size)
                for start, size in zip(
                    piece.global_offset,
                    (*[1] * piece.prepend_axis_num, *piece.local_shape),
                    strict=True,
                )
            )
            whole[piece.key][box] = piece.data
    return whole
