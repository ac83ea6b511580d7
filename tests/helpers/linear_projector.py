"""A model whose projector is its author's own: one linear layer, in a file of its own."""

import dataclasses
from dataclasses import dataclass

import torch

from examples.mimo.configs.schema import MimoConfig
from examples.mimo.configs.sensor_lm import sensor_lm
from examples.mimo.modalities.base import ProjectorConfig


@dataclass(frozen=True)
class LinearProjectorConfig(ProjectorConfig):
    def build(self, input_size, transformer_config, pg_collection):
        return torch.nn.Linear(input_size, transformer_config.hidden_size)

    def flops(self, input_size, output_size):
        return 2 * input_size * output_size


def linear_sensor_lm() -> MimoConfig:
    config = sensor_lm()
    sensors = dataclasses.replace(config.modalities["sensors"], projector=LinearProjectorConfig())
    return dataclasses.replace(config, modalities={"sensors": sensors})
