"""Learning rate and radius against the numbers that the papers' code produces."""

import pytest

from distributed_at.config import AttackConfig, OptimizerConfig, ScheduleConfig
from distributed_at.engine.schedules import Schedules, base_learning_rate, eps_scale, learning_rate
from distributed_at.recipes import list_recipes, load_recipe

XIE = ScheduleConfig(
    name="piecewise", milestones=(35.0, 70.0, 95.0), warmup_epochs=5.0, warmup_start=0.1, boundary="after"
)
PANG = ScheduleConfig(name="piecewise", milestones=(100.0, 105.0), boundary="last_iteration")


def xie(step):
    return learning_rate(step, schedule=XIE, base_lr=1.6, steps_per_epoch=313, num_steps=34_430)


def pang(step, schedule=PANG):
    return learning_rate(step, schedule=schedule, base_lr=0.1, steps_per_epoch=391, num_steps=110 * 391)


def test_rate_is_per_256_images():
    optimizer = OptimizerConfig(lr=0.1, lr_per=256)
    rates = [base_learning_rate(optimizer, batch) for batch in (512, 1024, 2048, 4096, 8192)]
    assert rates == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2])
    assert base_learning_rate(OptimizerConfig(lr=0.1), 4096) == 0.1


def test_imagenet_warmup_is_linear_over_1565_steps():
    assert xie(0) == pytest.approx(0.1)
    assert xie(1) - xie(0) == pytest.approx(1.5 / 1565)
    assert xie(1564) == pytest.approx(1.6 - 1.5 / 1565)
    assert xie(1565) == 1.6


def test_36th_epoch_is_the_first_slow_one():
    assert xie(35 * 313 - 1) == 1.6
    assert xie(35 * 313) == pytest.approx(0.16)
    assert xie(70 * 313 - 1) == pytest.approx(0.16)
    assert xie(70 * 313) == pytest.approx(0.016)
    assert xie(95 * 313) == xie(34_429) == pytest.approx(0.0016)


def test_imagenet_recipe_has_the_codes_steps():
    config = load_recipe("imagenet/xie_yuille/base.yaml").config
    schedules = Schedules.from_config(config, 313)
    assert (schedules.num_steps, schedules.warmup_steps, schedules.base_lr) == (34_430, 1565, pytest.approx(1.6))
    assert schedules.learning_rate(35 * 313) == pytest.approx(0.16)


def test_drop_reaches_the_last_iteration_before_the_milestone():
    assert pang(100 * 391 - 2) == 0.1
    assert pang(100 * 391 - 1) == pytest.approx(0.01)
    assert pang(105 * 391 - 2) == pytest.approx(0.01)
    assert pang(105 * 391 - 1) == pytest.approx(0.001)


def test_codes_that_count_epochs_from_one_drop_when_the_epoch_of_that_number_begins():
    """TRADES' and MART's: ``for epoch in range(1, epochs + 1)``, and the rate falls where ``epoch >= 75``."""
    schedule = PANG.model_copy(update={"milestones": (75.0, 90.0, 100.0), "boundary": "counted_from_one"})
    for epoch in (1, 74, 75, 89, 90, 99, 100, 110):
        drops = (epoch >= 75) + (epoch >= 90) + (epoch >= 100)
        for iteration in (0, 200, 390):
            assert pang((epoch - 1) * 391 + iteration, schedule) == pytest.approx(0.1 * 0.1**drops)


def test_tolerance_of_early_stopped_pgd_rises_by_the_codes_clock():
    """Pang et al.'s code: 1 before the first epoch, 2 before the second, then 3; t = epoch + (i + 1) / iterations."""
    config = load_recipe("cifar/bag_of_tricks/table2.yaml#resnet18-early-stop-40-70").config
    schedules = Schedules.from_config(config, 391)
    found = [schedules.early_stop(epoch * 391 + i) for epoch, i in ((0, 0), (39, 389), (39, 390), (69, 389), (69, 390))]
    assert found == [1, 1, 2, 2, 3]
    assert Schedules.from_config(load_recipe("cifar/bag_of_tricks/base").config, 391).early_stop(50) is None


def test_every_trades_row_drops_as_its_code_does():
    found = [e.config for e in list_recipes() if "bag_of_tricks" in e.ref and "table1.yaml" not in e.ref]
    found = [c for c in found if c.schedule.name == "piecewise"]
    assert {c.schedule.boundary for c in found if c.objective.name == "trades"} == {"counted_from_one"}
    assert {c.schedule.boundary for c in found if c.objective.name == "pgd_at"} == {"last_iteration"}


@pytest.mark.parametrize(("epochs", "peak"), [(10, 1.0997), (15, 1.0665), (20, 1.0499)])
def test_overshoot_warmup_peaks_above_one_and_snaps_back(epochs, peak):
    schedule = PANG.model_copy(update={"warmup_epochs": float(epochs), "warmup_form": "overshoot"})
    factors = [pang(step, schedule) / 0.1 for step in range((epochs + 1) * 391)]
    assert max(factors) == pytest.approx(peak, abs=5e-5)
    assert factors[0] == pytest.approx((1 / 391 + 1) / epochs)
    assert factors[epochs * 391 - 2] == max(factors)
    assert factors[epochs * 391 - 1 :] == [1.0] * (391 + 1)


@pytest.mark.parametrize("epochs", [10, 15, 20])
def test_eps_warmup_uses_the_same_formula(epochs):
    attack = AttackConfig(eps=8, num_steps=10, step_size=2, eps_warmup_epochs=epochs, eps_warmup_form="overshoot")
    schedule = PANG.model_copy(update={"warmup_epochs": float(epochs), "warmup_form": "overshoot"})
    for step in (0, 390, epochs * 391 - 2, epochs * 391 - 1, epochs * 391):
        assert eps_scale(step, attack=attack, steps_per_epoch=391) == pytest.approx(pang(step, schedule) / 0.1)


def test_training_eps_peaks_at_8_8_with_ten_epochs():
    attack = AttackConfig(eps=8, num_steps=10, step_size=2, eps_warmup_epochs=10, eps_warmup_form="overshoot")
    assert max(8 * eps_scale(s, attack=attack, steps_per_epoch=391) for s in range(4000)) == pytest.approx(
        8.798, abs=1e-3
    )


def test_linear_eps_warmup_rises_from_zero_and_stays():
    attack = AttackConfig(eps=8, num_steps=10, step_size=2, eps_warmup_epochs=2)
    assert [eps_scale(s, attack=attack, steps_per_epoch=10) for s in (0, 5, 10, 20, 99)] == [0.0, 0.25, 0.5, 1.0, 1.0]


def test_cosine_ends_at_final_lr_and_begins_at_the_rate():
    schedule = ScheduleConfig(name="cosine", final_lr=0.01, warmup_epochs=1.0)
    rates = [learning_rate(s, schedule=schedule, base_lr=0.2, steps_per_epoch=10, num_steps=110) for s in range(111)]
    assert (rates[0], rates[10], rates[110]) == (0.0, pytest.approx(0.2), pytest.approx(0.01))
    assert rates[60] == pytest.approx(0.105)


def test_cyclic_is_a_triangle_through_the_middle():
    schedule = ScheduleConfig(name="cyclic")
    rates = [learning_rate(s, schedule=schedule, base_lr=0.2, steps_per_epoch=10, num_steps=150) for s in range(151)]
    assert (rates[0], rates[75], rates[150]) == (0.0, pytest.approx(0.2), pytest.approx(0.0))
    assert rates[30] == pytest.approx(0.08)


def test_exponential_is_a_staircase_of_two_epochs():
    schedule = ScheduleConfig(name="exponential", factor=0.94, decay_every=2.0)
    rate = lambda step: learning_rate(step, schedule=schedule, base_lr=1.0, steps_per_epoch=10, num_steps=2200)  # noqa: E731
    assert [rate(0), rate(19), rate(20), rate(40)] == pytest.approx([1.0, 1.0, 0.94, 0.94**2])


def test_fractional_milestones_fall_on_whole_steps():
    schedule = ScheduleConfig(name="piecewise", milestones=(0.3,), boundary="after")
    rates = [learning_rate(s, schedule=schedule, base_lr=1.0, steps_per_epoch=10, num_steps=10) for s in range(10)]
    assert rates == pytest.approx([1.0] * 3 + [0.1] * 7)


def test_cyclic_may_peak_at_the_last_step_or_where_the_recipe_says():
    def rates(peak_epoch):
        schedule = ScheduleConfig(name="cyclic", peak_epoch=peak_epoch, final_lr=0.1)
        return [learning_rate(s, schedule=schedule, base_lr=1.1, steps_per_epoch=10, num_steps=20) for s in range(20)]

    assert rates(1.9)[-2:] == pytest.approx([0.1 + 18 / 19, 1.1])
    assert rates(0.5)[4:7] == pytest.approx([0.9, 1.1, 0.1 + 14 / 15])
    assert rates(1.85)[18:] == pytest.approx([0.1 + 18 / 18.5, 0.1 + 1 / 1.5])


def schedules(schedule, attack=None, **changes):
    values = {"base_lr": 0.5, "steps_per_epoch": 10, "num_steps": 40}
    return Schedules(schedule=schedule, attack=attack, **(values | changes))


def test_radius_and_epoch_of_a_step():
    constant = ScheduleConfig(name="constant")
    attack = AttackConfig(eps=8, num_steps=10, step_size=2, eps_warmup_epochs=2)
    assert [schedules(constant, attack).eps(s) for s in (0, 5, 20, 39)] == [0.0, 2.0, 8.0, 8.0]
    assert schedules(constant).eps(7) == 0.0
    assert schedules(constant).epoch(25) == 2.5
    assert [schedules(constant).learning_rate(s) for s in (0, 39)] == [0.5, 0.5]


def test_steps_worth_printing_are_the_first_the_last_and_those_around_each_change():
    piecewise = ScheduleConfig(name="piecewise", milestones=(2.0, 3.05), warmup_epochs=0.5)
    assert schedules(piecewise).warmup_steps == 5
    assert schedules(piecewise).key_steps() == [0, 5, 18, 19, 20, 29, 30, 31, 39]
    for name in ("cosine", "exponential", "cyclic"):
        assert schedules(ScheduleConfig(name=name)).key_steps() == [0, 10, 20, 30, 39]
    assert schedules(ScheduleConfig(name="constant")).key_steps() == [0, 39]
    early = ScheduleConfig(name="piecewise", milestones=(0.1, 9.0))
    assert schedules(early).key_steps() == [0, 1, 39]


def test_a_fraction_of_a_warm_up_rises_from_its_start():
    schedule = ScheduleConfig(name="constant", warmup_epochs=0.5, warmup_start=0.1)
    assert [schedules(schedule).learning_rate(s) for s in (0, 1, 4, 5)] == pytest.approx([0.1, 0.18, 0.42, 0.5])
