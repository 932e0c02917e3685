"""The attack's fast forms on a CUDA device: the plain one's results, no waiting, one capture, weights seen in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distributed_at.attacks import PGD, Threat
from distributed_at.config import ModelConfig
from distributed_at.engine.twin.compiled_attack import StaticIteration
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import build_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH = 16


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 that is float32: TF32's ten bits turn the sign of many small gradients from one algorithm to the next."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def setting(norm: str = "bn", dtype: str = "fp32") -> tuple[torch.nn.Module, Twin, PGD, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    fields = {"arch": "resnet18", "stem": "cifar", "base_width": 32, "norm": norm}
    model = build_model(ModelConfig.model_validate(fields), num_classes=10).cuda()
    x = torch.rand(BATCH, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model(x)
    model.eval()
    pgd = PGD(threat=Threat("linf", 8 / 255), num_steps=4, step_size=2 / 255, check_input=False, fused=True)
    return model, Twin(model, bn_mode="eval", dtype=dtype), pgd, x, torch.arange(BATCH, device="cuda") % 10


def near(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> bool:
    share = ((found - expected).abs() > 1e-6).float().mean().item()
    return share < {"fp32": 0.02, "bf16": 0.4, "fp16": 0.2}[dtype]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("norm", ["bn", "mbn", "gn"])
def test_graph_gives_the_plain_result_and_sees_new_weights(norm: str, dtype: str) -> None:
    model, twin, pgd, x, y = setting(norm, dtype)
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True)
    for epoch in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        twin.refresh()
        for count in (BATCH, BATCH // 2):
            found = pgd.perturb(twin, x[:count], y[:count], epoch=epoch, iteration=static)
            assert near(found, pgd.perturb(twin, x[:count], y[:count], epoch=epoch), dtype)
    assert static.failed == ""


@pytest.mark.parametrize("reference", ["once", "each_step"])
def test_graph_in_train_mode_moves_the_statistics_as_the_plain_form(reference: str) -> None:
    found = []
    for graphed in (False, True):
        model, _, pgd, x, y = setting()
        pgd = replace(pgd, loss="kl", start="gaussian", start_std=0.001, reference_forward=reference)
        twin = Twin(model, bn_mode="train")
        form = None
        if graphed:
            form = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True)
        for epoch, count in enumerate((BATCH, BATCH - 2, BATCH)):
            pgd.perturb(twin, x[:count], y[:count], epoch=epoch, iteration=form)
        assert form is None or form.failed == ""
        found.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    plain, graphed_ = found
    for name, value in plain.items():
        if "num_batches" in name:
            assert int(value) == int(graphed_[name]) > 3
        assert torch.allclose(value.float(), graphed_[name].float(), rtol=1e-2, atol=1e-3), name


def test_rule_with_a_state_runs_beside_the_graph() -> None:
    _, twin, pgd, x, y = setting()
    pgd = replace(pgd, update="adam", step_size=0.1)
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True)
    assert near(pgd.perturb(twin, x, y, iteration=static), pgd.perturb(twin, x, y), "fp32")
    assert static.failed == ""


@pytest.mark.parametrize(
    ("norm", "dtype", "regional", "graph"),
    [
        ("bn", "bf16", False, True),
        ("bn", "bf16", True, True),
        ("gn", "bf16", True, False),
        ("gn", "fp32", False, False),
        ("bn", "fp32", True, False),
    ],
)
def test_compiled_form_gives_the_plain_result(norm: str, dtype: str, regional: bool, graph: bool) -> None:
    _, twin, pgd, x, y = setting(norm, dtype)
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, use_graph=graph, regional=regional)
    found = pgd.perturb(twin, x, y, iteration=static)
    assert near(found, pgd.perturb(twin, x, y), dtype)
    assert static.failed == ""


@pytest.mark.parametrize("form", ["plain", "graphed"])
def test_attack_never_waits_for_the_device(form: str) -> None:
    _, twin, pgd, x, y = setting(dtype="bf16")
    iteration = None
    if form == "graphed":
        iteration = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True)
    pgd.perturb(twin, x, y, iteration=iteration)  # kernels are built and graphs captured here
    torch.cuda.set_sync_debug_mode("error")
    try:
        twin.refresh()
        pgd.perturb(twin, x, y, iteration=iteration)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_says_how_much_memory_it_holds() -> None:
    _, twin, pgd, x, y = setting()
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True)
    pgd.perturb(twin, x, y, iteration=static)
    assert static._forms[-1][1].pool_bytes >= 0
