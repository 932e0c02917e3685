"""Checks of every entry of ``catalogue/attacks.py`` against its paper's formula, in float64 and written out image by image."""

from __future__ import annotations

import math

import torch

from tests.conformance.networks import CLASSES, Spy, images, labels, network
from tests.conformance.product import Product

N = 8


def _logits() -> torch.Tensor:
    return 3.0 * torch.randn((N, CLASSES), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _probabilities(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def _expect(product: Product, loss: str, formula, *, targeted: bool = False, **goal) -> None:
    z, y = _logits(), labels(N)
    targets = (y + 2) % CLASSES if targeted else None
    entry = product.attacks.ATTACK_LOSSES[loss]
    found = entry.load()(z, product.attacks.Goal(labels=y, targets=targets, **goal)).tolist()
    for i, row in enumerate(z.tolist()):
        wanted = formula(i, row, int(y[i]), None if targets is None else int(targets[i]))
        assert math.isclose(found[i], wanted, rel_tol=1e-9), f"{loss}, image {i}: {found[i]} for {wanted}"


def cross_entropy_is_its_formula(product: Product) -> None:
    _expect(product, "ce", lambda i, row, y, t: -math.log(_probabilities(row)[y]))
    _expect(product, "ce", lambda i, row, y, t: math.log(_probabilities(row)[t]), targeted=True)
    soft = _logits().flip(0).softmax(dim=1)
    parts = soft.tolist()

    def to_soft_labels(i, row, y, t):
        return -sum(q * math.log(p) for q, p in zip(parts[i], _probabilities(row), strict=True))

    _expect(product, "ce", to_soft_labels, soft_labels=soft)


def divergence_is_its_formula(product: Product) -> None:
    clean = _logits().flip(0).log_softmax(dim=1)
    of_clean = clean.exp().tolist()

    def divergence(i, row, y, t):
        return sum(p * math.log(p / q) for p, q in zip(of_clean[i], _probabilities(row), strict=True))

    _expect(product, "kl", divergence, reference=clean)


def margin_is_its_formula(product: Product) -> None:
    _expect(product, "margin", lambda i, row, y, t: max(z for k, z in enumerate(row) if k != y) - row[y])
    _expect(product, "margin", lambda i, row, y, t: row[t] - row[y], targeted=True)


def dlr_is_its_formula(product: Product) -> None:
    def untargeted(i, row, y, t):
        ranked = sorted(row, reverse=True)
        return -(row[y] - max(z for k, z in enumerate(row) if k != y)) / (ranked[0] - ranked[2] + 1e-12)

    def targeted(i, row, y, t):
        ranked = sorted(row, reverse=True)
        return -(row[y] - row[t]) / (ranked[0] - (ranked[2] + ranked[3]) / 2 + 1e-12)

    _expect(product, "dlr", untargeted)
    _expect(product, "dlr", targeted, targeted=True)


def gaussian_start_has_its_width(product: Product) -> None:
    x = images(64, low=0.4, high=0.6, dtype=torch.float64)
    attack = product.pgd("linf", 0.3, num_steps=0, start="gaussian", start_std=0.02)
    noise = attack.perturb(network(dtype=torch.float64), x, labels(64)) - x
    assert abs(noise.std() - 0.02) < 0.001, f"a width of {noise.std():.4f} for 0.02"
    assert abs(noise.mean()) < 0.001
    within = (noise.abs() < 0.02).double().mean()
    assert abs(within - 0.6827) < 0.02, f"{within:.3f} within one standard deviation: not Gaussian"


def _ascent(model, x, y, *, steps, move, eps, freeze=None):
    """Run an attack image by image from the clean image; ``move(gradient, number, state)`` returns the step."""
    found = []
    for image, label in zip(x, y, strict=True):
        adv, state, wrong = image.clone(), {}, 0
        for number in range(steps):
            at = adv[None].clone().requires_grad_()
            logits = model(at)
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, label[None]), at)
            wrong += int(logits.argmax() != label)
            step = move(gradient[0], number, state)
            if freeze is None or wrong < freeze:
                adv = torch.minimum(torch.maximum(adv + step, image - eps), image + eps).clamp(0, 1)
        found.append(adv)
    return torch.stack(found)


def _adam(rates):
    def move(gradient, number, state):
        mean = state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * gradient
        square = state["square"] = 0.999 * state.get("square", 0.0) + 0.001 * gradient**2
        corrected = mean / (1 - 0.9 ** (number + 1)), square / (1 - 0.999 ** (number + 1))
        return rates[number] * corrected[0] / (corrected[1].sqrt() + 1e-9)

    return move


def adam_ascends_as_its_paper_says(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(N, dtype=torch.float64), labels(N)
    options = {"num_steps": 6, "step_size": 0.1, "start": "zero", "update": "adam"}
    plain = product.pgd("linf", 0.2, **options).perturb(model, x, y)
    dropping = product.pgd("linf", 0.2, **options, step_schedule=((3, 0.1),)).perturb(model, x, y)
    expected = _ascent(model, x, y, steps=6, move=_adam([0.1] * 6), eps=0.2)
    assert (plain - expected).abs().max() < 1e-9, f"apart by {(plain - expected).abs().max():.3g}"
    expected = _ascent(model, x, y, steps=6, move=_adam([0.1] * 3 + [0.01] * 3), eps=0.2)
    assert (dropping - expected).abs().max() < 1e-9, f"with a schedule apart by {(dropping - expected).abs().max():.3g}"
    assert (dropping - plain).abs().max() > 1e-3


def adam_state_begins_anew_at_every_restart(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(N, dtype=torch.float64), labels(N)
    options = {"num_steps": 3, "step_size": 0.05, "update": "adam"}
    parts = [product.pgd(**options, first_draw=d).perturb_with_info(model, x, y) for d in range(2)]
    both = product.pgd(**options, restarts=2).perturb_with_info(model, x, y)
    assert torch.equal(both.adv, parts[0].better_of(parts[1]).adv)


def steps_follow_their_schedule(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(N, dtype=torch.float64), labels(N)
    rates = [0.02, 0.02, 0.01, 0.01, 0.0025]
    schedule = ((2, 0.5), (4, 0.25))
    adv = product.pgd("linf", 0.3, num_steps=5, step_size=0.02, start="zero", step_schedule=schedule).perturb(
        model, x, y
    )
    expected = _ascent(model, x, y, steps=5, move=lambda g, k, _: rates[k] * g.sign(), eps=0.3)
    assert (adv - expected).abs().max() < 1e-9, f"apart by {(adv - expected).abs().max():.3g}"


def _alternating(x: torch.Tensor) -> torch.Tensor:
    """Two logits of which one step of 0.02 makes the other the larger: right, wrong, right, …"""
    turn = (x.flatten(1).mean(dim=1) * math.pi / 0.02).cos()
    return torch.stack([turn, -turn], dim=1)


def early_stop_counts_each_image_s_mistakes(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(24, dtype=torch.float64), labels(24)
    y[::2] = model(x).argmax(dim=1)[::2]  # half of them are right at the start
    moved = []
    for count in (1, 2, 3):
        adv = product.pgd("linf", 0.3, num_steps=6, step_size=0.02, start="zero", early_stop=count).perturb(model, x, y)
        move = lambda g, k, _: 0.02 * g.sign()  # noqa: E731
        expected = _ascent(model, x, y, steps=6, move=move, eps=0.3, freeze=count)
        assert (adv - expected).abs().max() < 1e-9, f"count {count}: apart by {(adv - expected).abs().max():.3g}"
        moved.append(int(((adv - x).flatten(1).abs().amax(1) > 1e-6).sum()))
    assert 0 < moved[0] < moved[1], f"images moved with counts 1 to 3: {moved}"
    x, y = images(24, low=0.3, high=0.7, dtype=torch.float64), torch.zeros(24, dtype=torch.int64)
    stop = {"num_steps": 6, "step_size": 0.02, "start": "zero", "early_stop": 3}
    adv = product.pgd("linf", 0.3, **stop).perturb(_alternating, x, y)
    expected = _ascent(_alternating, x, y, steps=6, move=lambda g, k, _: 0.02 * g.sign(), eps=0.3, freeze=3)
    assert (adv - expected).abs().max() < 1e-9, "mistakes that are not in a row are not counted together"


def clean_image_is_looked_at_as_often_as_said(product: Product) -> None:
    x, y, steps = images(N), labels(N), 4
    for loss, target, again, last, clean in (
        ("ce", "none", "once", False, []),
        ("kl", "none", "once", False, [0]),
        ("kl", "none", "each_step", False, [1, 3, 5, 7]),  # after the adversarial images, as TRADES' code
        ("ce", "least_likely", "once", True, [0]),
        ("kl", "none", "each_step", True, [1, 3, 5, 7]),
    ):
        spy = Spy(network())
        attack = product.pgd(
            num_steps=steps, loss=loss, target=target, reference_forward=again, final_forward=last, num_classes=CLASSES
        )
        adv = attack.perturb(spy, x, y)
        seen = [i for i, shown in enumerate(spy.seen) if torch.equal(shown, x)]
        what = f"loss {loss}, target {target}, reference {again}, final {last}"
        assert seen == clean, f"{what}: the clean images were seen at {seen}, not {clean}"
        assert len(spy.seen) == steps + len(clean) + last, f"{what}: {len(spy.seen)} forwards"
        assert torch.equal(spy.seen[-1], adv) == last, f"{what}: a look at the result, or none"


def reference_of_each_step_is_the_clean_prediction(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(N, dtype=torch.float64), labels(N)
    once, again = (
        product.pgd(loss="kl", reference_forward=form).perturb(model, x, y) for form in ("once", "each_step")
    )
    assert torch.equal(once, again), "with frozen statistics both are one attack"
    assert (once - product.pgd(num_steps=0, loss="kl").perturb(model, x, y)).abs().max() > 0


def targets_of_a_call_are_aimed_at(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(N, dtype=torch.float64), labels(N)
    towards = (y + 1) % CLASSES
    result = product.pgd("linf", 0.1, num_steps=5, loss="margin", step_size=0.03).perturb_with_info(
        model, x, y, targets=towards
    )
    assert result.targets is not None, "no targets"
    assert torch.equal(result.targets, towards)
    gain = (model(result.adv) - model(x)).gather(1, towards[:, None])[:, 0] - (model(result.adv) - model(x)).gather(
        1, y[:, None]
    )[:, 0]
    assert (gain > 0).all(), f"margins to the targets moved by {gain.tolist()}"


def soft_labels_of_a_call_are_climbed(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(N, dtype=torch.float64), labels(N)
    soft = torch.zeros(N, CLASSES, dtype=torch.float64).scatter_(1, ((y + 1) % CLASSES)[:, None], 1.0)
    options = {"num_steps": 3, "start": "zero"}
    by_soft = product.pgd(**options).perturb(model, x, y, soft_labels=soft)
    by_label = product.pgd(**options).perturb(model, x, (y + 1) % CLASSES)
    assert torch.equal(by_soft, by_label), "a distribution with all its weight on one class is that label"
    assert (by_soft - product.pgd(**options).perturb(model, x, y)).abs().max() > 0


def another_gradient_is_the_one_used(product: Product) -> None:
    model, x, y = network(dtype=torch.float64), images(N, low=0.4, high=0.6, dtype=torch.float64), labels(N)

    def upwards(network, loss, adv, goal, *, loss_scale=1.0):
        return torch.ones_like(adv), network(adv)

    adv = product.pgd(num_steps=2, start="zero", gradient=upwards).perturb(model, x, y)
    assert torch.allclose(adv - x, torch.full_like(x, 4 / 255), atol=1e-9), "an estimate's direction was not followed"


CHECKS = [
    cross_entropy_is_its_formula,
    divergence_is_its_formula,
    margin_is_its_formula,
    dlr_is_its_formula,
    gaussian_start_has_its_width,
    adam_ascends_as_its_paper_says,
    adam_state_begins_anew_at_every_restart,
    steps_follow_their_schedule,
    early_stop_counts_each_image_s_mistakes,
    clean_image_is_looked_at_as_often_as_said,
    reference_of_each_step_is_the_clean_prediction,
    targets_of_a_call_are_aimed_at,
    soft_labels_of_a_call_are_climbed,
    another_gradient_is_the_one_used,
]

# (registry's kind, name) -> the check that compares the entry with its source
PROVED_BY = {
    ("norm of perturbations", "linf"): "ball_holds_exactly",
    ("norm of perturbations", "l2"): "step_is_the_stated_length",
    ("attack loss", "ce"): "cross_entropy_is_its_formula",
    ("attack loss", "kl"): "divergence_is_its_formula",
    ("attack loss", "margin"): "margin_is_its_formula",
    ("attack loss", "dlr"): "dlr_is_its_formula",
    ("rule of targets", "none"): "untargeted_attack_climbs",
    ("rule of targets", "random_other"): "target_never_equals_label",
    ("rule of targets", "random_any"): "random_targets_are_even",
    ("rule of targets", "most_confusing"): "logit_targets_follow_the_logits",
    ("rule of targets", "least_likely"): "target_never_equals_label",
    ("start", "uniform"): "uniform_start_fills_the_ball_evenly",
    ("start", "zero"): "zero_start_is_the_clean_image",
    ("start", "gaussian"): "gaussian_start_has_its_width",
    ("update rule", "steepest"): "step_is_the_stated_length",
    ("update rule", "adam"): "adam_ascends_as_its_paper_says",
    ("step rule", "explicit"): "step_is_the_stated_length",
    ("step rule", "at_least_eps_over_steps"): "step_rule_reaches_the_ball",
}
