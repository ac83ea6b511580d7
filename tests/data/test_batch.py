import dataclasses

import pytest
import torch

from examples.mimo.data.batch import ConversationDataset, collate, collate_packed
from examples.mimo.data.conversation import BadSample, Sample, SampleEncoder, TokenSequence
from examples.mimo.parallel.placement import join_batches
from examples.mimo.training.inputs import MockDataset


def test_collate_pads_without_loss_and_keeps_media_in_order(tiny):
    samples = [MockDataset(tiny, 128, 6, seed=0)[i] for i in range(6)]
    batch = collate(samples, multiple=8)
    assert batch.seq_length % 8 == 0
    assert batch.num_tokens == sum(len(s.tokens.ids) for s in samples)
    for row, sample in enumerate(samples):
        length = len(sample.tokens.ids)
        assert batch.input_ids[row, :length].tolist() == sample.tokens.ids
        assert batch.loss_mask[row, length:].sum() == 0
        assert batch.loss_mask[row].sum() == sum(sample.tokens.loss_mask)
    pixels = [item["pixel_values"] for s in samples for item in s.media.get("images", [])]
    assert torch.equal(batch.modality_inputs["images"]["pixel_values"], torch.cat(pixels))


def test_collate_packed_puts_samples_end_to_end(tiny):
    samples = [MockDataset(tiny, 128, 6, seed=0)[i] for i in range(6)]
    batch = collate_packed(samples, multiple=16, sample_multiple=4)
    assert (batch.batch_size, len(batch.cu_seqlens)) == (1, 7)
    assert batch.cu_seqlens[-1] == batch.seq_length
    assert batch.seq_length % 16 == 0
    for start, end, sample in zip(batch.cu_seqlens, batch.cu_seqlens[1:], samples, strict=False):
        length = len(sample.tokens.ids)
        assert start % 4 == 0
        assert batch.input_ids[0, start : start + length].tolist() == sample.tokens.ids
        assert batch.labels[0, start : start + length].tolist() == sample.tokens.labels
        assert batch.loss_mask[0, start : start + length].tolist() == sample.tokens.loss_mask
        assert batch.loss_mask[0, start + length : end].sum() == 0
    assert batch.seq_length - batch.num_tokens < 6 * 3 + 16
    padded = collate(samples)
    assert batch.items == padded.items
    pixels = [b.modality_inputs["images"]["pixel_values"] for b in (batch, padded)]
    assert torch.equal(*pixels)


def test_mock_samples_mix_media_and_fit(tiny):
    dataset = MockDataset(tiny, 96, 200, seed=3)
    samples = [dataset[i] for i in range(200)]
    assert {tuple(sorted(s.media)) for s in samples} == {
        (),
        ("audios",),
        ("images",),
        ("audios", "images"),
    }
    assert all(48 <= len(s.tokens.ids) <= 96 for s in samples)
    for sample in samples:
        for name, modality in tiny.inputs.items():
            counted = sum(modality.encoder.num_tokens(i) for i in sample.media.get(name, []))
            assert sample.tokens.ids.count(modality.token_id) == counted


def test_mock_samples_repeat(tiny):
    first, again = (MockDataset(tiny, 64, 5, seed=1)[4] for _ in range(2))
    assert first.tokens == again.tokens


def test_every_epoch_holds_every_sample_once_in_another_order(tiny, tokenizer, data_folder):
    encoder = SampleEncoder(tiny, tokenizer, 128)
    dataset = ConversationDataset(data_folder, "train", encoder, 600, seed=5, shuffle=True)
    epochs = [[dataset.line(e * 200 + i) for i in range(200)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(200))
    assert epochs[0] != epochs[1]
    assert [dataset.line(i) for i in (3, 203, 3)][::2] == [epochs[0][3]] * 2
    assert dataset[3].key == dataset.records[epochs[0][3]]["key"]


def test_augmentation_is_a_function_of_the_index(tiny, tokenizer, data_folder):
    encoder = SampleEncoder(tiny, tokenizer, 128, augment=True)
    dataset = ConversationDataset(data_folder, "heldout", encoder, 4000, seed=5)

    def pixels(index):
        return dataset[index].media["images"][0]["pixel_values"]

    assert torch.equal(pixels(1), pixels(1))
    lines = len(dataset.records)
    assert not torch.equal(pixels(1), pixels(1 + lines))


def test_a_batch_is_flat_and_reads_nested(tiny):
    batch = collate([MockDataset(tiny, 128, 6, seed=0)[i] for i in range(6)])
    assert list(batch.tensors)[:3] == ["input_ids", "labels", "loss_mask"]
    assert {"images.pixel_values", "audios.input_features"} <= set(batch.tensors)
    assert batch.labels is batch.tensors["labels"]
    assert batch.modality_inputs["images"]["pixel_values"] is batch.tensors["images.pixel_values"]


def same(first, second):
    """Whether two batches hold the same."""
    assert list(first.tensors) == list(second.tensors)
    assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
    values = [{**vars(batch), "tensors": None} for batch in (first, second)]
    assert values[0] == values[1]


def test_joined_batches_are_what_collating_all_samples_gives(tiny):
    samples = [MockDataset(tiny, 128, 6, seed=2)[i] for i in range(6)]
    samples[1] = dataclasses.replace(samples[1], skipped=(BadSample("b", "no such file"),))
    same(join_batches([collate(samples[:2]), collate(samples[2:])]), collate(samples))
    packed = [collate_packed(part, 8, 4) for part in (samples[:1], samples[1:4], samples[4:])]
    joined = join_batches(packed)
    assert joined.batch_size == 1
    assert joined.cu_seqlens[-1] == joined.seq_length == sum(batch.seq_length for batch in packed)
    assert joined.cu_seqlens[1] == packed[0].seq_length
    assert torch.equal(joined.input_ids, torch.cat([b.input_ids for b in packed], dim=1))
    assert joined.bad_samples == [BadSample("b", "no such file")]


def sample_with(key, **inputs):
    """A sample with one item of the modality `images`."""
    tokens = TokenSequence([4], [0], [0])
    return Sample(key, tokens, {"images": [inputs]}, {"images": [f"{key}.png"]})


@pytest.mark.parametrize("other", [(1, 3, 32, 40), (2, 3, 32), (1, 1, 32, 32)])
def test_inputs_of_unequal_shape_are_named(other):
    first, second = torch.zeros(2, 3, 32, 32), torch.zeros(other)
    samples = [sample_with("a", pixels=first), sample_with("b", pixels=second)]
    with pytest.raises(ValueError, match=r"images\.pixels has the shape") as error:
        collate(samples)
    for part in ("sample b, b.png", "sample a, a.png", str(other), "(2, 3, 32, 32)"):
        assert part in str(error.value)


def test_an_input_that_not_every_item_has_is_named():
    samples = [sample_with("a", pixels=torch.zeros(1)), sample_with("b", depth=torch.zeros(1))]
    with pytest.raises(ValueError, match=r"images.pixels: 1 of 2 items of this batch have it"):
        collate(samples)


def test_items_may_differ_in_their_number_of_inputs():
    samples = [sample_with(str(n), pixels=torch.full((n, 2), float(n))) for n in (1, 3)]
    pixels = collate(samples).tensors["images.pixels"]
    assert pixels[:, 0].tolist() == [1, 3, 3, 3]
