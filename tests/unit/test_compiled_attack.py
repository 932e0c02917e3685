"""The compiled and the captured iteration: the plain one's results, one compilation, and a way back when it fails."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn

from distributed_at.attacks import PGD, Threat
from distributed_at.attacks.iteration import Iteration
from distributed_at.config import AttackConfig, ModelConfig
from distributed_at.engine.twin.compiled_attack import IterationWork, StaticIteration, build_iteration
from distributed_at.engine.twin.cuda_graph import GraphedIteration
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import build_model

BATCH, CLASSES = 6, 5


def network(**fields: object) -> nn.Module:
    settings = {"arch": "resnet", "blocks": (1, 1), "block": "basic", "stem": "cifar", "base_width": 4, **fields}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(ModelConfig.model_validate(settings), num_classes=CLASSES)


def attack(norm: str = "linf", **fields: object) -> PGD:
    eps = {"linf": 8 / 255, "l2": 0.5}[norm]
    return PGD(
        threat=Threat(norm, eps), num_steps=3, step_size=eps / 3, check_input=False, num_classes=CLASSES, **fields
    )


def batch(count: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand((BATCH, 3, 8, 8), generator=torch.Generator().manual_seed(1))
    return x[:count].contiguous(memory_format=torch.channels_last), (torch.arange(BATCH) % CLASSES)[:count]


@pytest.fixture
def compilations():
    """Return a function that counts the graphs compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_compilation_serves_epochs_warm_up_and_the_last_batch(norm: str, dtype: str, compilations) -> None:
    model, pgd = network(), attack(norm)
    twin = Twin(model, bn_mode="eval", dtype=dtype)
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, backend="aot_eager")
    for epoch in range(3):
        for count in (BATCH, BATCH - 1, 1):
            disturb(model)
            twin.refresh()
            x, y = batch(count)
            eps = pgd.threat.eps * (epoch + 1) / 3
            expected = pgd.perturb(twin, x, y, epoch=epoch, eps=eps)
            found = pgd.perturb(twin, x, y, epoch=epoch, eps=eps, iteration=static)
            assert torch.allclose(found, expected, atol=1e-6 if dtype == "fp32" else 2 * eps)
            assert ((found - expected).abs() > 1e-6).float().mean() < (0.001 if dtype == "fp32" else 0.2)
    assert static.failed == ""
    assert compilations() == 1


@pytest.mark.parametrize("loss", ["ce", "kl", "margin", "dlr"])
def test_every_loss_compiles_to_one_graph(loss: str, compilations) -> None:
    pgd = attack(loss=loss)
    twin = Twin(network(), bn_mode="eval")
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, backend="aot_eager")
    x, y = batch()
    found = pgd.perturb(twin, x, y, iteration=static)
    assert torch.allclose(found, pgd.perturb(twin, x, y), atol=1e-6)
    assert (static.failed, compilations()) == ("", 1)


@pytest.mark.parametrize("model", ["bn", "mbn", "gn"])
@pytest.mark.parametrize("target", ["random_other", "most_confusing"])
def test_targets_and_norms_compile_to_one_graph(model: str, target: str, compilations) -> None:
    pgd = attack(target=target)
    twin = Twin(network(norm=model, groups=2), bn_mode="eval", fuse_group_norm=True)
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, backend="aot_eager")
    x, y = batch()
    found = pgd.perturb(twin, x, y, iteration=static)
    assert torch.allclose(found, pgd.perturb(twin, x, y), atol=1e-6)
    assert (static.failed, compilations()) == ("", 1)


def test_batch_statistics_never_see_padding() -> None:
    pgd, twin = attack(), Twin(network(), bn_mode="batch")
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, backend="aot_eager")
    x, y = batch(BATCH - 2)
    assert torch.equal(pgd.perturb(twin, x, y, iteration=static), pgd.perturb(twin, x, y))


def test_empty_batch_passes() -> None:
    pgd, twin = attack(), Twin(network(), bn_mode="eval")
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, backend="aot_eager")
    x, y = batch(0)
    assert pgd.perturb(twin, x, y, iteration=static).shape == x.shape


def test_failing_compiler_warns_once_and_leaves_the_plain_attack(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no C++ compiler here")

    pgd, twin = attack(), Twin(network(), bn_mode="eval")
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, backend=broken)
    x, y = batch()
    for _ in range(2):
        assert torch.equal(pgd.perturb(twin, x, y, iteration=static), pgd.perturb(twin, x, y))
    assert caplog.text.count("runs without") == 1
    assert "no C++ compiler here" in static.failed
    assert "runs without torch.compile" in caplog.text
    assert "torch.compile" in static.failed


class Rerun:
    """In place of a CUDA graph: runs the function again into the first run's outputs, as a replay would."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function):
        self.captures += 1
        outputs = function()

        def replay() -> None:
            self.replays += 1
            for static, fresh in zip(outputs, function(), strict=True):
                static.copy_(fresh)

        return replay, outputs


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("target", ["none", "random_other"])
def test_replays_read_fresh_inputs_and_keep_their_buffers(target: str, restarts: int) -> None:
    model, pgd, rerun = network(), attack(target=target, restarts=restarts), Rerun()
    twin = Twin(model, bn_mode="eval")
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True, capture=rerun)
    kept = []
    for epoch in range(2):
        disturb(model)
        twin.refresh()
        for count in (BATCH, 2):
            x, y = batch(count)
            expected = pgd.perturb(twin, x, y, epoch=epoch, eps=(epoch + 1) * 2 / 255)
            found = pgd.perturb(twin, x, y, epoch=epoch, eps=(epoch + 1) * 2 / 255, iteration=static)
            assert torch.allclose(found, expected, atol=1e-6)
            kept.append((found, found.clone()))
    assert all(torch.equal(now, then) for now, then in kept), "a later replay wrote into an earlier result"
    assert rerun.captures == 1
    assert rerun.replays == 2 * 2 * restarts * pgd.num_steps


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("norm", ["bn", "mbn"])
def test_captured_attack_in_train_mode_moves_the_statistics_as_the_plain_one(norm: str) -> None:
    """Three batches: the capture itself, whose runs before the first replay must leave no trace, and two of replays."""
    pgd, after = attack(loss="kl", start="gaussian", start_std=0.001, reference_forward="each_step"), []
    for graphed in (False, True):
        model = network(norm=norm)
        before = statistics(model)
        twin = Twin(model, bn_mode="train")
        form = None
        if graphed:
            form = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True, capture=Rerun())
        seen = []
        for epoch, count in enumerate((BATCH, BATCH - 2, BATCH)):
            seen.append(pgd.perturb(twin, *batch(count), epoch=epoch, iteration=form))
            seen += statistics(model)
        assert not all(torch.equal(*pair) for pair in zip(before, statistics(model), strict=True))
        after.append(seen)
        assert form is None or form.failed == ""
    assert all(torch.equal(plain, graphed) for plain, graphed in zip(*after, strict=True))


def test_capture_that_fails_leaves_the_statistics_alone(caplog: pytest.LogCaptureFixture) -> None:
    def capture(function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    pgd, found = attack(), []
    for broken in (False, True):
        model = network()
        twin = Twin(model, bn_mode="train")
        form = None
        if broken:
            form = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=False, use_graph=True, capture=capture)
        found.append([pgd.perturb(twin, *batch(), iteration=form), *statistics(model)])
    assert all(torch.equal(plain, after) for plain, after in zip(*found, strict=True))
    assert "runs without CUDA graph" in caplog.text


def test_stale_bounds_would_be_caught() -> None:
    """The test above fails for a wrapper that loads its bounds only once."""

    class Forgetful(GraphedIteration):
        def __call__(self, adv, step_size, bounds, goal):
            first = self._last or (bounds, goal)
            return super().__call__(adv, step_size, *first)

    pgd, twin = attack(), Twin(network(), bn_mode="eval")
    forgetful = Forgetful(pgd.iteration(twin), capture=Rerun())
    x, y = batch()
    pgd.perturb(twin, x, y, eps=2 / 255, iteration=forgetful)
    later = pgd.perturb(twin, x, y, eps=8 / 255, iteration=forgetful)
    assert not torch.allclose(later, pgd.perturb(twin, x, y, eps=8 / 255), atol=1e-6)


def work(**fields: object) -> IterationWork:
    cifar = {
        "macs": 557_000_000, "convolutions": 20, "compiled_convolutions": 20, "fused_norms": 0, "batch_size": 128, "images": 5_000_000, "num_steps": 10,
        "device_type": "cuda",
    }  # fmt: skip
    return IterationWork(**{**cifar, **fields})


@pytest.mark.parametrize(
    ("fields", "compiles", "captures"),
    [
        ({}, True, True),
        ({"macs": 11_500_000_000, "convolutions": 155, "batch_size": 256, "images": 140_000_000}, True, False),
        ({"macs": 11_500_000_000, "convolutions": 155, "batch_size": 32, "images": 1_000_000}, True, True),
        ({"macs": 11_500_000_000, "convolutions": 155, "compiled_convolutions": 155, "images": 200_000}, False, False),
        ({"macs": 11_500_000_000, "convolutions": 155, "compiled_convolutions": 32, "images": 200_000}, True, False),
        ({"macs": 1_000_000, "images": 30_000, "device_type": "cpu"}, False, False),
        ({"images": 20_000}, False, True),
        ({"macs": 4_100_000_000, "convolutions": 53, "batch_size": 64, "images": 20_000}, False, False),
        (
            {"macs": 4_100_000_000, "convolutions": 53, "fused_norms": 53, "batch_size": 128, "images": 20_000},
            False,
            True,
        ),
        (
            {"macs": 4_100_000_000, "convolutions": 53, "fused_norms": 53, "batch_size": 256, "images": 20_000},
            False,
            False,
        ),
    ],
)
def test_auto_decides_by_the_work_ahead(fields: dict, compiles: bool, captures: bool) -> None:
    assert (work(**fields).compilation_pays, work(**fields).graph_pays) == (compiles, captures)


def choose(work: IterationWork, bn_mode: str = "eval", **fields: object) -> Iteration | None:
    config = AttackConfig.model_validate({"eps": 8, "num_steps": 3, "step_size": 2, **fields})
    return build_iteration(config, attack(), Twin(network(), bn_mode=bn_mode), work)


def test_recipe_overrules_auto() -> None:
    small = work(images=100, device_type="cpu")
    assert choose(small) is None
    assert isinstance(choose(small, compile="on"), StaticIteration)
    assert choose(work(device_type="cpu"), compile="off") is None


def test_attack_that_moves_statistics_is_captured_and_not_compiled_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert choose(work(device_type="cpu"), bn_mode="train", compile="on") is None
    assert "whose forwards update running statistics" in caplog.text
    caplog.clear()
    form = choose(work(), bn_mode="train")
    assert isinstance(form, StaticIteration)
    assert [name for name, _ in form._forms] == ["", "CUDA graph"]
    assert not caplog.text, "a form that nobody asked for is missing without a word"
    assert choose(work(), bn_mode="train", cuda_graph="off") is None


def test_graph_without_cuda_has_no_effect_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert choose(work(images=100, device_type="cpu"), cuda_graph="on") is None
    assert "not on CUDA" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
def test_inductor_gives_the_plain_result_and_compiles_once(regional: bool, compilations) -> None:
    model, pgd = network(blocks=(3,)), attack()
    twin = Twin(model, bn_mode="eval")
    static = StaticIteration(pgd, twin, batch_size=BATCH, use_compiler=True, regional=regional)
    pgd.perturb(twin, *batch(), iteration=static)
    first = compilations()
    assert (static.failed, first) == ("", 3 if regional else 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(2):
            for count in (BATCH, 2):
                disturb(model)
                twin.refresh()
                x, y = batch(count)
                eps = pgd.threat.eps * (epoch + 1) / 3
                found = pgd.perturb(twin, x, y, epoch=epoch, eps=eps, iteration=static)
                assert torch.allclose(found, pgd.perturb(twin, x, y, epoch=epoch, eps=eps), atol=1e-5)
    assert (static.failed, compilations()) == ("", first)
