"""Models beside Transformer Engine, of which a stand-in computes on CPUs.

tests/helpers/engine/ has the constructors and parameters of the real one's version 2.20.2.
"""

import json
import os
import subprocess
import sys

import pytest

from examples.mimo.configs import MODEL_PROVIDERS
from tests.helpers import ranks
from tests.helpers.commands import ROOT

ENGINE = [sys.executable, "-m"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FUSED_LAYERS = {
    "TELayerNormColumnParallelLinear",
    "TERowParallelLinear",
    "TEDotProductAttention",
}
TRAIN = ("--global-batch-size=4", "--train-iters=3")


def run(module, *arguments):
    done = subprocess.run(
        [*ENGINE, f"tests.helpers.{module}", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What a process with Transformer Engine reports; see engine_cases.py."""
    return json.loads(run("engine_cases", tmp_path_factory.mktemp("engine")))


@pytest.mark.parametrize("name", MODEL_PROVIDERS)
def test_parameters_and_checkpoint_keys_are_those_of_local_layers(result, name):
    engine, local = (result["configs"][name][kind] for kind in ("engine", "local"))
    assert engine["parameters"] == local["parameters"]
    assert engine["keys"] == local["keys"]
    assert len(engine["keys"]) > 20
    assert not [key for key in engine["keys"] if "_extra_state" in key]
    assert set(engine["layers"]) >= FUSED_LAYERS
    assert not FUSED_LAYERS & set(local["layers"])


def test_encoders_with_layer_scale_have_local_layers_beside_fused_ones(result):
    assert {"ScaledLinear", "SdpaCoreAttention"} <= set(
        result["configs"]["smollm2_avlm"]["engine"]["layers"]
    )


@pytest.mark.parametrize("states", ["without", "with"])
@pytest.mark.parametrize("direction", ["engine to local", "local to engine"])
def test_a_checkpoint_of_either_kind_is_loaded_by_the_other(result, direction, states):
    case = result["exchange"][f"{direction}, {states} extra states"]
    assert (case["extra states"] > 0) == (states == "with")
    assert case["weights"] == 0
    assert case["losses"] == pytest.approx(case["losses of the other"], rel=1e-5)
    # Padded, then packed.
    assert case["losses"][0] == pytest.approx(case["losses"][1], rel=1e-5)
    assert case["gradients"] < 1e-5


def test_answers_are_those_of_the_layers(result):
    assert result["exchange"]["answers"] < 1e-5


def test_conversion_builds_local_layers(result):
    assert {"SdpaCoreAttention", "RMSNorm"} <= set(result["converted"])
    assert not FUSED_LAYERS & set(result["converted"])


def test_defaults_follow_the_layers_in_use(result):
    fusions = ("apply_rope_fusion", "masked_softmax_fusion", "persist_layer_norm")
    engine = {"transformer_impl": "transformer_engine", **dict.fromkeys(fusions, True)}
    local = {"transformer_impl": "local", **dict.fromkeys(fusions, False)}
    # Projectors and the head are Megatron's own layers, which need Apex for it.
    without_apex = {"gradient_accumulation_fusion": False}
    assert result["flags"][""] == engine | without_apex
    for flags in ("--transformer-impl local", "--transformer-impl=local"):
        assert result["flags"][flags] == local | without_apex


def test_what_needs_fused_layers_or_sequences_of_one_length_is_one_line(result):
    refusals = {flags: values.get("error", "") for flags, values in result["flags"].items()}
    local = refusals["--transformer-impl=local --fp8-format=hybrid"]
    assert local.startswith("--fp8-format needs Transformer Engine's layers: this run's are local")
    assert refusals["--fp8-format=hybrid --bf16"] == ""
    overlap = [text for flags, text in refusals.items() if "--tp-comm-overlap" in flags]
    *variable, packed = sorted(overlap, key=lambda text: "Megatron refuses" in text)
    assert len(variable) == 3
    assert all("needs sequences of one length" in text for text in variable)
    # Packed to --seq-length and without validation, only Megatron still wants something.
    assert "only when sequence parallelism is enabled" in packed


def test_a_run_goes_on_with_the_other_kind_of_layers(tmp_path):
    """Trained and saved with Transformer Engine, resumed without: the next loss is the same."""
    folder, metrics = tmp_path / "engine", tmp_path / "metrics.jsonl"
    train = ("examples/mimo/train.py", *TRAIN, "--metrics-file", metrics)
    run("with_engine", *train, "--save", folder, "--save-interval=2")
    done = ranks.run(*map(str, (*train, "--load", folder, "--ckpt-step=2")))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 3]
    assert rows[3]["loss"] == pytest.approx(rows[2]["loss"], rel=1e-5)


BROKEN = {
    "without its torch part": "try:\n    from . import pytorch\nexcept ImportError:\n    pass\n",
    "without the driver": "raise OSError('libcuda.so.1: cannot open shared object file')\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_an_engine_that_does_not_import_counts_as_none(tmp_path, content):
    """Megatron looks for the package alone in some places, and then imports what it lacks."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"{content}__version__ = '2.20.2'\n")
    code = (
        "from examples.mimo import compat\n"
        "compat.install()\n"
        "import megatron.core.fp8_utils\n"
        "from examples.mimo.model.layers import has_transformer_engine\n"
        "print(has_transformer_engine())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout == "False\n", done.stderr
    assert "Transformer Engine is installed, but does not import" in done.stderr
