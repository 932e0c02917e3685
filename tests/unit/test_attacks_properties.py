"""Properties of starts, steps and projections over many shapes, dtypes, radii and images."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_at.attacks import Threat
from distributed_at.attacks.balls import l2_direction, radius

DTYPES = st.sampled_from([torch.float32, torch.float64])
SHAPES = st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6))
FAST = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw):
    """Return (threat, x in the box, any adv, dtype): images at random, on edges, on the /255 grid."""
    dtype, shape, seed = draw(DTYPES), draw(SHAPES), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=dtype)
    kind = draw(st.sampled_from(["any", "grid", "edges"]))
    if kind == "grid":
        x = (x * 255).round() / 255
    elif kind == "edges":
        x = x.round()
    if draw(st.booleans()) and shape[1] == 3:
        x = x.contiguous(memory_format=torch.channels_last)
    far = draw(st.sampled_from([1e-4, 0.1, 3.0]))
    adv = x + far * torch.randn(shape, generator=generator, dtype=dtype)
    norm = draw(st.sampled_from(["linf", "l2"]))
    eps = draw(st.one_of(st.floats(0, 0.5), st.sampled_from([0.0, 4 / 255, 8 / 255, 16 / 255, 0.031])))
    return Threat(norm, eps), x, adv


def inside(threat: Threat, adv: torch.Tensor, x: torch.Tensor, *, box: bool = True) -> bool:
    delta = (adv.double() - x.double()).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "linf" else delta.square().sum(1).sqrt()
    rounding = 0.0 if threat.norm == "linf" and adv.dtype == torch.float32 else 1e-12
    if threat.norm == "l2" and adv.dtype == torch.float32:
        # points that were inside are not moved; their own difference rounds once
        rounding += 1e-7 * threat.eps
    in_ball = bool((size <= threat.eps + rounding).all())
    return in_ball and (not box or bool(((adv >= 0) & (adv <= 1)).all()))


@given(cases())
@FAST
def test_projection_is_inside_ball_and_box(case) -> None:
    threat, x, adv = case
    assert inside(threat, threat.project(adv, x), x)


@given(cases())
@FAST
def test_projection_is_idempotent(case) -> None:
    threat, x, adv = case
    once = threat.project(adv, x)
    assert torch.equal(threat.project(once, x), once)


@given(cases(), st.floats(0, 0.99))
@FAST
def test_projection_leaves_what_is_inside(case, share: float) -> None:
    threat, x, adv = case
    point = (x + (threat.project(adv, x) - x) * share).clamp(0, 1)
    if not inside(threat, point, x):
        return
    norm = (point - x).double().flatten(1)
    size = norm.abs().amax(1) if threat.norm == "linf" else norm.norm(dim=1)
    if bool((size <= threat.eps * 0.999).all()):
        assert torch.equal(threat.project(point, x), point)


@given(cases())
@FAST
def test_projection_keeps_shape_dtype_and_layout(case) -> None:
    threat, x, adv = case
    out = threat.project(adv, x)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    contiguous = threat.project(adv.contiguous(), x.contiguous())
    if threat.norm == "linf":
        assert torch.equal(contiguous, out)
    else:  # an image's norm is a sum, and the order of a sum is that of memory
        assert torch.allclose(contiguous, out, rtol=8 * torch.finfo(x.dtype).eps, atol=8 * torch.finfo(x.dtype).eps)


@given(cases(), st.sampled_from(["uniform", "gaussian", "zero"]), st.booleans(), st.integers(0, 2**63 - 1))
@FAST
def test_start_is_inside_whatever_its_law(case, kind: str, clip: bool, seed: int) -> None:
    threat, x, _ = case
    start = threat.random_start(x, seed=seed, epoch=1, sample_ids=torch.arange(len(x)), kind=kind, clip=clip, std=0.1)
    assert (start.shape, start.dtype) == (x.shape, x.dtype)
    assert inside(threat, start, x, box=clip)


@given(cases(), st.sampled_from([1e-30, 1e-3, 1.0, 1e30, float("inf"), float("nan")]), st.floats(1e-4, 1))
@FAST
def test_step_stays_inside_and_finite_for_any_gradient(case, scale: float, step: float) -> None:
    threat, x, adv = case
    start = threat.project(adv, x)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype) * scale
    out = threat.step(start, grad, x, step)
    assert torch.isfinite(out).all()
    assert inside(threat, out, x)


@given(cases(), st.sampled_from([1e-38, 1e-20, 1.0, 1e20, 1e37]))
@FAST
def test_direction_has_length_one_at_any_scale(case, scale: float) -> None:
    _, _, adv = case
    norms = l2_direction((adv + 3.0) * scale).double().flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


@given(st.floats(0, 1))
@FAST
def test_radius_never_exceeds_what_was_asked(eps: float) -> None:
    for dtype in (torch.float32, torch.float64):
        like = torch.zeros((), dtype=dtype)
        got = radius(eps, like)
        assert got.double().item() <= eps
        assert torch.equal(got, radius(torch.tensor(eps, dtype=torch.float64), like))
        assert eps - got.double().item() <= max(eps, 1e-37) * torch.finfo(dtype).eps
