"""Mock data in an order that tells layouts apart."""

from __future__ import annotations

import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.conversation import Sample
from examples.mimo.training.inputs import MockDataset

MOCK_SAMPLES = 160


class TextFirst(torch.utils.data.Dataset[Sample]):
    """Mock samples, of every four the first two without media and the others with some."""

    def __init__(self, config: MimoConfig, seq_length: int, num_samples: int, seed: int) -> None:
        mock = MockDataset(config, seq_length, MOCK_SAMPLES, seed)
        samples = [mock[index] for index in range(MOCK_SAMPLES)]
        self.text = [sample for sample in samples if not sample.media]
        self.with_media = [sample for sample in samples if sample.media]
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Sample:
        kind = self.text if index % 4 < 2 else self.with_media
        return kind[(index // 4 * 2 + index % 2) % len(kind)]
