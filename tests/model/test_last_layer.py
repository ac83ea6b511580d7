"""The last layer's MLP leaves out positions without loss, and nothing else changes."""

import pytest
import torch

from examples.mimo.data.batch import collate, locate
from examples.mimo.model.parts import LastLayer
from examples.mimo.training.inputs import MockDataset


def batch_of(config, has_targets):
    samples = [MockDataset(config, 64, 3, seed=5)[number] for number in range(3)]
    batch = collate(samples)
    if not has_targets:
        batch.tensors["loss_mask"].zero_()
    locate(batch, {name: modality.token_id for name, modality in config.inputs.items()})
    return batch


def losses_and_gradients(model, batch):
    model.zero_grad()
    losses = model(
        input_ids=batch.input_ids,
        labels=batch.labels,
        modality_inputs=batch.modality_inputs,
        placeholders=batch.placeholders,
        target_positions=batch.tensors["target_positions"],
    )
    losses.sum().backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("has_targets", [True, False])
def test_losses_and_gradients_are_those_of_a_whole_layer(tiny, build_model, has_targets):
    model, batch = build_model(tiny), batch_of(tiny, has_targets)
    *whole, last = model.language_model.decoder.layers
    assert isinstance(last, LastLayer)
    assert not any(isinstance(layer, LastLayer) for layer in whole)
    rows = []
    last.mlp.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:2]))
    losses, gradients = losses_and_gradients(model, batch)
    whole_batch = (batch.seq_length, 3)
    assert rows == [(batch.labels.shape[1], 1) if has_targets else whole_batch]
    last.__class__ = LastLayer.__mro__[1]
    expected, expected_gradients = losses_and_gradients(model, batch)
    assert rows[1:] == [whole_batch]
    assert losses.shape == expected.shape
    assert torch.allclose(losses, expected, rtol=0, atol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 1e-5, name


def test_logits_of_all_positions_when_no_positions_are_named(tiny, build_model):
    model, batch = build_model(tiny).eval(), batch_of(tiny, True)
    losses_and_gradients(model, batch)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, modality_inputs=batch.modality_inputs)
    assert logits.shape[:2] == batch.input_ids.shape
