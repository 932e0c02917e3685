"""Rates and momentum step by step against what each published code computes: torch's schedulers, or the code's formula."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed_at.catalogue.optimizers import OPTIMIZERS
from distributed_at.catalogue.schedules import SCHEDULES
from distributed_at.config import AttackConfig, OptimizerConfig, ScheduleConfig
from distributed_at.engine.schedules import learning_rate, momentum
from distributed_at.errors import ConfigError
from distributed_at.recipes import load_recipe

EACH = 7  # steps an epoch


def rates(schedule: ScheduleConfig, epochs: int, *, base_lr: float = 0.1, each: int = EACH) -> list[float]:
    steps = epochs * each
    return [
        learning_rate(s, schedule=schedule, base_lr=base_lr, steps_per_epoch=each, num_steps=steps)
        for s in range(steps)
    ]


def momenta(schedule: ScheduleConfig, epochs: int, *, base: float = 0.9, each: int = EACH) -> list[float | None]:
    steps = epochs * each
    return [
        momentum(s, schedule=schedule, base_momentum=base, steps_per_epoch=each, num_steps=steps) for s in range(steps)
    ]


def optimizer(lr: float, mu: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=mu)


def told(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> tuple[list[float], list[float]]:
    """Return rate and momentum of each step under a scheduler of torch that is stepped after each."""
    found = []
    for _ in range(steps):
        group = scheduler.optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"]))
        scheduler.optimizer.step()
        scheduler.step()
    lrs, mus = zip(*found, strict=True)
    return list(lrs), list(mus)


@pytest.mark.parametrize("epochs", [15, 4])
def test_cyclic_moves_rate_and_momentum_as_wong_et_als_code_does(epochs: int) -> None:
    steps = epochs * EACH
    scheduler = torch.optim.lr_scheduler.CyclicLR(
        optimizer(0.2, 0.9), base_lr=0.0, max_lr=0.2, step_size_up=steps / 2, step_size_down=steps / 2
    )
    lrs, mus = told(scheduler, steps)
    schedule = ScheduleConfig(name="cyclic", momentum_at_peak=0.8)
    assert rates(schedule, epochs, base_lr=0.2) == pytest.approx(lrs, abs=1e-12)
    assert momenta(schedule, epochs) == pytest.approx(mus, abs=1e-12)
    assert (max(mus), min(mus)) == (pytest.approx(0.9), pytest.approx(0.8, abs=0.005))
    assert momenta(ScheduleConfig(name="cyclic"), epochs) == [None] * steps


def test_onecycle_by_epochs_is_that_of_the_port_of_gowal_et_als_code() -> None:
    """400 epochs, pct_start 0.025, from lr / 25, cosine to almost 0; torch's default cycles momentum 0.95, 0.85, 0.95."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer(0.4, 0.95), max_lr=0.4, total_steps=400, pct_start=0.025)
    lrs, mus = told(scheduler, 399)  # torch refuses to be stepped after its last
    schedule = ScheduleConfig(
        name="onecycle", peak_epoch=10, final_lr=0.4 / 25 / 1e4, momentum_at_peak=0.85, changes="epoch"
    )
    found, moved = rates(schedule, 400, base_lr=0.4, each=3), momenta(schedule, 400, base=0.95, each=3)
    assert found[: 3 * 399] == pytest.approx(np.repeat(lrs, 3), abs=1e-12)
    assert moved[: 3 * 399] == pytest.approx(np.repeat(mus, 3), abs=1e-12)
    assert found[-1] == pytest.approx(0.4 / 25 / 1e4)
    assert (found[0], max(found)) == (pytest.approx(0.4 / 25), pytest.approx(0.4))


def test_onecycle_by_steps_is_torchs() -> None:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer(0.4, 0.95), max_lr=0.4, total_steps=70, pct_start=0.3, div_factor=8, final_div_factor=100
    )
    lrs, _ = told(scheduler, 69)
    found = rates(ScheduleConfig(name="onecycle", start_divisor=8, final_lr=0.4 / 8 / 100), 10, base_lr=0.4)
    assert found[:69] == pytest.approx(lrs, abs=1e-12)
    assert found[69] == pytest.approx(0.4 / 8 / 100)


def gowal(step: int, total: int, warmup: int, *, kind: str) -> float:
    """Gowal et al.'s code joins a linear warm-up to a schedule that counts from its end."""
    if step < warmup:
        return 0.4 * step / warmup
    since = step - warmup
    if kind == "cosine":
        return 0.4 * 0.5 * (1 + math.cos(math.pi * min(since, total - warmup) / (total - warmup)))
    return 0.4 * (0.1 if since >= total * 2 // 3 else 1.0)


@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_gowal_et_als_schedules_count_after_warm_up(kind: str) -> None:
    epochs, total = 30, 30 * EACH
    schedule = (
        ScheduleConfig(name="cosine", warmup_epochs=3)
        if kind == "cosine"
        else ScheduleConfig(name="piecewise", milestones=(20.0,), boundary="after_warmup", warmup_epochs=3)
    )
    assert rates(schedule, epochs, base_lr=0.4) == pytest.approx(
        [gowal(s, total, 3 * EACH, kind=kind) for s in range(total)], abs=1e-12
    )


def pang(t: float, variant: str) -> float:
    """Pang et al.'s lr_schedule, 'piecewise', by --lrdecay; t = epoch + (i + 1) / len(loader)."""
    first, second = {"base": (100, 105), "intense": (100, 102), "loose": (100, 150), "linear": (100, 105)}[variant]
    if t < first:
        return 0.1
    if t < second:
        return 0.1 * 0.02 * (105 - t) if variant == "linear" else 0.01
    return 0.0 if variant == "linear" else 0.001


@pytest.mark.parametrize("variant", ["base", "intense", "loose", "linear"])
def test_pang_et_als_variants_of_the_decay(variant: str) -> None:
    drops = {"base": (100.0, 105.0), "intense": (100.0, 102.0), "loose": (100.0,)}  # loose: 150 is past the end
    schedule = (
        ScheduleConfig(name="piecewise", milestones=drops[variant], boundary="last_iteration")
        if variant in drops
        else ScheduleConfig(name="points", points=((0, 1), (100, 1), (100, 0.1), (105, 0)), boundary="last_iteration")
    )
    wanted = [pang(epoch + (i + 1) / EACH, variant) for epoch in range(110) for i in range(EACH)]
    assert rates(schedule, 110) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("times", "shares"),
    [((0, 44, 110), (0, 1, 0)), ((0, 36, 73, 110), (1, 1, 0.1, 0.01))],
    ids=["superconverge", "linear"],
)
def test_points_are_numpys_interp_on_pang_et_als_clock(times: tuple, shares: tuple) -> None:
    schedule = ScheduleConfig(name="points", points=tuple(zip(times, shares, strict=True)), boundary="last_iteration")
    clock = (np.arange(110 * EACH) + 1) / EACH
    assert rates(schedule, 110) == pytest.approx(0.1 * np.interp(clock, times, shares), abs=1e-12)
    later = schedule.model_copy(update={"boundary": "after"})
    assert rates(later, 110) == pytest.approx(0.1 * np.interp(clock - 1 / EACH, times, shares), abs=1e-12)


def test_fats_last_drop_is_to_half() -> None:
    """FAT's adjust_learning_rate, whose epochs count from 1."""

    def fat(epoch: int) -> float:
        lr = 0.1
        if epoch >= 60:
            lr = 0.1 * 0.1
        if epoch >= 90:
            lr = 0.1 * 0.01
        if epoch >= 110:
            lr = 0.1 * 0.005
        return lr

    schedule = load_recipe("cifar/methods.yaml#fat").config.schedule
    assert rates(schedule, 120) == pytest.approx(np.repeat([fat(e) for e in range(1, 121)], EACH), rel=1e-12)
    preset = load_recipe("cifar/bag_of_tricks/table1.yaml#friendly").config.schedule
    assert rates(preset, 120) == rates(schedule, 120)


def test_exponential_in_stairs_by_epoch_or_smoothly() -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer(0.1, 0.9), gamma=0.94)
    lrs, _ = told(scheduler, 20)
    stairs = ScheduleConfig(name="exponential", factor=0.94, decay_every=1)
    assert rates(stairs, 20) == pytest.approx(np.repeat(lrs, EACH), abs=1e-12)
    smooth = ScheduleConfig(name="exponential", factor=0.94, decay_every=1, staircase=False)
    assert rates(smooth, 20) == pytest.approx(0.1 * 0.94 ** (np.arange(20 * EACH) / EACH), abs=1e-12)


def test_wang_and_zhangs_third_number_is_the_end() -> None:
    words = ["schedule.milestones=[100,150]", "train.epochs=200", "schedule.boundary=after"]
    schedule = load_recipe("cifar/bag_of_tricks/base", words).config.schedule
    assert rates(schedule, 200) == pytest.approx(np.repeat([0.1, 0.01, 0.001], [100 * EACH, 50 * EACH, 50 * EACH]))
    with pytest.raises(ConfigError, match=r"milestones \[200.0\] lie at or past the last epoch"):
        load_recipe("cifar/bag_of_tricks/base", ["schedule.milestones=[100,150,200]", "train.epochs=200", *words[2:]])


def test_fats_tolerance_rises_when_epochs_are_done() -> None:
    """FAT's adjust_tau, from epoch 1: 0 up to 50, 1 up to 90, then 2; Pang et al.'s code rises one iteration earlier."""
    from distributed_at.engine.schedules import Schedules

    config = load_recipe("cifar/methods.yaml#fat").config
    schedules = Schedules.from_config(config, EACH)
    wanted = np.repeat([1 + (epoch > 50) + (epoch > 90) for epoch in range(1, 121)], EACH)
    assert [schedules.early_stop(step) for step in range(120 * EACH)] == wanted.tolist()
    before = config.model_copy(
        update={"attack": config.attack.model_copy(update={"early_stop_boundary": "last_iteration"})}
    )
    earlier = [Schedules.from_config(before, EACH).early_stop(step) for step in range(120 * EACH - 1)]
    assert earlier == wanted[1:].tolist()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"name": "cosine", "milestones": (3.0,)},
            "milestones is read by schedule piecewise alone, and this one is 'cosine'",
        ),
        ({"name": "constant", "final_lr": 0.1}, "final_lr is read by schedule cosine, cyclic, onecycle alone"),
        ({"name": "piecewise"}, "schedule 'piecewise' needs milestones, e.g. milestones: \\[100, 105\\]"),
        ({"name": "points"}, "schedule 'points' needs points"),
        (
            {"name": "piecewise", "milestones": (1.0, 2.0), "factors": (0.1,)},
            "factors are one for each of 2 milestones, got 1",
        ),
        (
            {"name": "piecewise", "milestones": (1.0,), "factors": (0.1,), "factor": 0.5},
            "factor and factors say the same twice",
        ),
        ({"name": "piecewise", "milestones": (1.0,), "factors": (1.5,)}, "factors lie in"),
        ({"name": "points", "points": ((1.0, 1.0),)}, "points begin at epoch 0"),
        ({"name": "points", "points": ((0.0, 1.0), (2.0, -1.0))}, "shares of the rate are at least 0"),
        ({"name": "points", "points": ((0.0, 1.0),), "boundary": "counted_from_one"}, "points know boundary"),
        (
            {"name": "cyclic", "momentum_at_peak": 0.8, "warmup_epochs": 1.0},
            "in whose place warmup_epochs puts another",
        ),
        ({"name": "cosine", "momentum_at_peak": 0.8}, "momentum_at_peak is read by schedule cyclic, onecycle alone"),
    ],
)
def test_what_a_schedule_does_not_read_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ScheduleConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "sgd", "betas": (0.5, 0.9)}, "betas is read by optimiser adam, adamw alone, and this one is 'sgd'"),
        ({"name": "sgd", "eps": 1.0}, "eps is read by optimiser rmsprop, rmsprop_tf, adam, adamw alone"),
        ({"name": "sgd_gc", "rmsprop_decay": 0.5}, "rmsprop_decay is read by optimiser rmsprop, rmsprop_tf alone"),
        (
            {"name": "adam", "momentum": 0.5},
            "momentum is read by optimiser sgd, sgd_gc, sgd_gcc, rmsprop, rmsprop_tf alone",
        ),
    ],
)
def test_what_an_optimiser_does_not_read_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OptimizerConfig(lr=0.1, **fields)


def test_every_optimiser_and_schedule_says_what_it_reads() -> None:
    for name in OPTIMIZERS.builtin:
        assert OPTIMIZERS[name].fields is not None
    with pytest.raises(ConfigError, match=r"optimizer\.name 'adam' has none here"):
        load_recipe(
            "digits/adversarial",
            ["optimizer.name=adam", "schedule={name: cyclic, warmup_epochs: 0, momentum_at_peak: 0.8}"],
        )


def test_what_the_new_entry_does_not_read_is_not_inherited() -> None:
    """A base's milestones, momentum or betas are dropped where a row names another schedule or optimiser."""
    words = ["schedule.name=cosine", "optimizer.name=adam", "optimizer.lr=1e-4"]
    config = load_recipe("cifar/bag_of_tricks/base", words).config
    assert config.schedule.milestones == ()
    assert config.optimizer.momentum == OptimizerConfig(lr=1).momentum
    back = load_recipe("cifar/bag_of_tricks/base", ["schedule.name=piecewise"]).config
    assert back.schedule.milestones == (100.0, 105.0)
    with pytest.raises(ConfigError, match="milestones is read by schedule piecewise alone"):
        load_recipe("cifar/bag_of_tricks/base", ["schedule.name=cosine", "schedule.milestones=[3]"])


def test_noise_of_steps_is_of_the_sign() -> None:
    for fields in ({"norm": "l2", "eps": 128}, {"update": "adam"}):
        with pytest.raises(ValueError, match="step_noise belongs to steps of the sign"):
            AttackConfig(**{"eps": 8, "num_steps": 2, "step_size": 2, "step_noise": 0.001, **fields})
    with pytest.raises(ValueError, match="early_stop_boundary says when early_stop_epochs raise"):
        AttackConfig(eps=8, num_steps=2, step_size=2, early_stop=1, early_stop_boundary="after")


def test_schedules_of_the_docs_are_schedules() -> None:
    """Each line of docs/recipes.md, one of each name, with the rates that the page says of them."""
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    lines = re.findall(r"^schedule: (\{.*\})$", page, re.MULTILINE)
    words = ["train.epochs=160", "schedule.warmup_epochs=0"]  # of the recipe that is changed
    found = [load_recipe("digits/adversarial", [*words, f"schedule={line}"]).config.schedule for line in lines]
    assert {s.name for s in found} == set(SCHEDULES.builtin) - {"constant"}
    for schedule in found:
        assert all(0 <= rate <= 0.1 + 1e-12 for rate in rates(schedule, 160))
    drops = next(s for s in found if s.factors)
    fell = [rates(drops, 120)[epoch * EACH] for epoch in (58, 59, 88, 89, 108, 109)]
    assert fell == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001, 0.0005])
    late = next(s for s in found if s.boundary == "after_warmup")
    assert [rates(late, 160)[e * EACH] for e in (139, 140)] == pytest.approx([0.1, 0.01])
    straight = next(s for s in found if s.name == "points")
    assert [rates(straight, 120)[e * EACH] for e in (20, 40, 70, 99, 100)] == pytest.approx(
        [0.05, 0.1, 0.055, 0.0115, 0.001]
    )
