"""The CUDA and Triton kernels on a GPU: bits equal to the CPU's, streams, graphs, and sizes past 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from distributed_at import ops, rng
from distributed_at.ops import build, group_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def images(memory_format=torch.channels_last, size=37, batch=5):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, size, size), generator=generator, dtype=torch.uint8)
    x_adv = (pixels / 255 + 0.03 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    grad = torch.randn(pixels.shape, generator=generator)
    grad.view(-1)[:4] = torch.tensor([0.0, float("nan"), float("inf"), -float("inf")])
    return [t.contiguous(memory_format=memory_format) for t in (x_adv, pixels, grad)]


def test_cuda_kernels_are_compiled():
    assert build.describe()["cuda"] == "compiled"


@pytest.mark.parametrize("memory_format", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_steps_on_the_gpu_have_the_bits_of_the_cpu(memory_format, dtype, as_bytes):
    x_adv, pixels, grad = images(memory_format)
    clean = pixels if as_bytes else (pixels / 255).contiguous(memory_format=memory_format)
    arguments = (x_adv, clean, grad.to(dtype))
    on_gpu = [t.cuda() for t in arguments]
    named = {"eps": 8 / 255, "step": 2 / 255, "direction": -1}
    got = ops.linf_step(*on_gpu, **named)
    assert torch.equal(got.cpu(), ops.linf_step(*arguments, **named))
    assert got.stride() == x_adv.stride()
    named = {"eps": 0.5, "step": 0.3, "direction": 1}
    got = ops.l2_step(*on_gpu, **named)
    torch.testing.assert_close(got.cpu(), ops.l2_step(*arguments, **named), rtol=0, atol=2.0**-22)
    assert torch.equal(got, ops.l2_step(*on_gpu, **named))


@pytest.mark.parametrize("memory_format", LAYOUTS)
def test_random_start_on_the_gpu_has_the_bits_of_the_cpu(memory_format):
    _, pixels, _ = images(memory_format)
    ids = torch.tensor([0, 1, 2**32 - 1, 77, 1_281_166])
    case = {"eps": 16 / 255, "seed": 2**64 - 3, "epoch": rng.EVALUATION_EPOCH, "draw": 4, "clean_probability": 0.5}
    want = ops.random_start(pixels, ids, **case)
    assert torch.equal(ops.random_start(pixels.cuda(), ids.cuda(), **case).cpu(), want)


def test_kernels_run_on_the_current_stream_and_in_a_graph():
    x_adv, pixels, grad = (t.cuda() for t in images())
    eps, step = torch.tensor(8 / 255, device="cuda"), torch.tensor(2 / 255, device="cuda")
    want = ops.linf_step(x_adv, pixels, grad, eps=eps, step=step, direction=-1)
    static = x_adv.clone(memory_format=torch.preserve_format)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.linf_step(static, pixels, grad, eps=eps, step=step, direction=-1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.linf_step(static, pixels, grad, eps=eps, step=step, direction=-1)
    static.copy_(x_adv)
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.slow
def test_elements_past_two_to_the_31_are_reached_on_the_gpu():
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free GPU memory")
    shape = (14300, 3, 224, 224)
    x = torch.full(shape, 0.5, device="cuda").contiguous(memory_format=torch.channels_last)
    grad = torch.ones(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    out = ops.linf_step(x, x, grad, eps=0.25, step=0.125, direction=-1)
    assert (out[-1] == 0.625).all()
    del out
    out = ops.l2_step(x, x, grad, eps=10.0, step=1.0, direction=-1)
    assert (out[-1] > 0.5).all()


@pytest.mark.parametrize(("shape", "groups"), [((4, 64, 56, 56), 32), ((2, 256, 14, 14), 32), ((3, 160, 7, 5), 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [True, False])
def test_triton_group_norm_agrees_with_the_formulas(shape, groups, dtype, relu):
    generator = torch.Generator().manual_seed(1)
    x, dy = (
        (torch.randn(shape, generator=generator) * 2 + 3).to(dtype).cuda().contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = (torch.randn(shape[1], generator=generator).cuda() for _ in range(2))
    assert group_norm._uses_triton(x)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = ops.group_norm_relu(x, groups, weight, bias, relu=relu)
    gradients = torch.autograd.grad(y, leaves, dy)
    wide = [t.detach().double() for t in leaves]
    want, mean, rstd = group_norm.reference_forward(*wide, groups, 1e-5, relu)
    expected = group_norm.reference_backward(dy.double(), *wide, mean, rstd, relu, True)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for got, reference in zip(gradients, expected, strict=True):
        error = (got.double() - reference).norm() / reference.norm()
        assert error < tolerance
