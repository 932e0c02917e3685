"""The compiled CPU kernels against their plain torch reference, bit for bit, and inside torch.compile."""

from __future__ import annotations

import ctypes
import math
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distributed_at import ops, rng
from distributed_at.attacks import balls
from distributed_at.attacks.threat import Threat
from distributed_at.ops import attack_kernels, attack_step, build, reference
from tests.unit.ops_cases import LAYOUTS, lay_out, same_bits, step_inputs

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or build.choice() == "off", reason="needs g++ and DISTRIBUTED_AT_KERNELS not off"
)


def scalars(eps: float, step: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(eps, dtype=torch.float32), torch.tensor(step, dtype=torch.float32)


@needs_compiler
def test_kernels_are_compiled_where_there_is_a_compiler():
    assert build.available("cpu")
    assert ops.describe()["cpu"] == "compiled"


@needs_compiler
@given(step_inputs(), st.sampled_from([1, -1]))
@QUICK
def test_linf_kernel_has_the_bits_of_the_reference(inputs, direction):
    x_adv, clean, grad, eps, step = inputs
    eps_tensor, step_tensor = scalars(eps, step)
    got = ops.linf_step(x_adv, clean, grad, eps=eps_tensor, step=step_tensor, direction=direction)
    want = reference.linf_step(x_adv, clean, grad, eps_tensor, step_tensor, direction, (0.0, 1.0))
    assert same_bits(got, want)


@given(step_inputs(special=False))
@QUICK
def test_linf_step_is_the_step_of_the_threat_model(inputs):
    x_adv, clean, grad, eps, step = inputs
    pixels = reference.as_pixels(clean)
    got = ops.linf_step(x_adv, clean, grad, eps=eps, step=step, direction=-1)
    threat = Threat(norm="linf", eps=eps)
    want = threat.step(x_adv, grad.float(), pixels, torch.tensor(step, dtype=torch.float32))
    assert torch.equal(got, want)


@given(step_inputs(), st.sampled_from([1, -1]))
@QUICK
def test_linf_step_never_leaves_ball_or_box(inputs, direction):
    x_adv, clean, grad, eps, step = inputs
    x_adv = torch.nan_to_num(x_adv)
    out = ops.linf_step(x_adv, clean, grad, eps=eps, step=step, direction=direction)
    pixels = reference.as_pixels(clean).double()
    assert ((out.double() - pixels).abs() <= eps).all()
    assert ((out >= 0) & (out <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_and_nan_gradients_do_not_move_and_infinities_move_one_step(dtype):
    grad = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0]).to(dtype).view(1, 1, 2, 3)
    half = torch.full((1, 1, 2, 3), 0.5)
    out = ops.linf_step(half, half, grad, eps=0.25, step=0.125, direction=-1).flatten()
    assert out.tolist() == [0.5, 0.5, 0.5, 0.625, 0.375, 0.625]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_clean_pixel_that_is_not_finite_gives_nan(value):
    x, clean = torch.full((1, 1, 1, 20), 0.5), torch.full((1, 1, 1, 20), value)
    assert ops.linf_step(x, clean, x, eps=0.1, step=0.1, direction=1).isnan().all()
    scalars_of = torch.tensor(0.1), torch.tensor(0.1)
    assert reference.linf_step(x, clean, x, *scalars_of, 1, (0.0, 1.0)).isnan().all()


@pytest.mark.parametrize("step_function", [ops.linf_step, ops.l2_step])
def test_direction_minus_one_ascends_and_plus_one_descends(step_function):
    half, grad = torch.full((1, 1, 1, 1), 0.5), torch.ones(1, 1, 1, 1)
    assert step_function(half, half, grad, eps=0.2, step=0.1, direction=-1).item() == pytest.approx(0.6)
    assert step_function(half, half, grad, eps=0.2, step=0.1, direction=1).item() == pytest.approx(0.4)


@needs_compiler
@given(step_inputs(), st.sampled_from([1, -1]))
@QUICK
def test_l2_kernel_agrees_with_the_reference(inputs, direction):
    x_adv, clean, grad, eps, step = inputs
    x_adv = torch.nan_to_num(x_adv)
    eps_tensor, step_tensor = scalars(4 * eps, 4 * step)
    got = ops.l2_step(x_adv, clean, grad, eps=eps_tensor, step=step_tensor, direction=direction)
    want = reference.l2_step(x_adv, clean, grad, eps_tensor, step_tensor, direction, 0.0, 1.0)
    torch.testing.assert_close(got, want, rtol=0, atol=2.0**-22)  # sums in another order: the last bits


@given(step_inputs())
@QUICK
def test_l2_step_never_leaves_ball_or_box_and_stays_finite(inputs):
    x_adv, clean, grad, eps, step = inputs
    x_adv = torch.nan_to_num(x_adv)
    out = ops.l2_step(x_adv, clean, grad, eps=3 * eps, step=3 * step, direction=-1)
    norms = (out.double() - reference.as_pixels(clean).double()).flatten(1).norm(dim=1)
    assert (norms <= 3 * eps).all()
    assert ((out >= 0) & (out <= 1)).all()


@given(step_inputs(), st.sampled_from([0.0, 0.5, 4.0]))
@QUICK
def test_fused_l2_step_of_the_threat_model_is_its_plain_step(inputs, reach):
    x_adv, clean, grad, eps, step = inputs
    x_adv, pixels = torch.nan_to_num(x_adv), reference.as_pixels(clean)
    size = torch.tensor(reach * step, dtype=torch.float32)
    threat = Threat(norm="l2", eps=reach * eps)
    bounds = threat.bounds(pixels)
    fused, plain = (threat.stepper(fused=f)(x_adv, grad.float(), size, bounds) for f in (True, False))
    torch.testing.assert_close(fused, plain, rtol=0, atol=2.0**-22)
    for out in (fused, plain):
        norms = (out.double() - pixels.double()).flatten(1).norm(dim=1)
        assert (norms <= threat.eps).all()
        assert ((out >= 0) & (out <= 1)).all()


@pytest.mark.parametrize("fused", [True, False])
def test_l2_step_of_nothing_moves_nothing_and_nan_elements_do_not_either(fused):
    threat = Threat(norm="l2", eps=1.0)
    x = torch.full((3, 1, 1, 2), 0.5)
    grad = torch.tensor([[0.0, 0.0], [math.nan, 2.0], [math.nan, math.nan]]).view(3, 1, 1, 2)
    out = threat.stepper(fused=fused)(x, grad, torch.tensor(0.25), threat.bounds(x))
    assert out.flatten(1).tolist() == [[0.5, 0.5], [0.5, 0.75], [0.5, 0.5]]


@needs_compiler
def test_l2_attack_takes_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(attack_step.kernels, "l2_step", lambda x, *_: calls.append(x.shape) or x)
    x = torch.rand(2, 3, 4, 4)
    threat = Threat(norm="l2", eps=0.5)
    for fused in (False, True):
        threat.stepper(fused=fused)(x, x, torch.tensor(0.1), threat.bounds(x))
    assert calls == [x.shape]


@needs_compiler
def test_l2_step_repeats_bit_for_bit_whatever_the_threads():
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.rand(3, 3, 97, 101, generator=generator), torch.randn(3, 3, 97, 101, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.l2_step(x, x, grad, eps=0.5, step=0.9, direction=-1))
    finally:
        torch.set_num_threads(before)
    assert same_bits(*results)
    one = ops.l2_step(x[1:2], x[1:2], grad[1:2], eps=0.5, step=0.9, direction=-1)
    assert same_bits(one, results[0][1:2])  # and whatever the batch


start_cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64 - 1),
        "epoch": st.integers(0, 100) | st.just(rng.EVALUATION_EPOCH),
        "draw": st.integers(0, 2**24 - 1),
        "clean_probability": st.sampled_from([0.0, 0.2, 0.7, 1.0]),
        "clip": st.booleans(),
    }
)


@needs_compiler
@given(step_inputs(special=False), start_cases, st.integers(0, 2**32 - 4))
@QUICK
def test_random_start_has_the_bits_of_the_counters(inputs, case, first_id):
    _, clean, _, eps, _ = inputs
    ids = torch.arange(first_id, first_id + len(clean))
    got = ops.random_start(clean, ids, eps=eps, **case)
    radius = balls.radius(eps, got)
    want = reference.random_start(clean, ids, ids, radius, box=(0.0, 1.0), **case)
    assert same_bits(got, want)
    threat = Threat(norm="linf", eps=eps)
    assert torch.equal(got, threat.random_start(reference.as_pixels(clean), sample_ids=ids, **case))


def test_random_start_of_a_sample_ignores_its_batch_and_layout():
    clean = torch.rand(4, 3, 5, 7)
    ids = torch.tensor([9, 2**32 - 1, 0, 123456])
    case = {"eps": 8 / 255, "seed": 3, "epoch": 1, "clean_probability": 0.3}
    together = ops.random_start(clean, ids, **case)
    for i in range(4):
        for layout in LAYOUTS:
            alone = ops.random_start(lay_out(clean[i : i + 1], layout), ids[i : i + 1], **case)
            assert same_bits(alone, together[i : i + 1])


def test_group_coin_sends_a_whole_group_to_the_clean_image():
    clean, ids = torch.full((64, 1, 4, 4), 0.5), torch.arange(64)
    groups = ids // 8
    out = ops.random_start(clean, ids, eps=0.1, seed=0, epoch=0, clean_probability=0.5, coin_ids=groups)
    stays = (out == clean).flatten(1).all(dim=1).view(8, 8)
    assert (stays.all(dim=1) | ~stays.any(dim=1)).all()
    assert 0 < stays.all(dim=1).sum() < 8


@needs_compiler
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_copy_is_made_of_dense_layouts(layout, monkeypatch):
    x = lay_out(torch.rand(2, 3, 4, 5), layout)
    addresses = []
    monkeypatch.setattr(
        attack_kernels, "_address", lambda t: addresses.append(t.data_ptr()) or ctypes.c_void_p(t.data_ptr())
    )
    out = ops.linf_step(x, x, x, eps=0.1, step=0.1, direction=1)
    assert addresses.count(x.data_ptr()) == 3
    assert out.stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (5, 7), (3,)])
def test_empty_batches_and_other_ranks_pass(shape):
    x = torch.rand(shape)
    assert ops.linf_step(x, x, x, eps=0.1, step=0.1, direction=1).shape == x.shape
    assert ops.l2_step(x, x, x, eps=0.1, step=0.1, direction=1).shape == x.shape
    ids = torch.arange(shape[0])
    assert ops.random_start(x, ids, eps=0.1, seed=0, epoch=0).shape == x.shape


@needs_compiler
def test_elements_past_two_to_the_31_are_reached():
    # pages that are never touched take no memory: only the elements around 2^31 are
    count = 2**31 + 64
    try:
        x, grad, out = (torch.empty(count, dtype=torch.float32) for _ in range(3))
    except RuntimeError:
        pytest.skip("the system does not lend address space beyond its memory")
    span = slice(2**31 - 8, 2**31 + 8)
    x[span], grad[span] = 0.5, -1.0
    eps, step = scalars(0.25, 0.125)
    address = attack_kernels._address
    status = build.library("cpu").dat_cpu_linf_step(
        address(out), *attack_kernels._typed(x)[:1], *attack_kernels._typed(x), *attack_kernels._typed(grad),
        address(eps), address(step), *attack_kernels._floats(1.0, 0.0, 1.0),
        *attack_kernels._sizes(span.start, span.stop),
    )  # fmt: skip
    assert status == 0
    assert (out[span] == 0.625).all()


def test_wrong_arguments_are_told():
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="one shape"):
        ops.linf_step(x, x[:1], x, eps=0.1, step=0.1, direction=1)
    with pytest.raises(ValueError, match=r"direction must be \+1"):
        ops.linf_step(x, x, x, eps=0.1, step=0.1, direction=0)
    with pytest.raises(TypeError, match="int32"):
        ops.linf_step(x, x, x.int(), eps=0.1, step=0.1, direction=1)
    with pytest.raises(ValueError, match="sample_ids"):
        ops.random_start(x, torch.arange(3), eps=0.1, seed=0, epoch=0)


def test_float64_runs_in_plain_torch():
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert ops.linf_step(x, x, torch.randn_like(x), eps=0.1, step=0.1, direction=1).dtype == torch.float64
