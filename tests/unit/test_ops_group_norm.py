"""Group norm + ReLU: the formulas against torch, finite differences, and the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from distributed_at.ops import group_norm, group_norm_relu

SHAPES = st.tuples(
    st.integers(1, 3), st.sampled_from([(4, 2), (6, 3), (8, 8), (5, 1)]), st.integers(1, 5), st.integers(1, 5)
)


def case(shape, seed=0, dtype=torch.float64):
    n, (channels, groups), height, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, height, width, generator=generator, dtype=torch.float64) * 2 + 3
    weight, bias = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), groups, weight.to(dtype), bias.to(dtype)


def of_torch(x, groups, weight, bias, relu):
    y = functional.group_norm(x, groups, weight, bias)
    return functional.relu(y) if relu else y


@given(SHAPES, st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_forward_and_gradients_are_those_of_torch(shape, relu, channels_last):
    x, groups, weight, bias = case(shape)
    if x.shape[1] // groups * x.shape[2] * x.shape[3] == 1:
        return  # the variance of one number: all gradients are rounding noise
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    got = group_norm_relu(x, groups, weight, bias, relu=relu)
    want = of_torch(x, groups, weight, bias, relu)
    torch.testing.assert_close(got, want)
    assert got.stride() == x.stride()
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("relu", [True, False])
def test_backward_agrees_with_finite_differences(relu):
    x, groups, weight, bias = case((2, (6, 3), 3, 4), seed=3)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: group_norm_relu(x, groups, w, b, relu=relu), leaves)


def test_sixteen_bits_in_sixteen_bits_out_with_statistics_in_float32():
    x, groups, weight, bias = case((2, (8, 2), 4, 4), dtype=torch.bfloat16)
    y = group_norm_relu(x, groups, weight, bias)
    want = of_torch(x.double(), groups, weight.double(), bias.double(), True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=2**-8)


def test_an_attack_on_frozen_weights_computes_no_weight_gradients(monkeypatch):
    x, groups, weight, bias = case((2, (6, 3), 3, 4))
    x = x.requires_grad_()
    asked = []
    original = group_norm.reference_backward
    monkeypatch.setattr(group_norm, "reference_backward", lambda *a: asked.append(a[-1]) or original(*a))
    torch.autograd.grad(group_norm_relu(x, groups, weight, bias).sum(), [x])
    weight.requires_grad_()
    torch.autograd.grad(group_norm_relu(x, groups, weight, bias).sum(), [x, weight])
    assert asked == [False, True]


def test_func_grad_and_compile_give_the_gradient_of_eager():
    x, groups, weight, bias = case((2, (6, 3), 3, 4), dtype=torch.float32)

    def loss(x):
        return group_norm_relu(x, groups, weight, bias).square().sum()

    (want,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.func.grad(loss)(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)


def test_an_empty_batch_passes():
    x = torch.empty(0, 4, 3, 3, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    y = group_norm_relu(x, 2, weight, torch.zeros(4))
    gradients = torch.autograd.grad(y.sum(), [x, weight])
    assert gradients[0].shape == x.shape
    assert not gradients[1].any()


def test_wrong_groups_are_told():
    with pytest.raises(ValueError, match="num_groups must divide the 6 channels, got 4"):
        group_norm_relu(torch.rand(1, 6, 2, 2), 4, torch.ones(6), torch.zeros(6))


_INTERPRETED = """
import torch
from distributed_at.ops import group_norm as reference, group_norm_triton as kernels
torch.manual_seed(0)
for shape, groups in (((2, 6, 3, 4), 3), ((1, 160, 5, 7), 32), ((1, 8, 40, 40), 2), ((2, 8, 1, 1), 4)):
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = ((torch.randn(shape) * 2 + 3).to(dtype).contiguous(memory_format=torch.channels_last) for _ in "ab")
        weight, bias = torch.randn(shape[1]), torch.randn(shape[1])
        for relu in (True, False):
            want = reference.reference_forward(x, weight, bias, groups, 1e-5, relu)
            got = kernels.forward(x, weight, bias, groups, 1e-5, relu)
            tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
            for a, b in zip(got, want):
                assert a.stride() == b.stride() and a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            arguments = (dy, x, weight, bias, *want[1:], relu)
            for weights in (True, False):
                for a, b in zip(kernels.backward(*arguments, weights), reference.reference_backward(*arguments, weights)):
                    torch.testing.assert_close(a, b, rtol=4 * tolerance, atol=4 * tolerance)
print("all equal")
"""


@pytest.mark.slow
def test_triton_kernels_agree_with_the_formulas_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _INTERPRETED], env=environment, capture_output=True, text=True)
    assert "all equal" in done.stdout, done.stderr


_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from distributed_at.ops import group_norm_triton as kernels
FLOAT32 = {"mean", "rstd", "means", "squares", "mean_out", "rstd_out", "sums", "sums_normal", "group_mean",
           "group_mean_normal", "weight", "bias"}
for name in ("_slice_moments", "_merge_moments", "_apply", "_slice_gradients", "_merge_gradients", "_input_gradient"):
    function = getattr(kernels, name)
    signature, constants = {}, {}
    for i, argument in enumerate(function.arg_names):
        if argument in ("RELU", "BLOCK", "BLOCK_P", "BLOCK_C"):
            signature[argument] = "constexpr"
            constants[(i,)] = {"RELU": True, "BLOCK": 256, "BLOCK_P": 64, "BLOCK_C": 64}[argument]
        elif argument in FLOAT32:
            signature[argument] = "*fp32"
        elif argument in ("x", "y", "dx", "dy"):
            signature[argument] = "*bf16"
        else:
            signature[argument] = "fp32" if argument == "eps" else "i32"
    for architecture in (80, 90):
        done = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", architecture, 32))
        assert done.asm["cubin"]
print("all compiled")
"""


@pytest.mark.slow
def test_triton_kernels_compile_for_gpus_without_one():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", _COMPILED], capture_output=True, text=True)
    assert "all compiled" in done.stdout, done.stderr[-3000:]
