"""The fused operations under torch.compile, on the meta device and under torch's own checks of custom ops."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from distributed_at import ops
from distributed_at.ops import attack_kernels, build, group_norm
from tests.unit.ops_cases import lay_out, same_bits

LAYOUTS = ("contiguous", "channels_last", "sliced")


def inputs(layout: str = "contiguous") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = lay_out(torch.rand(2, 3, 6, 5, generator=generator), layout)
    return x, x.clone(), lay_out(torch.randn(2, 3, 6, 5, generator=generator), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_custom_ops_pass_the_checks_of_torch(layout):
    x, clean, grad = inputs(layout)
    eps, step = torch.tensor(0.1), torch.tensor(0.05)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (x, clean, grad, eps, step, -1.0, 0.0, 1.0)
    torch.library.opcheck(attack_kernels.linf_step, arguments, test_utils=checks)
    torch.library.opcheck(attack_kernels.l2_step, arguments, test_utils=checks)
    ids = torch.arange(2)
    torch.library.opcheck(
        attack_kernels.random_start, (clean, ids, ids, eps, 1, 2, 0, 0.5, True, 0.0, 1.0), test_utils=checks
    )
    vector = torch.randn(3)
    torch.library.opcheck(
        torch.ops.distributed_at.group_norm_relu.default,
        (x, vector, vector, 3, 1e-5, True),
        test_utils=(*checks, "test_autograd_registration"),
    )
    statistics = torch.zeros(2, 3), torch.ones(2, 3)
    for weights in (True, False):
        torch.library.opcheck(
            group_norm._backward_op, (grad, x, vector, vector, *statistics, True, weights), test_utils=checks
        )


@pytest.mark.parametrize("wish", ["auto", "off"])
def test_compiled_attack_iteration_is_one_graph_with_the_bits_of_eager_and_no_new_graph_when_eps_changes(
    wish, monkeypatch
):
    monkeypatch.setenv("DISTRIBUTED_AT_KERNELS", wish)
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))

    def iteration(x, clean, eps, step):
        grad = torch.func.grad(lambda v: torch.nn.functional.conv2d(v, weight).relu().square().sum())(x)
        return ops.linf_step(x, clean, grad, eps=eps, step=step, direction=-1)

    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._inductor.compile(graph, example_inputs)

    compiled = torch.compile(iteration, fullgraph=True, backend=backend, dynamic=False)
    x, clean, _ = inputs()
    for eps in (0.01, 0.03, 0.1):
        scalars = torch.tensor(eps), torch.tensor(eps / 4)
        assert same_bits(compiled(x, clean, *scalars), iteration(x, clean, *scalars))
    assert len(graphs) == 1


def test_a_number_as_eps_compiles_in_one_graph():
    x, clean, grad = inputs()
    torch._dynamo.reset()
    step = torch.compile(
        lambda x, c, g: ops.l2_step(x, c, g, eps=0.3, step=0.1, direction=1), fullgraph=True, backend="aot_eager"
    )
    assert same_bits(step(x, clean, grad), ops.l2_step(x, clean, grad, eps=0.3, step=0.1, direction=1))


def test_meta_tensors_give_shapes_dtypes_and_layouts():
    x = torch.empty(2, 3, 8, 8, device="meta").contiguous(memory_format=torch.channels_last)
    assert ops.linf_step(x, x, x, eps=0.1, step=0.1, direction=1).stride() == x.stride()
    vector = torch.empty(3, device="meta")
    ids = torch.empty(2, dtype=torch.int64, device="meta")
    start = ops.random_start(x.to(torch.uint8), ids, eps=0.1, seed=0, epoch=0)
    assert (start.dtype, start.stride()) == (torch.float32, x.stride())
    assert ops.group_norm_relu(x, 3, vector, vector).stride() == x.stride()


def test_sizes_past_two_to_the_31_elements_keep_their_shape_on_meta():
    x = torch.empty(16000, 3, 224, 224, device="meta")
    assert x.numel() > 2**31
    assert ops.linf_step(x, x, x, eps=0.1, step=0.1, direction=1).shape == x.shape


def test_functions_are_marked_as_torch_marks_constants():
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    marked = vars(build.constant_to_compilers(ours)), vars(torch.compiler.assume_constant_result(theirs))
    assert marked[0] == marked[1] != {}


def test_attacks_are_imported_without_a_compiler():
    """It would cost every process more than a second, also those that never compile."""
    code = "import sys, distributed_at.engine.run; print([m for m in sys.modules if m.startswith('torch._dynamo')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
