"""Loading for answers builds the model that training built, without training's code."""

import dataclasses
import functools
import math
import subprocess
import sys

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from examples.mimo.checkpoint.description import Checkpoint
from examples.mimo.checkpoint.loading import (
    check_layout,
    language_transformer_config,
    load_weights,
)
from examples.mimo.cli.arguments import parse_arguments
from examples.mimo.cli.overrides import with_fields
from examples.mimo.configs import MODEL_PROVIDERS, get_model_config
from tests.helpers.commands import ROOT

# How to train: answering leaves these at Megatron's defaults.
TRAINING_FIELDS = {
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
    "inference_sampling_seed",
    # Filled in by the providers of both, where stages exchange sequences.
    "variable_seq_lengths",
}


def plain(value):
    """A value that compares by what it is: partial functions by function and arguments."""
    if isinstance(value, functools.partial):
        return (value.func, value.args, tuple(sorted(value.keywords.items())))
    return value


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", MODEL_PROVIDERS)
def test_the_transformer_config_is_that_of_training(name, bf16, monkeypatch):
    language = get_model_config(name).language
    tp = math.gcd(2, language.num_attention_heads, language.num_query_groups)
    monkeypatch.setenv("WORLD_SIZE", str(2 * tp))
    layout = ("--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", "2")
    args, config = parse_arguments(["--model-provider", name, *layout, *(["--bf16"] * bf16)])
    trained = core_transformer_config_from_args(args)
    loaded = language_transformer_config(config.language, tp, 2, args.params_dtype)
    different = {
        field.name: (plain(getattr(trained, field.name)), plain(getattr(loaded, field.name)))
        for field in dataclasses.fields(TransformerConfig)
        if plain(getattr(trained, field.name)) != plain(getattr(loaded, field.name))
    }
    assert set(different) <= TRAINING_FIELDS, different
    assert loaded.variable_seq_lengths
    assert not language_transformer_config(
        config.language, 1, 1, torch.float32
    ).variable_seq_lengths


@pytest.mark.parametrize(
    ("processes", "tp", "pp", "assignments", "message"),
    [
        (1, 2, 1, [], "--tp 2 x --pp 1 needs 2 processes, but 1 run"),
        (8, 8, 1, [], "language.num_attention_heads 4 is not divisible by --tp 8"),
        (3, 1, 3, [], "language.num_layers 4 is not divisible by --pp 3"),
        (
            2,
            2,
            1,
            ["images.projector.ffn_hidden_size=255"],
            "images.projector.ffn_hidden_size 255 is not divisible by --tp 2",
        ),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_refused(
    tiny, monkeypatch, processes, tp, pp, assignments, message
):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ValueError, match=r"^[-a-z]") as error:
        check_layout(with_fields(tiny, assignments), tp, pp)
    assert message in str(error.value)


def test_answering_loads_neither_training_nor_the_planner():
    code = (
        "import sys, examples.mimo.generation.api\n"
        "rooms = ('planner', 'training', 'cli.arguments', 'shards', 'hf')\n"
        "names = tuple(f'examples.mimo.{room}' for room in rooms)\n"
        "print(sorted(name for name in sys.modules if name.startswith(names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_parts_that_start_afresh_may_be_absent(tiny, build_model, tmp_path):
    weights = tmp_path / "iter_0000001"
    weights.mkdir()
    saved, loaded = build_model(tiny), build_model(tiny)
    for parameter in saved.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = saved.sharded_state_dict(metadata=metadata)
    lacking = {key: value for key, value in state.items() if ".audios." not in key}
    dist_checkpointing.save({"model": lacking}, str(weights))
    checkpoint = Checkpoint(tmp_path, weights, tiny, {})
    with pytest.raises(ValueError, match=r"the checkpoint lacks \d+ tensors, such as .*audios"):
        load_weights(loaded, checkpoint)
    before = {name: value.clone() for name, value in loaded.named_parameters()}
    load_weights(loaded, checkpoint, fresh_parts=["audios.encoder", "audios.projector"])
    for name, value in loaded.named_parameters():
        expected = before[name] if ".audios." in name else torch.full_like(value, 0.5)
        assert torch.equal(value, expected), name
    smaller = build_model(dataclasses.replace(tiny, modalities={}))
    with pytest.raises(ValueError, match="holds, unknown to the model"):
        load_weights(smaller, checkpoint)
