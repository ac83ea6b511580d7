from itertools import pairwise

import numpy as np
import pytest
import torch

from examples.mimo.data.batch import ConversationDataset, collate, collate_packed
from examples.mimo.data.conversation import SampleEncoder
from examples.mimo.shards.read import pack


def test_every_sample_is_whole_in_one_sequence():
    lengths = np.random.default_rng(0).integers(1, 101, 500).tolist()
    sequences = pack(lengths, 128)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(500))
    filled = [sum(lengths[i] for i in sequence) for sequence in sequences]
    assert max(filled) <= 128
    assert len(sequences) == -(-sum(lengths) // 128)


def test_the_samples_that_fill_a_sequence_best_are_found():
    assert pack([5, 3, 4, 2, 6], 10) == [[0, 1, 3], [2, 4]]
    # The best fit, the longest first, would put 5 with 4 and need three sequences.
    assert pack([5, 4, 3, 3, 3, 2], 10) == [[0, 2, 5], [1, 3, 4]]
    assert pack([], 10) == []


def test_sequences_are_not_sorted_by_length():
    lengths = [10, 90, 20, 80] * 50
    first = [sequence[0] for sequence in pack(lengths, 100)]
    assert first == sorted(first)


def test_a_sample_longer_than_a_sequence():
    with pytest.raises(ValueError, match="101 tokens does not fit a sequence of 100"):
        pack([7, 101], 100)


def token_losses(model, batch):
    """(B, S) losses of the tokens that carry one."""
    with torch.no_grad():
        losses = model(
            batch.input_ids, batch.labels, batch.modality_inputs, cu_seqlens=batch.cu_seqlens
        )
    return losses * batch.loss_mask


def test_a_sample_has_the_same_loss_in_a_packed_sequence(tiny, tokenizer, data_folder, build_model):
    reader = SampleEncoder(tiny, tokenizer, 128)
    dataset = ConversationDataset(data_folder, "train", reader)
    samples = [dataset[index] for index in range(24)]
    model = build_model(tiny).eval()
    alone = [float(token_losses(model, collate([sample])).sum()) for sample in samples]
    lengths = [len(sample.tokens.ids) for sample in samples]
    sequences = pack(lengths, 256)
    assert any(len(sequence) > 2 for sequence in sequences)
    for sequence in sequences:
        packed = collate_packed([samples[index] for index in sequence], multiple=256)
        assert packed.seq_length == 256
        losses = token_losses(model, packed)[0]
        for index, (start, end) in zip(sequence, pairwise(packed.cu_seqlens), strict=True):
            assert float(losses[start:end].sum()) == pytest.approx(alone[index], rel=1e-5)
