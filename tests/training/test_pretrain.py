from types import SimpleNamespace

import pytest
import torch

from examples.mimo.data.batch import Batch
from examples.mimo.training import pretrain


@pytest.fixture(autouse=True)
def args(monkeypatch):
    args = SimpleNamespace(curr_iteration=41, check_for_nan_in_loss_and_grad=True)
    monkeypatch.setattr(pretrain, "get_args", lambda: args)
    return args


def batch_with(mask, labels=None):
    mask = torch.tensor(mask, dtype=torch.float32)
    return Batch(
        batch_size=mask.shape[0],
        seq_length=mask.shape[1],
        num_tokens=mask.numel(),
        keys=["a", "b"],
        tensors={"loss_mask": mask} | ({} if labels is None else {"labels": labels}),
    )


def test_only_target_tokens_count():
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    batch = batch_with([[0, 1, 1], [1, 0, 0]])
    total, count, metrics = pretrain.training_loss(batch, losses)
    assert total == 14
    assert count == 3
    assert metrics["lm loss"].tolist() == [14, 3]


def test_padding_may_hold_anything():
    losses = torch.tensor([[1.0, 2.0], [3.0, 1e30]])
    total, count, _ = pretrain.training_loss(batch_with([[1, 1], [1, 0]]), losses)
    assert (total, count) == (6, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_iteration_and_samples(value):
    losses = torch.tensor([[1.0, value], [1.0, 1.0]])
    with pytest.raises(ValueError, match=rf"iteration 42 is {value}; its samples are a, b"):
        pretrain.training_loss(batch_with([[1, 1], [1, 1]]), losses)


def test_megatrons_flag_lets_a_loss_be_nan(args):
    args.check_for_nan_in_loss_and_grad = False
    losses = torch.tensor([[1.0, float("nan")]])
    total, count, _ = pretrain.training_loss(batch_with([[1, 1]]), losses)
    assert total.isnan()
    assert count == 2


def test_exact_match_needs_every_target_of_a_sequence(tiny, build_model):
    stage = build_model(tiny)
    labels = torch.tensor([[3, 4, 5], [3, 4, 5], [3, 4, 5]])
    logits = torch.nn.functional.one_hot(labels, tiny.language.vocab_size).float() * 10
    logits[0, 0] = 0
    logits[0, 0, 9] = 10
    logits[1, 2] = 0
    logits[1, 2, 9] = 10
    batch = batch_with([[0, 1, 1], [0, 1, 1], [0, 0, 0]], labels)
    _, count, metrics = pretrain.evaluation_loss(stage, batch, logits)
    assert count == 4
    assert metrics["exact match"].tolist() == [1, 2]
    exact = torch.nn.functional.cross_entropy(
        logits[:2, 1:].flatten(0, 1), labels[:2, 1:].flatten()
    )
    assert metrics["lm loss"][0] / 4 == pytest.approx(exact.item(), rel=1e-5)
