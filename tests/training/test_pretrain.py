import pytest
import torch

from examples.mimo.data.batch import Batch, locate
from examples.mimo.training import pretrain


class Losses:
    """An observer of which only the losses are of interest."""

    def __init__(self):
        self.kept = []

    def add_loss(self, loss, keys):
        self.kept.append((loss.item(), keys))


def batch_with(mask, labels=None):
    mask = torch.tensor(mask, dtype=torch.float32)
    batch = Batch(
        batch_size=mask.shape[0],
        seq_length=mask.shape[1],
        num_tokens=mask.numel(),
        keys=["a", "b"],
        tensors={
            "input_ids": torch.zeros(mask.shape, dtype=torch.long),
            "labels": torch.zeros(mask.shape, dtype=torch.long) if labels is None else labels,
            "loss_mask": mask,
        },
    )
    locate(batch, {})
    return batch


def at_targets(batch, values):
    """(B, S, ...) -> (1, n, ...): what the last stage returns of them."""
    return values.transpose(0, 1).flatten(0, 1)[batch.tensors["target_positions"]][None]


def test_target_tokens_are_summed_and_counted():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 1e30]])
    batch, observer = batch_with([[0, 1, 1], [1, 0, 0]]), Losses()
    total, count, metrics = pretrain.training_loss(observer, batch, at_targets(batch, values))
    assert total == 14
    assert count == 3
    assert metrics["lm loss"].tolist() == [14, 3]
    assert observer.kept == [(14.0, ["a", "b"])]


def test_a_batch_may_have_no_target():
    batch = batch_with([[0, 0], [0, 0]])
    losses = at_targets(batch, torch.zeros(2, 2, requires_grad=True))
    total, count, _ = pretrain.training_loss(Losses(), batch, losses)
    assert (total, count) == (0, 0)
    total.backward()


def test_exact_match_needs_every_target_of_a_sequence(tiny, build_model):
    stage = build_model(tiny)
    labels = torch.tensor([[3, 4, 5], [3, 4, 5], [3, 4, 5]])
    logits = torch.nn.functional.one_hot(labels, tiny.vocab_size).float() * 10
    logits[0, 0] = 0
    logits[0, 0, 9] = 10
    logits[1, 2] = 0
    logits[1, 2, 9] = 10
    batch = batch_with([[0, 1, 1], [0, 1, 1], [0, 0, 0]], labels)
    _, count, metrics = pretrain.evaluation_loss(stage, batch, at_targets(batch, logits))
    assert count == 4
    assert metrics["exact match"].tolist() == [1, 2]
    exact = torch.nn.functional.cross_entropy(
        logits[:2, 1:].flatten(0, 1), labels[:2, 1:].flatten()
    )
    assert metrics["lm loss"][0] / 4 == pytest.approx(exact.item(), rel=1e-5)
