"""Tiny neural codecs of transformers with random weights, in folders as they are published."""

import math

import torch
from torch import nn
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
)

RATE = 1_200
SIZE = 64  # codes of a codebook
KINDS = ("mimi", "dac", "encodec")
BITS_PER_SECOND = RATE // 20 * math.log2(SIZE)


def write(kind, folder, **changes):
    """Save a codec of four codebooks in `folder`; returns the model."""
    torch.manual_seed(0)
    model = BUILDERS[kind](changes).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("embed_sum", "codebook.embed", "codebook.weight")):
                tensor.normal_()
            elif name.endswith("layer_scale.scale"):
                tensor.normal_(std=0.5)
            elif name.endswith("original0"):  # of a weight norm
                tensor.uniform_(0.7, 1.3)
            elif kind == "dac" and name.endswith("weight"):
                # Of the standard deviation that keeps that of what goes through it.
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif name.endswith("bias"):
                tensor.normal_(std=0.1)
        for layer in model.decoder.modules():
            if kind == "dac" and isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
                layer.weight *= 0.5
    model.save_pretrained(folder)
    return model


def mimi(changes):
    sizes = {
        "hidden_size": 32,
        "num_filters": 4,
        "upsampling_ratios": [4, 3],
        "codebook_dim": 16,
        "num_quantizers": 4,
        "vector_quantization_hidden_dimension": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "upsample_groups": 32,
        "sliding_window": 20,
    }
    return MimiModel(MimiConfig(**sizes | {"sampling_rate": RATE, "codebook_size": SIZE} | changes))


def dac(changes):
    sizes = {
        "encoder_hidden_size": 4,
        "decoder_hidden_size": 32,
        "downsampling_ratios": [2, 5, 4],
        "n_codebooks": 4,
        "codebook_dim": 8,
    }
    return DacModel(DacConfig(**sizes | {"sampling_rate": RATE, "codebook_size": SIZE} | changes))


def encodec(changes):
    sizes = {
        "hidden_size": 16,
        "num_filters": 4,
        "upsampling_ratios": [4, 5],
        "target_bandwidths": [BITS_PER_SECOND * count / 1000 for count in (1, 2, 4)],
    }
    sizes |= {"sampling_rate": RATE, "codebook_size": SIZE}
    return EncodecModel(EncodecConfig(**sizes | changes))


BUILDERS = {"mimi": mimi, "dac": dac, "encodec": encodec}


def encode(kind, model, sound, num_codebooks):
    """(samples,) -> (codebooks, frames) by the model's own method, as its users call it."""
    samples = torch.from_numpy(sound)[None, None]
    with torch.no_grad():
        if kind == "mimi":
            return model.encode(samples, num_quantizers=num_codebooks).audio_codes[0]
        if kind == "dac":
            samples = nn.functional.pad(samples, (0, -len(sound) % model.config.hop_length))
            return model.encode(samples, n_quantizers=num_codebooks).audio_codes[0]
        bandwidth = {1: 0, 2: 1, 4: 2}[num_codebooks]
        bandwidth = model.config.target_bandwidths[bandwidth]
        return model.encode(samples, bandwidth=bandwidth).audio_codes[0, 0]


def decode(kind, model, codes):
    """(codebooks, frames) -> (samples,) by the model's own method."""
    with torch.no_grad():
        if kind == "mimi":
            return model.decode(codes[None]).audio_values[0, 0].numpy()
        if kind == "dac":
            return model.decode(audio_codes=codes[None]).audio_values[0].numpy()
        return model.decode(codes[None, None], [None]).audio_values[0, 0].numpy()
