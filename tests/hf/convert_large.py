"""Run by test_memory.py: convert_large.py make|convert FOLDER; a 1.5B-parameter language model."""

import dataclasses
import json
import resource
import sys
from pathlib import Path

from examples.mimo import compat
from examples.mimo.cli import command

command.prepare_environment()
compat.install()

import torch
from safetensors.torch import save_file

from examples.mimo.configs import get_model_config
from examples.mimo.configs.schema import LanguageConfig
from examples.mimo.hf.from_hf import from_hf, initialize_single_process
from examples.mimo.hf.io import Folder
from examples.mimo.hf.weights import family_for_export

LANGUAGE = LanguageConfig(
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    num_query_groups=2,
    vocab_size=151936,
    seq_length=4096,
    tie_embeddings=True,
    qkv_bias=True,
)


def make(folder):
    """Shards of seven layers each, as Qwen2.5-1.5B would be stored, of zeros."""
    family = family_for_export(LANGUAGE)
    theirs = family.config(LANGUAGE)
    theirs.save_pretrained(folder)
    shapes = {
        "embed": (LANGUAGE.vocab_size, LANGUAGE.hidden_size),
        "linear_qkv.weight": (
            LANGUAGE.query_projection_size + 2 * LANGUAGE.kv_projection_size,
            LANGUAGE.hidden_size,
        ),
        "linear_qkv.bias": (LANGUAGE.query_projection_size + 2 * LANGUAGE.kv_projection_size,),
        "linear_proj.weight": (LANGUAGE.hidden_size, LANGUAGE.query_projection_size),
        "linear_fc1.weight": (2 * LANGUAGE.ffn_hidden_size, LANGUAGE.hidden_size),
        "linear_fc2.weight": (LANGUAGE.hidden_size, LANGUAGE.ffn_hidden_size),
        "norm": (LANGUAGE.hidden_size,),
    }
    where = {}
    for first in range(0, LANGUAGE.num_layers, 7):
        shard = {}
        for mapping in family.mappings(LANGUAGE, theirs):
            shape = next(s for name, s in shapes.items() if name in mapping.ours)
            layers = range(first, first + 7) if mapping.layered else [None] * (first == 0)
            for layer in layers:
                pieces = mapping.layout.split(torch.zeros(shape, dtype=torch.bfloat16))
                names = [name.format(i=layer) for name in mapping.theirs]
                shard |= dict(zip(names, (p.clone() for p in pieces), strict=True))
        file = f"model-{first:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def convert_folder(folder):
    config = dataclasses.replace(get_model_config("tiny_avlm"), language=LANGUAGE, modalities={})
    initialize_single_process(0)
    from_hf(config, {"language": Folder(folder)}, folder / "ours", lambda text: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    {"make": make, "convert": convert_folder}[sys.argv[1]](Path(sys.argv[2]))
    command.leave_process_group()
