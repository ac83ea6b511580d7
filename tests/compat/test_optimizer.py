"""The optimizer without Apex and Transformer Engine: its arithmetic, its checkpoints, its waits."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as base_optimizer
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from megatron.training.utils import common_utils
from torch.utils._python_dispatch import TorchDispatchMode

from examples.mimo.cli.arguments import parse_arguments
from examples.mimo.compat.kernels import (
    GroupStepAdam,
    copy_tensors,
    l2_norm,
    optimizer_replacements,
    scale_tensors,
)

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
SHAPES = ((5, 3), (7,), (2, 3, 4), (129, 33))
NOT_STARTED = torch.zeros(1, dtype=torch.int)


class Waits(TorchDispatchMode):
    """Counts the numbers that the host reads from a tensor; on a GPU it waits for each."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def foreach_adam(params, state, step, lr, betas, weight_decay, adam_w_mode, eps=1e-8):
    """Adam in foreach operations, as this package computed it until its kernels were fused."""
    first, second = ([state[key][n] for n in range(len(params))] for key in ("first", "second"))
    grads, (beta1, beta2) = [p.grad.to(p.dtype) for p in params], betas
    if weight_decay and adam_w_mode:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    elif weight_decay:
        grads = list(torch._foreach_add(grads, params, alpha=weight_decay))
    torch._foreach_lerp_(first, grads, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(params, first, denominator, -lr / (1 - beta1**step))


def random_params():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def set_gradients(params, dtype=torch.float32):
    for param in params:
        # As 16-bit numbers, which torch lets no fp32 parameter keep as its gradient.
        param.grad = torch.randn(param.shape).to(dtype).float()


def relative_difference(tensors, expected):
    pairs = zip(tensors, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adam_w_mode", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_twenty_fused_steps_are_those_of_the_formula(weight_decay, adam_w_mode, dtype):
    """With a new optimizer in the middle, which gets the first one's state as a checkpoint does."""
    settings = {**SETTINGS, "weight_decay": weight_decay, "adam_w_mode": adam_w_mode}
    expected, params = random_params(), random_params()
    state = {key: [torch.zeros_like(p) for p in expected] for key in ("first", "second")}
    adam = GroupStepAdam(params, **settings)
    for step in range(1, 21):
        if step == 11:
            saved = copy.deepcopy(adam.state_dict())
            adam = GroupStepAdam(params, **settings)
            adam.load_state_dict(saved)
        torch.manual_seed(step)
        set_gradients(expected, dtype)
        for param, other in zip(params, expected, strict=True):
            param.grad = other.grad.clone()
        with torch.no_grad():
            foreach_adam(expected, state, step, **settings)
        adam.step()
    assert relative_difference(params, expected) < 1e-6
    for key, name in (("first", "exp_avg"), ("second", "exp_avg_sq")):
        assert relative_difference([adam.state[p][name] for p in params], state[key]) < 1e-6


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_adam_is_torchs(adam_w_mode):
    torchs = torch.optim.AdamW if adam_w_mode else torch.optim.Adam
    expected, params = random_params(), random_params()
    theirs = torchs(expected, **SETTINGS)
    ours = GroupStepAdam(params, **SETTINGS, adam_w_mode=adam_w_mode)
    for _ in range(7):
        set_gradients(expected)
        for param, other in zip(params, expected, strict=True):
            param.grad = other.grad.clone()
        theirs.step()
        ours.step()
    assert relative_difference(params, expected) < 1e-6


def test_checkpoints_of_earlier_versions_resume():
    """A group has its step as an int, a parameter its two averages, and nothing else is there."""
    params = random_params()
    adam = GroupStepAdam(params, **SETTINGS)
    saved = adam.state_dict()
    saved["param_groups"][0]["step"] = 300
    averages = [(torch.randn_like(p), torch.rand_like(p)) for p in params]
    saved["state"] = {
        n: {"exp_avg": first.clone(), "exp_avg_sq": second.clone()}
        for n, (first, second) in enumerate(averages)
    }
    adam.load_state_dict(saved)
    expected = [p.detach().clone() for p in params]
    set_gradients(params)
    for value, param in zip(expected, params, strict=True):
        value.grad = param.grad.clone()
    state = {
        "first": [first for first, _ in averages],
        "second": [second for _, second in averages],
    }
    foreach_adam(expected, state, 301, **SETTINGS, adam_w_mode=True)
    adam.step()
    assert relative_difference(params, expected) < 1e-6
    again = adam.state_dict()
    assert again["param_groups"][0]["step"] == 301
    assert {type(again["param_groups"][0]["step"])} == {int}
    assert {key for state in again["state"].values() for key in state} == {"exp_avg", "exp_avg_sq"}


def test_parameters_of_two_data_types_and_without_gradients():
    params = [torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.bfloat16)]
    untouched = torch.nn.Parameter(torch.ones(3))
    adam = GroupStepAdam([*params, untouched], lr=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        with Operations() as operations, Waits() as waits:
            adam.step()
    assert operations.names.count("aten::_fused_adamw_") == 2
    # A step of the host's would have to be copied.
    assert not {"aten::_foreach_sqrt", "aten::copy_"} & set(operations.names)
    assert waits.count == 0
    assert [round(float(p[0].detach()), 1) for p in params] == [0.8, 0.8]
    assert untouched.tolist() == [1.0] * 3
    assert adam.param_groups[0]["step"] == 2


def test_the_fused_step_is_no_slower():
    """Against the foreach formula in the same process; it is three times as fast."""
    shapes = [(256, 256)] * 20 + [(256,)] * 40
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    set_gradients(params)
    adam = GroupStepAdam(params, **SETTINGS)
    state = {key: [torch.zeros_like(p) for p in params] for key in ("first", "second")}

    def seconds(step):
        start = time.perf_counter()
        with torch.no_grad():
            step()
        return time.perf_counter() - start

    def foreach():
        foreach_adam(params, state, 5, **SETTINGS, adam_w_mode=True)

    seconds(adam.step)
    fused, formula = (min(seconds(step) for _ in range(15)) for step in (adam.step, foreach))
    assert fused < formula


@pytest.fixture
def in_place(build_model, monkeypatch):
    """Megatron with the entries for the optimizer, for one test; a world of one process."""
    for entry in optimizer_replacements():
        monkeypatch.setattr(entry.owner, entry.attribute, entry.replacement)


def random_gradients(dtype=torch.float32):
    torch.manual_seed(1)
    return [torch.randn(shape).to(dtype) for shape in SHAPES * 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_megatrons(dtype):
    gradients = random_gradients(dtype)
    lists = [gradients[:30], gradients[30:]]
    expected = torch.cat([g.flatten() for g in gradients]).double().norm()
    result, _ = l2_norm(1, NOT_STARTED, lists, False)
    assert (result.shape, result.dtype) == ((1,), torch.float32)
    assert abs(float(result) / float(expected) - 1) < 1e-6
    if dtype == torch.float32:
        theirs, _ = local_multi_tensor_l2_norm(1, NOT_STARTED, [gradients], False)
        assert abs(float(result) / float(theirs) - 1) < 1e-6
    assert l2_norm(1, NOT_STARTED, [[]], False)[0].tolist() == [0.0]


def test_the_norm_and_clipping_wait_once(in_place):
    parameters = [torch.nn.Parameter(g) for g in random_gradients()]
    for parameter, gradient in zip(parameters, random_gradients(), strict=True):
        parameter.grad = gradient
    gradients = [p.grad for p in parameters]
    expected = float(torch.cat([g.flatten() for g in gradients]).norm())
    with Waits() as waits:
        norm = clip_grads.get_grad_norm_fp32(gradients)
        clip_grads.clip_grad_by_total_norm_fp32(parameters, 1.0, norm)
    assert norm == pytest.approx(expected, rel=1e-6)
    assert waits.count == 1
    clipped = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert float(clipped) == pytest.approx(1.0, rel=1e-4)
    with Waits() as waits:
        common_utils.multi_tensor_applier(
            common_utils.multi_tensor_l2norm, NOT_STARTED, [gradients], False
        )
    assert waits.count == 0


@pytest.mark.parametrize("target_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_scaling_is_megatrons_to_the_bit(scale, target_dtype):
    """In place, which is how gradients are clipped, or into other tensors."""
    results = []
    for scales in (local_multi_tensor_scale, scale_tensors):
        sources = random_gradients()
        targets = sources
        if target_dtype is not None:
            targets = [torch.empty_like(g, dtype=target_dtype) for g in sources]
        scales(1, NOT_STARTED, [sources, targets], scale)
        results.append(targets)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    scale_tensors(1, NOT_STARTED, [[], []], scale)


@pytest.mark.parametrize("overflow", [None, torch.ones(1, dtype=torch.int)])
def test_main_parameters_are_copied_by_one_operation(in_place, overflow):
    main = random_gradients()
    model = [torch.empty_like(p, dtype=torch.bfloat16) for p in main]
    with Operations() as operations:
        base_optimizer._multi_tensor_copy_this_to_that(main, model, overflow)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(main, model, strict=True))
    assert operations.names.count("aten::_foreach_copy_") == 1
    assert not {"aten::copy_", "aten::mul"} & set(operations.names)
    assert overflow is None or not overflow.any()
    copy_tensors([], [])


def sharded_optimizer(**ddp):
    """As much of a distributed optimizer as copying needs: half of each parameter is this rank's.

    Returns it with its shards and the buffer, which holds the parameters one after the other.
    """
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(6)]
    shards = [torch.randn(4) for _ in params]
    buffer = torch.zeros(48, dtype=torch.bfloat16)
    places = {
        p: SimpleNamespace(start=8 * n + 4, end=8 * n + 8, size=4) for n, p in enumerate(params)
    }
    flags = dict.fromkeys(("use_megatron_fsdp", "fp8_param_gather", "fp4_param_gather"), False)
    fields = {
        "is_stub_optimizer": False,
        "ddp_config": SimpleNamespace(**flags | ddp),
        "config": SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        "shard_fp32_from_float16_groups": [shards[:3], shards[3:5]],
        "model_float16_groups": [params[:3], params[3:5]],
        "shard_fp32_groups": [shards[5:]],
        "model_fp32_groups": [params[5:]],
        "buffers": [SimpleNamespace(buckets=[SimpleNamespace(param_data=buffer)])],
        "model_param_gbuf_map": dict.fromkeys(params, (0, torch.bfloat16, 0)),
        "_get_model_param_range_map": lambda p: {"gbuf_world_in_bucket": places[p]},
        "_is_distopt_quantized_param": lambda p: False,
    }
    return SimpleNamespace(**fields), shards, buffer


def test_shards_of_main_parameters_are_copied_by_one_operation(in_place):
    copy_params = distrib_optimizer.DistributedOptimizer._copy_main_params_to_model_params
    sharded, shards, buffer = sharded_optimizer()
    with Operations() as operations:
        copy_params(sharded)
    assert operations.names.count("aten::_foreach_copy_") == 1
    assert "aten::copy_" not in operations.names
    assert torch.equal(buffer.view(6, 8)[:, 4:], torch.stack(shards).bfloat16())
    assert not buffer.view(6, 8)[:, :4].any()
    # Whatever is special is left to Megatron.
    stub, _, untouched = sharded_optimizer()
    stub.is_stub_optimizer = True
    copy_params(stub)
    assert not untouched.any()


def test_nothing_is_replaced_where_apex_or_transformer_engine_is(monkeypatch):
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(megatron_optimizer, "Adam", type("FusedAdam", (), {}))
    assert optimizer_replacements() == []


def test_offloading_this_optimizer_is_refused(build_model):
    """Megatron's hybrid optimizer sets back the step of a group that has one, after a resume."""
    flags = ("--bf16", "--use-distributed-optimizer", "--use-precision-aware-optimizer")
    with pytest.raises(ValueError, match="--optimizer-cpu-offload needs Transformer Engine, whose"):
        parse_arguments([*flags, "--optimizer-cpu-offload"])
