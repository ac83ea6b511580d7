"""What a process with the stand-in for Transformer Engine computes, as JSON on stdout.

`python -m tests.helpers.engine_cases FOLDER`; tests/model/test_transformer_engine.py reads it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.helpers import with_engine

with_engine.install()

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.models.mimo import MimoModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from torch._subclasses.fake_tensor import FakeTensorMode

from examples.mimo.checkpoint.description import Checkpoint
from examples.mimo.checkpoint.loading import (
    language_transformer_config,
    load_weights,
    sharding_metadata,
)
from examples.mimo.cli import command
from examples.mimo.cli.arguments import parse_arguments
from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from examples.mimo.configs.schema import MimoConfig
from examples.mimo.data.batch import Batch, collate, collate_packed
from examples.mimo.generation.transformer import CachedTransformer
from examples.mimo.hf import from_hf
from examples.mimo.hf.from_hf import initialize_single_process
from examples.mimo.model.mimo import StageMimoModel, build_mimo_model
from examples.mimo.model.parts import part_names
from examples.mimo.training.inputs import MockDataset

# Local norms have names of their own; in checkpoints they have those of the fused layers.
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
OVERLAP = ("--tp-comm-overlap", "--bf16")
PACKED = ("--dataset-provider=energon", "--data-path=.", "--packing-buffer-size=8")
COMMAND_LINES: list[tuple[str, ...]] = [
    (),
    ("--transformer-impl", "local"),
    ("--transformer-impl=local",),
    ("--transformer-impl=local", "--fp8-format=hybrid"),
    ("--fp8-format=hybrid", "--bf16"),
    OVERLAP,
    (*OVERLAP, *PACKED),
    (*OVERLAP, *PACKED, "--total-seq-length=512", "--seq-length=256"),
    (*OVERLAP, *PACKED, "--eval-iters=1"),
]


def fused(name: str) -> str:
    """A parameter's name as Transformer Engine's layers have it."""
    for local, engine in FUSED.items():
        name = name.replace(local, engine)
    return name


def build(config: MimoConfig, local_layers: bool, initialize: bool = True) -> StageMimoModel:
    """The whole model, of Transformer Engine's layers or of local ones."""
    fields = language_transformer_config(config.language, 1, 1, torch.float32, local_layers)
    fields.perform_initialization = initialize
    return build_mimo_model(config, fields, ProcessGroupCollection.use_mpu_process_groups())


def described(model: StageMimoModel) -> dict[str, Any]:
    """Parameters with shapes, and what a checkpoint holds with its shapes."""
    parameters = {fused(name): list(p.shape) for name, p in model.named_parameters()}
    keys = {
        value.key: [type(value).__name__, list(getattr(value, "global_shape", value.data.shape))]
        for value in model.sharded_state_dict(metadata=sharding_metadata()).values()
        if not isinstance(value, LocalNonpersistentObject)
    }
    kinds = {type(module).__name__ for module in model.modules()}
    return {"parameters": parameters, "keys": keys, "layers": sorted(kinds)}


def with_few_layers(config: MimoConfig) -> MimoConfig:
    """`config` with two layers in the language model and three in each encoder."""
    modalities = dict(config.modalities)
    for name in config.inputs:
        encoder: Any = modalities[name].encoder
        modalities[name] = dataclasses.replace(
            modalities[name], encoder=dataclasses.replace(encoder, num_layers=3)
        )
    language = dataclasses.replace(config.language, num_layers=2)
    return dataclasses.replace(config, language=language, modalities=modalities)


def compare_configs() -> dict[str, Any]:
    """Every config's model twice, without memory and with few layers, which are all alike."""
    result = {}
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    for name in MODEL_PROVIDERS:
        with FakeTensorMode():
            config = with_few_layers(get_model_config(name))
            models = {"engine": build(config, False, False), "local": build(config, True, False)}
            result[name] = {kind: described(model) for kind, model in models.items()}
    return result


def everything(config: MimoConfig) -> MimoConfig:
    """`config` with biases and norms of queries and keys, and LayerScale in its ViT."""
    images: Any = config.modalities["images"]
    encoder = dataclasses.replace(images.encoder, family="dinov2")
    images = dataclasses.replace(images, encoder=encoder)
    language = dataclasses.replace(config.language, qkv_bias=True, qk_norm=True)
    return dataclasses.replace(
        config, language=language, modalities={**config.modalities, "images": images}
    )


def batches(config: MimoConfig) -> list[Batch]:
    """The same samples with text and media, padded and packed."""
    dataset = MockDataset(config, 96, num_samples=3, seed=5)
    samples = [dataset[number] for number in range(3)]
    assert all(any(name in sample.media for sample in samples) for name in config.inputs)
    return [collate(samples), collate_packed(samples)]


def loss_of(model: StageMimoModel, config: MimoConfig) -> tuple[list[float], dict[str, Any]]:
    """The summed loss of each batch, and all gradients."""
    model.zero_grad()
    losses = []
    for batch in batches(config):
        tokens = model(
            batch.tensors["input_ids"],
            batch.tensors["labels"],
            batch.modality_inputs,
            batch.cu_seqlens,
        )
        losses.append((tokens * batch.tensors["loss_mask"]).sum())
        losses[-1].backward()
    gradients = {fused(name): parameter.grad for name, parameter in model.named_parameters()}
    return [loss.item() for loss in losses], gradients


def difference(values: dict[str, Any], others: dict[str, Any]) -> float:
    """The largest of any element, relative to the largest element of its tensor."""
    assert values.keys() == others.keys()
    pairs = [(value, others[name]) for name, value in values.items()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-20)) for a, b in pairs)


def exchange_checkpoints(folder: Path) -> dict[str, Any]:
    """Each kind's checkpoint loaded into the other; losses, and differences from the other's."""
    config = everything(get_model_config("tiny_avlm"))
    result: dict[str, Any] = {}
    models = {kind: build(config, kind == "local") for kind in ("engine", "local")}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in models["engine"].parameters():  # biases and norms that do something
            parameter += 0.1 * torch.randn_like(parameter)
    for saved, loaded in (("engine", "local"), ("local", "engine")):
        # Megatron's own state holds the empty extra states, as older checkpoints do.
        for states, kind in (("without", StageMimoModel), ("with", MimoModel)):
            weights = folder / f"{saved}-{states}" / "iter_0000001"
            weights.mkdir(parents=True)
            state = kind.sharded_state_dict(models[saved], metadata=sharding_metadata())
            held = sum(isinstance(value, ShardedObject) for value in state.values())
            dist_checkpointing.save({"model": state}, str(weights))
            for parameter in models[loaded].parameters():
                torch.nn.init.zeros_(parameter)
            load_weights(models[loaded], Checkpoint(weights.parent, weights, config, {}))
            (losses, gradients), (others, other_gradients) = (
                loss_of(models[name], config) for name in (saved, loaded)
            )
            weights_of = {
                name: {fused(key): value for key, value in model.named_parameters()}
                for name, model in models.items()
            }
            result[f"{saved} to {loaded}, {states} extra states"] = {
                "extra states": held,
                "losses": losses,
                "losses of the other": others,
                "weights": difference(weights_of[saved], weights_of[loaded]),
                "gradients": difference(gradients, other_gradients),
            }
    result["answers"] = answers(models["engine"], config)
    return result


@torch.no_grad()
def answers(model: StageMimoModel, config: MimoConfig) -> float:
    """How far logits from the key/value cache are from those of the engine's own layers."""
    ids = torch.randint(6, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    model.eval()
    transformer = CachedTransformer(model)
    cache = transformer.new_cache()
    cache.reserve(2, 20)
    embedded = model.embed(ids, {}).transpose(0, 1)
    parts = [(0, 12), *((at, at + 1) for at in range(12, 20))]
    hidden = [transformer.forward(embedded[:, a:b], cache, 0, [a] * 2) for a, b in parts]
    logits = transformer.logits(torch.cat(hidden, dim=1).flatten(0, -2))
    expected = model(ids).flatten(0, 1)
    return float((logits - expected).abs().max() / expected.abs().max())


def converted() -> list[str]:
    """The kinds of layers that a conversion builds, of a part each."""
    config = everything(get_model_config("tiny_avlm"))
    kinds = set()
    build_part = from_hf.build_part

    def build_and_note(*arguments: Any) -> torch.nn.Module:
        part = build_part(*arguments)
        kinds.update(type(module).__name__ for module in part.modules())
        return part

    from_hf.build_part = build_and_note
    objects = [from_hf.sharded_state(config, part, "meta")[1] for part in part_names(config)]
    assert not any(objects)
    return sorted(kinds)


def parsed(*flags: str) -> dict[str, Any]:
    """What the command line makes of the fields that follow the layers, or the refusal."""
    try:
        args, _ = parse_arguments(flags)
    except ValueError as error:
        return {"error": str(error)}
    fields = ("transformer_impl", "gradient_accumulation_fusion", "apply_rope_fusion")
    values = {name: getattr(args, name) for name in (*fields, "masked_softmax_fusion")}
    return {**values, "persist_layer_norm": not args.no_persist_layer_norm}


def main() -> None:
    """Print all results."""
    initialize_single_process(1)
    with command.stdout_to(os.devnull):  # Megatron prints its arguments
        result = {
            "exchange": exchange_checkpoints(Path(sys.argv[1])),
            "converted": converted(),
            "configs": compare_configs(),
            "flags": {" ".join(flags): parsed(*flags) for flags in COMMAND_LINES},
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
