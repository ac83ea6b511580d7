"""What is set before torch and Megatron are imported: the allocator, attention, the compiler."""

import os
import shutil
import subprocess
import sys

import pytest
from megatron.core.transformer import TransformerConfig

from examples.mimo import compat
from examples.mimo.cli import command
from examples.mimo.model.parts import encoder_transformer_config
from tests.helpers.commands import ROOT

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
CUDA = "import torch; torch.cuda.is_available = lambda: True;"


def run_code(code, **variables):
    """What a new process prints on stdout and stderr, with these variables changed."""
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def environment(monkeypatch):
    """A copy of the environment that `prepare_environment` may change, without its variables."""
    copy = {n: v for n, v in os.environ.items() if n not in (*ALLOCATOR, *command.ENVIRONMENT)}
    monkeypatch.setattr(os, "environ", copy)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return copy


def test_every_command_gets_segments_that_grow_and_flash_attention(environment):
    command.prepare_environment()
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    assert environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"
    # Megatron's condition for CUDA graphs beside such segments.
    assert environment["NCCL_GRAPH_REGISTER"] == "0"


@pytest.mark.parametrize("name", ALLOCATOR)
@pytest.mark.parametrize("value", ["max_split_size_mb:64", ""])
def test_the_users_allocator_stays_by_either_name(environment, name, value):
    environment |= {name: value, "TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}
    command.prepare_environment()
    assert {n: environment.get(n) for n in ALLOCATOR} == dict.fromkeys(ALLOCATOR) | {name: value}
    assert environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "0"


def test_buffers_of_nccl_have_segments_of_their_own(environment, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--use-nccl-ub"])
    command.prepare_environment()
    assert not set(ALLOCATOR) & set(environment)


def test_torch_reads_these_names():
    """A library of torch names each variable; the others would be set for nothing."""
    import torch

    libraries = list((ROOT / torch.__path__[0] / "lib").glob("lib*.so"))
    text = {path.name: path.read_bytes() for path in libraries if path.name.startswith("libc10")}
    assert any(b"PYTORCH_ALLOC_CONF" in library for library in text.values())


@pytest.mark.parametrize("tools", [("gcc",), ("clang",), ("gcc", "clang")])
def test_gcc_or_clang_compiles(tmp_path, monkeypatch, tools):
    for tool in tools:
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compat.missing_for_compiling() is None


def test_the_compiler_of_the_environment_counts_alone(tmp_path, monkeypatch):
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert compat.missing_for_compiling() == "/nowhere/cc ($CC)"
    monkeypatch.setenv("CC", str(tmp_path / "gcc"))
    assert compat.missing_for_compiling() is None


def test_pythons_headers_are_needed_too(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", shutil.which("true"))
    monkeypatch.setattr(compat.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert compat.missing_for_compiling() == str(tmp_path / "Python.h")


COMPILE = (
    "import os; from examples.mimo import compat; entries = compat.install();"
    "print(*[e.attribute for e in entries]);"
    "print('compiled' if torch.compile(compat.disable_compiler) is not compat.disable_compiler"
    " else 'plain')"
)


def test_without_a_compiler_nothing_is_compiled_and_one_line_says_so(tmp_path):
    """With a CUDA device; Megatron would compile while it is imported, and fail at its warm-up."""
    bare = {"PATH": str(tmp_path), "CC": None, "TORCHDYNAMO_DISABLE": None, "RANK": None}
    out, err = run_code(CUDA + COMPILE, **bare)
    assert out.split()[-1] == "plain"
    assert "_apply_rotary_pos_emb_bshd" not in out
    lines = [line for line in err.splitlines() if "missing" in line]
    assert len(lines) == 1
    assert "a C compiler (gcc or clang, or $CC) is missing" in lines[0]


@pytest.mark.parametrize("fused", [True, False])
def test_encoders_fuse_what_the_language_model_does(build_model, fused):
    language = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, bias_dropout_fusion=fused
    )
    sizes = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    assert encoder_transformer_config(language, **sizes).bias_dropout_fusion is fused


ROTARY = """
import torch
from megatron.core.models.common.embeddings import rope_utils
from examples.mimo.compat.megatron import compiled_replacements

plain = rope_utils._apply_rotary_pos_emb_bshd
(compiled,) = [entry.replacement for entry in compiled_replacements()]
worst = [0.0, 0.0]
for length, batch, heads, size in ((7, 2, 3, 8), (12, 1, 4, 8), (33, 3, 1, 16)):
    torch.manual_seed(length)
    angles = torch.randn(length, 1, 1, size)
    results = []
    for function in (plain, compiled):
        torch.manual_seed(0)
        heads_in = torch.randn(length, batch, heads, size + 2, requires_grad=True)
        out = function(heads_in, angles, rotary_interleaved=False)
        out.pow(3).sum().backward()
        results.append((out.detach(), heads_in.grad))
    for n, (ours, theirs) in enumerate(zip(*results)):
        worst[n] = max(worst[n], float((ours - theirs).abs().max() / theirs.abs().max()))
print(*worst)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler needs g++ on CPUs")
def test_compiled_rotary_positions_are_the_plain_ones():
    out, _ = run_code(ROTARY, TORCHDYNAMO_DISABLE=None)
    forward, backward = map(float, out.split()[-2:])
    assert forward < 1e-6
    assert backward < 1e-5
