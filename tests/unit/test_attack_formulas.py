"""The attacks' formulas against the same numbers worked out by hand, and the defaults that papers' numbers rest on."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from distributed_at.attacks import ATTACK_LOSSES, PGD, Goal, Threat
from distributed_at.errors import ConfigError
from distributed_at.ops import reference

THREAT = Threat("linf", 8 / 255)
LOGITS = torch.tensor([[3.0, 1.0, 2.0, -1.0], [0.0, 4.0, 1.0, 2.0]], dtype=torch.float64)
LABELS, TARGETS = torch.tensor([0, 2]), torch.tensor([1, 3])


def minus_log_softmax(row: int, column: int) -> float:
    return math.log(sum(math.exp(z) for z in LOGITS[row].tolist())) - LOGITS[row, column].item()


def test_cross_entropy_rises_away_from_the_label_or_towards_the_target() -> None:
    away = ATTACK_LOSSES["ce"].load()(LOGITS, Goal(LABELS))
    assert away.tolist() == pytest.approx([minus_log_softmax(0, 0), minus_log_softmax(1, 2)])
    towards = ATTACK_LOSSES["ce"].load()(LOGITS, Goal(LABELS, TARGETS))
    assert towards.tolist() == pytest.approx([-minus_log_softmax(0, 1), -minus_log_softmax(1, 3)])


def test_margin_is_the_largest_wrong_or_the_target_logit_minus_the_true_one() -> None:
    assert ATTACK_LOSSES["margin"].load()(LOGITS, Goal(LABELS)).tolist() == [2.0 - 3.0, 4.0 - 1.0]
    assert ATTACK_LOSSES["margin"].load()(LOGITS, Goal(LABELS, TARGETS)).tolist() == [1.0 - 3.0, 2.0 - 1.0]


def test_kl_is_from_the_clean_to_the_adversarial_prediction() -> None:
    clean = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    value = ATTACK_LOSSES["kl"].load()(LOGITS, Goal(LABELS, reference=clean.log()))
    by_hand = [
        sum(p * (math.log(p) + minus_log_softmax(row, k)) for k, p in enumerate(clean[row].tolist())) for row in (0, 1)
    ]
    assert value.tolist() == pytest.approx(by_hand)


def test_dlr_needs_three_classes_and_targeted_four_and_takes_more() -> None:
    for targeted, least in ((False, 3), (True, 4)):
        for count in (least, least + 1, 10, None):
            assert ATTACK_LOSSES["dlr"].refuse("dlr", targeted=targeted, num_classes=count) is None
        rule = "random_other" if targeted else "none"
        with pytest.raises(ConfigError, match=f"attack.loss 'dlr' needs at least {least} classes"):
            PGD(threat=THREAT, num_steps=1, step_size=0.01, loss="dlr", target=rule, num_classes=least - 1)


def test_an_attacks_defaults_are_one_untargeted_uniform_start_in_the_box_on_cross_entropy() -> None:
    attack = PGD(threat=THREAT, num_steps=1, step_size=0.01)
    assert (attack.step_rule, attack.start, attack.start_clean_scope) == ("explicit", "uniform", "sample")
    assert (attack.start_std, attack.start_clean_probability, attack.clip_start) == (0.001, 0.0, True)  # TRADES: 0.001
    assert (attack.loss, attack.target, attack.restarts, attack.num_classes) == ("ce", "none", 1, None)
    assert (attack.loss_scale, attack.check_input, attack.fused) == (1.0, True, False)
    assert Threat("linf", 0.1).box == (0.0, 1.0)
    start = {k: p.default for k, p in inspect.signature(Threat.random_start).parameters.items()}
    assert (start["draw"], start["kind"], start["std"], start["clean_probability"]) == (0, "uniform", 0.001, 0.0)
    assert (start["coin_ids"], start["clip"], start["eps"], start["fused"]) == (None, True, None, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_l2_projection_is_inside_the_ball_to_the_last_bit_and_at_its_border(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand((2000, 1, 3, 3), generator=generator).to(dtype)
    far = clean + torch.randn(clean.shape, generator=generator).to(dtype)
    eps = torch.tensor(0.3, dtype=dtype)
    inside = reference.l2_project(far, clean, eps, float("-inf"), float("inf"))
    norms = (inside.double() - clean.double()).flatten(1).norm(dim=1)
    outside = (far.double() - clean.double()).flatten(1).norm(dim=1) > eps
    assert (norms <= eps).all()
    assert (norms[outside] > eps * (1 - (1e-5 if dtype == torch.float32 else 1e-11))).all()
