import torch

from examples.mimo.data.batch import collate, collate_packed
from examples.mimo.data.conversation import SampleReader
from examples.mimo.data.datasets import ConversationDataset, MockDataset


def test_rows_are_padded_without_loss_and_media_kept_in_order(tiny):
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


def test_packed_samples_follow_one_another(tiny):
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
    rows = collate(samples)
    assert batch.items == rows.items
    pixels = [b.modality_inputs["images"]["pixel_values"] for b in (batch, rows)]
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
        for name, modality in tiny.modalities.items():
            counted = sum(modality.encoder.num_tokens(i) for i in sample.media.get(name, []))
            assert sample.tokens.ids.count(modality.token_id) == counted


def test_mock_samples_repeat(tiny):
    first, again = (MockDataset(tiny, 64, 5, seed=1)[4] for _ in range(2))
    assert first.tokens == again.tokens


def test_every_epoch_holds_every_sample_once_in_another_order(tiny, tokenizer, data_folder):
    reader = SampleReader(tiny, tokenizer, 128)
    dataset = ConversationDataset(data_folder, "train", reader, 600, seed=5, shuffle=True)
    epochs = [[dataset.record(e * 200 + i)["key"] for i in range(200)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert [dataset.record(i)["key"] for i in (3, 203, 3)][::2] == [epochs[0][3]] * 2


def test_augmentation_is_a_function_of_the_index(tiny, tokenizer, data_folder):
    reader = SampleReader(tiny, tokenizer, 128, augment=True)
    dataset = ConversationDataset(data_folder, "heldout", reader, 4000, seed=5)

    def pixels(index):
        return dataset[index].media["images"][0]["pixel_values"]

    assert torch.equal(pixels(1), pixels(1))
    lines = len(dataset.records)
    assert not torch.equal(pixels(1), pixels(1 + lines))
