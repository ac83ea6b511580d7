import dataclasses

import pytest
import torch

from examples.mimo.data.batch import collate, locate
from examples.mimo.data.conversation import Sample, TokenSequence
from examples.mimo.model import parts as parts_file
from examples.mimo.model.parts import MediaCountError, freeze_parts, part_names, parts
from examples.mimo.training.inputs import MockDataset


@pytest.fixture(scope="module")
def model(tiny, build_model):
    torch.manual_seed(0)
    return build_model(tiny)


def batch_of(tiny, media, seed=0):
    """Four mock samples that hold exactly these modalities."""
    dataset = MockDataset(tiny, 128, 400, seed=seed)
    samples = (dataset[i] for i in range(400))
    chosen = [sample for sample in samples if set(sample.media) == set(media)]
    return collate(chosen[:4])


def losses_of(model, batch):
    return model(batch.input_ids, batch.labels, batch.modality_inputs) * batch.loss_mask


def test_media_embeddings_are_at_their_placeholders(tiny, model):
    batch = batch_of(tiny, {"images", "audios"})
    with torch.no_grad():
        sequence = model.embed(batch.input_ids, batch.modality_inputs).transpose(0, 1)
        media = model.encode(batch.modality_inputs)
        for name, modality in tiny.inputs.items():
            assert torch.equal(sequence[batch.input_ids == modality.token_id], media[name])
        text = sum(batch.input_ids == m.token_id for m in tiny.inputs.values()) == 0
        words = model.language_model.embedding.word_embeddings.weight[batch.input_ids[text]]
    assert torch.equal(sequence[text], words)


def test_a_later_token_changes_no_earlier_loss(tiny, model):
    batch = batch_of(tiny, {"images"})
    with torch.no_grad():
        before = model(batch.input_ids, batch.labels, batch.modality_inputs)
        changed = batch.input_ids.clone()
        changed[:, 40] = (changed[:, 40] + 7) % 400 + 50
        kept = (batch.input_ids[:, 40] != 4) & (changed[:, 40] != 4)
        changed[:, 40] = torch.where(kept, changed[:, 40], batch.input_ids[:, 40])
        after = model(changed, batch.labels, batch.modality_inputs)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[kept][:, 40:], after[kept][:, 40:])


@pytest.mark.parametrize("media", [(), ("images",), ("audios",)])
def test_parts_without_input_get_zero_gradients(tiny, model, media):
    model.zero_grad(set_to_none=True)
    losses_of(model, batch_of(tiny, media)).sum().backward()
    for name, module in parts(model).items():
        modality = name.split(".")[0]
        gradients = [parameter.grad for parameter in module.parameters()]
        assert all(gradient is not None for gradient in gradients), name
        used = modality in media or name == "language"
        assert all(bool(gradient.any()) == used for gradient in gradients if gradient.ndim > 1)


def test_gradients_flow_through_frozen_parts(tiny, model, build_model):
    frozen = build_model(tiny)
    frozen.load_state_dict(model.state_dict())
    freeze_parts(frozen, ["language", "images.encoder"])
    batch = batch_of(tiny, {"images", "audios"})
    model.zero_grad(set_to_none=True)
    losses_of(model, batch).sum().backward()
    losses_of(frozen, batch).sum().backward()
    for name in part_names(tiny):
        both = (parts(model)[name].parameters(), parts(frozen)[name].parameters())
        for free, held in zip(*both, strict=True):
            if name in ("language", "images.encoder"):
                assert held.grad is None
            else:
                assert torch.equal(free.grad, held.grad), name


def test_a_wrong_count_names_sample_file_and_both_numbers(tiny, model):
    batch = batch_of(tiny, {"images"})
    short = [i for i in batch.input_ids[0].tolist() if i != 4]
    short += [4] * 15
    tokens = TokenSequence(short, [*short[1:], 0], [0] * len(short))
    pixels = {"pixel_values": torch.zeros(1, 3, 32, 32)}
    sample = Sample("cat-7", tokens, {"images": [pixels]}, {"images": ["photos/cat.png"]})
    batch = collate([sample])
    with pytest.raises(MediaCountError) as error:
        losses_of(model, batch)
    text = error.value.explain(batch.items)
    for part in (
        "images",
        "15 placeholder",
        "16 embeddings",
        "cat-7",
        "photos/cat.png",
        "num_tokens",
    ):
        assert part in text


def test_placeholders_without_media_are_refused(tiny, model):
    batch = batch_of(tiny, {"images", "audios"})
    del batch.tensors["audios.input_features"], batch.tensors["audios.num_frames"]
    with torch.no_grad(), pytest.raises(MediaCountError, match=r"audios: .* returned 0 embeddings"):
        losses_of(model, batch)


def gradients_of(model, losses, weights):
    model.zero_grad(set_to_none=True)
    (losses * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("max_logits", [None, 3 * 512], ids=["whole", "in pieces"])
def test_head_and_loss_on_the_targets_alone_are_the_same(tiny, model, monkeypatch, max_logits):
    batch = batch_of(tiny, {"images"})
    losses = model(batch.input_ids, batch.labels, batch.modality_inputs)
    expected = gradients_of(model, losses, batch.loss_mask)
    is_target = batch.loss_mask.bool()
    if max_logits:
        monkeypatch.setattr(parts_file, "MAX_LOGITS", max_logits)
    sizes = []
    head = model.language_model.output_layer
    handle = head.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    locate(batch, model.special_token_ids)
    result = model(
        batch.input_ids,
        batch.labels,
        batch.modality_inputs,
        placeholders=batch.placeholders,
        target_positions=batch.tensors["target_positions"],
    )
    handle.remove()
    assert sum(sizes) == is_target.sum() < is_target.numel()
    assert max(sizes) <= 3 or not max_logits
    assert result.sum().item() == pytest.approx(losses[is_target].sum().item(), rel=1e-6)
    for name, gradient in gradients_of(model, result, batch.loss_mask).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_no_layer_keeps_queries_keys_and_values_in_one(tiny, model):
    """Attention keeps a copy of the values, not the tensor that all three are views of."""
    config, kept = model.config, set()
    heads = config.num_attention_heads + 2 * config.num_query_groups
    batch = batch_of(tiny, ())
    mixed = batch.input_ids.numel() * heads * config.kv_channels

    def keep(tensor):
        kept.add(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses_of(model, batch)
    assert batch.input_ids.numel() * config.hidden_size in kept
    assert mixed not in kept


def test_encoders_run_in_the_order_of_the_config(tiny, model):
    inputs = batch_of(tiny, {"images", "audios"}).modality_inputs
    for names in (("images", "audios"), ("audios", "images"), ("audios",), ()):
        encoded = model.encode({name: inputs[name] for name in names})
        assert list(encoded) == list(tiny.inputs)
        assert {name for name, media in encoded.items() if len(media)} == set(names)


def test_evaluation_runs_no_encoder_without_input(tiny, model):
    calls = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.modality_submodules.items()
    ]
    model.eval()
    with torch.no_grad():
        losses_of(model, batch_of(tiny, {"audios"}))
    model.train()
    for handle in handles:
        handle.remove()
    assert calls == ["audios"]


def test_a_model_of_text_alone_is_a_gpt(tiny, build_model):
    text_only = build_model(dataclasses.replace(tiny, modalities={}))
    assert set(parts(text_only)) == {"language"}
    batch = batch_of(tiny, ())
    assert losses_of(text_only, batch).sum() > 0
