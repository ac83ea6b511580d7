"""A tiny language model for sensor series: the worked example of adding a modality."""

from __future__ import annotations

from examples.mimo.configs.schema import LanguageConfig, MimoConfig, ModalityConfig
from examples.mimo.modalities.base import MLPProjectorConfig
from examples.mimo.modalities.sensor import SensorConfig


def sensor_lm() -> MimoConfig:
    """Series of up to 192 steps of six channels; 16 steps are a token. Everything trains.

    torchrun --nproc-per-node 2 examples/mimo/train.py --model-provider sensor_lm
    --tensor-model-parallel-size 2
    """
    return MimoConfig(
        name="sensor_lm",
        language=LanguageConfig(
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=352,
            num_attention_heads=4,
            num_query_groups=2,
            vocab_size=512,
            seq_length=128,
        ),
        modalities={
            "sensors": ModalityConfig(
                singular="sensor",
                placeholder="<sensor>",
                token_id=4,
                encoder=SensorConfig(
                    num_channels=6,
                    patch_size=16,
                    max_steps=192,
                    num_layers=2,
                    hidden_size=128,
                    num_attention_heads=4,
                    ffn_hidden_size=512,
                ),
                projector=MLPProjectorConfig(ffn_hidden_size=256),
            )
        },
        prompt="What is the sensor doing?",
    )
