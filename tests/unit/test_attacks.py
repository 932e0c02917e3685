"""The attacks' public face: notebook use, errors, losses' formulas, results."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from distributed_at.attacks import ATTACK_LOSSES, PGD, Goal, Threat, choose_targets
from distributed_at.config import AttackConfig
from distributed_at.errors import ConfigError, DataError
from tests.conformance.networks import CLASSES, ids, images, labels, network

THREAT = Threat("linf", 8 / 255)


def test_notebook_call_needs_nothing_but_a_module() -> None:
    model = network().train()
    x, y = images(), labels()
    attack = PGD(threat=Threat("linf", 8 / 255), num_steps=10, step_size=2 / 255)
    adv = attack.perturb(model, x, y)
    assert model.training
    assert torch.equal(adv, attack.perturb(model.eval(), x, y, sample_ids=torch.arange(12)))
    assert F.cross_entropy(model(adv), y) > F.cross_entropy(model(x), y) + 0.05


def test_attack_works_under_inference_mode_and_no_grad() -> None:
    x, y = images(), labels()
    attack = PGD(threat=THREAT, num_steps=3, step_size=2 / 255)
    expected = attack.perturb(network(), x, y)
    with torch.no_grad():
        assert torch.equal(attack.perturb(network(), x, y), expected)
    model = network()
    with torch.inference_mode():
        assert torch.equal(attack.perturb(model, x.clone(), y), expected)


def test_frozen_weights_do_not_matter() -> None:
    model = network().requires_grad_(False)
    attack = PGD(threat=THREAT, num_steps=3, step_size=2 / 255)
    assert torch.equal(attack.perturb(model, images(), labels()), attack.perturb(network(), images(), labels()))


def test_empty_batch_gives_an_empty_batch() -> None:
    attack = PGD(threat=THREAT, num_steps=2, step_size=2 / 255)
    assert attack.perturb(network(), images(0), labels(0)).shape == (0, 3, 6, 6)


def test_loss_scale_changes_nothing_in_float32() -> None:
    x, y = images(), labels()
    plain, scaled = (PGD(threat=THREAT, num_steps=3, step_size=2 / 255, loss_scale=s) for s in (1.0, 128.0))
    assert torch.equal(plain.perturb(network(), x, y), scaled.perturb(network(), x, y))


@pytest.mark.parametrize("clip_start", [True, False])
def test_fused_kernels_give_the_same_bits(clip_start: bool) -> None:
    x, y = images().contiguous(memory_format=torch.channels_last), labels()
    for steps in (0, 5):
        plain, fused = (
            PGD(
                threat=Threat("linf", 0.03), num_steps=steps, step_size=0.011, clip_start=clip_start, fused=f,
                start_clean_probability=0.3, target="random_other", num_classes=CLASSES,
            )
            for f in (False, True)
        )  # fmt: skip
        call = {"sample_ids": ids(), "epoch": 4, "seed": 5, "eps": 0.02}
        assert torch.equal(plain.perturb(network(), x, y, **call), fused.perturb(network(), x, y, **call))


def test_from_config_reads_every_field() -> None:
    config = AttackConfig(
        norm="linf", eps=16.0, num_steps=5, step_size=1.0, step_rule="at_least_eps_over_steps", start="uniform",
        clip_start=False, start_clean_probability=0.2, start_clean_scope="group", target="random_other", loss="margin",
        restarts=3, dtype="fp16",
    )  # fmt: skip
    attack = PGD.from_config(config, num_classes=7)
    assert attack.threat == Threat("linf", 16 / 255)
    assert attack.effective_step_size == pytest.approx(3.2 / 255)
    assert (attack.clip_start, attack.start_clean_probability, attack.start_clean_scope) == (False, 0.2, "group")
    assert (attack.target, attack.loss, attack.restarts, attack.num_classes) == ("random_other", "margin", 3, 7)
    assert attack.loss_scale == 128.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start": "unifrom"}, "Did you mean 'uniform'"),
        ({"loss": "cee"}, "Did you mean 'ce'"),
        ({"target": "random"}, "random_other"),
        ({"target": "random_other"}, "num_classes"),
        ({"loss": "kl", "start": "zero"}, "zero gradient"),
        ({"loss": "kl", "target": "most_confusing", "start": "gaussian"}, "no target"),
        ({"loss": "dlr", "num_classes": 2}, "margin"),
        ({"num_steps": -1}, "num_steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"restarts": 0}, "restarts"),
        ({"start_clean_probability": 1.5}, "start_clean_probability"),
        ({"start_clean_scope": "batch"}, "sample, group"),
        ({"step_rule": "max"}, "explicit"),
    ],
    ids=str,
)
def test_wrong_options_say_what_is_right(options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PGD(**{"threat": THREAT, "num_steps": 3, "step_size": 2 / 255, **options})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("l3", 0.1), "linf"), (("linf", -0.1), "eps"), (("linf", 8), "/ 255"), (("linf", 0.1, (1.0, 0.0)), "box")],
)
def test_wrong_threats_are_refused(arguments: tuple, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Threat(*arguments)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": images().half()}, "autocast"),
        ({"x": (images() * 255).byte()}, "divide by 255"),
        ({"x": images() - 0.5}, "normalisation"),
        ({"y": labels(11)}, "labels"),
        ({"y": labels().float()}, "int64"),
        ({"sample_ids": ids(3)}, "sample_ids"),
        ({"group_ids": ids(3)}, "group_ids"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_wrong_data_is_refused(change: dict, says: str) -> None:
    call = {"x": images(), "y": labels(), **change}
    with pytest.raises(DataError, match=says):
        PGD(threat=THREAT, num_steps=1, step_size=0.01).perturb(network(), call.pop("x"), call.pop("y"), **call)


def test_group_coins_need_groups() -> None:
    attack = PGD(threat=THREAT, num_steps=1, step_size=0.01, start_clean_probability=0.2, start_clean_scope="group")
    with pytest.raises(DataError, match="group_ids"):
        attack.perturb(network(), images(), labels())


@pytest.mark.parametrize("checkpoints", [(3, 1), (1, 1), (-1,), (9,)])
def test_checkpoints_must_lie_on_the_trajectory(checkpoints: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="checkpoints"):
        PGD(threat=THREAT, num_steps=4, step_size=0.01).perturb_with_info(
            network(), images(), labels(), checkpoints=checkpoints
        )


def test_trajectory_over_restarts_is_their_intersection() -> None:
    x, model = images(40), network()
    y = model(x).argmax(1)
    attack = PGD(threat=THREAT, num_steps=4, step_size=2 / 255, restarts=3)
    result = attack.perturb_with_info(model, x, y, checkpoints=(2, 4))
    assert torch.equal(result.trajectory.correct[1], result.correct)
    assert result.steps == 12
    assert result.trajectory.correct.shape == (2, 40)
    assert torch.equal(result.success, model(result.adv).argmax(1) != y)


def test_dlr_follows_its_formula() -> None:
    z, y = torch.tensor([[3.0, 1.0, 2.0, -1.0], [0.0, 4.0, 1.0, 2.0]]), torch.tensor([0, 2])
    value = ATTACK_LOSSES["dlr"].load()(z, Goal(labels=y))
    assert torch.allclose(value, torch.tensor([-(3.0 - 2.0) / (3.0 - 1.0), -(1.0 - 4.0) / (4.0 - 1.0)]))
    aimed = ATTACK_LOSSES["dlr"].load()(z, Goal(labels=y, targets=torch.tensor([1, 1])))
    assert torch.allclose(aimed, torch.tensor([-(3.0 - 1.0) / (3.0 - 0.0), -(1.0 - 4.0) / (4.0 - 0.5)]))


def test_kl_loss_is_zero_at_the_clean_prediction_and_positive_elsewhere() -> None:
    z = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0))
    goal = Goal(labels=labels(6), reference=z.log_softmax(1))
    assert ATTACK_LOSSES["kl"].load()(z, goal).abs().max() < 1e-6
    assert (ATTACK_LOSSES["kl"].load()(z.flip(1), goal) > 0).all()


def test_target_rules_refuse_what_they_cannot_do() -> None:
    call = {"seed": 0, "epoch": 0, "sample_ids": ids()}
    with pytest.raises(ConfigError, match="Did you mean 'random_other'"):
        choose_targets("randomother", labels(), CLASSES, **call)
    with pytest.raises(ConfigError, match="pass logits"):
        choose_targets("least_likely", labels(), CLASSES, **call)
    with pytest.raises(ConfigError, match="2 classes"):
        choose_targets("random_any", labels(), 1, **call)
    assert choose_targets("none", labels(), CLASSES, **call) is None


def test_flags_come_back_when_the_model_fails() -> None:
    model = network().train()
    before = [m.training for m in model.modules()]
    broken = copy.deepcopy(model)
    broken[5] = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        PGD(threat=THREAT, num_steps=1, step_size=0.01).perturb(broken, images(), labels())
    assert before == [m.training for m in broken.modules()]


def test_draws_are_those_of_seed_zero_unless_another_is_given() -> None:
    model, x, y = network(), images(), labels()
    attack = PGD(threat=THREAT, num_steps=2, step_size=2 / 255)
    told, other = attack.perturb(model, x, y, seed=0), attack.perturb(model, x, y, seed=1)
    assert not torch.equal(told, other)
    assert torch.equal(attack.perturb(model, x, y), told)
    assert torch.equal(attack.perturb_with_info(model, x, y).adv, told)


def test_a_second_restart_is_made_and_the_better_image_returned() -> None:
    model, x, y = network(), images(), labels()
    once, twice, second = (
        PGD(threat=THREAT, num_steps=1, step_size=1 / 255, restarts=r, first_draw=first).perturb(model, x, y)
        for r, first in ((1, 0), (2, 0), (1, 1))
    )
    losses = [F.cross_entropy(model(adv), y, reduction="none") for adv in (once, second)]
    later = losses[1] > losses[0]
    assert later.any()
    assert not later.all()
    assert torch.equal(twice, torch.where(later[:, None, None, None], second, once))
