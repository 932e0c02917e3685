"""Checks of what is random: start laws, targets, clean-start coins, restarts, and independence of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.conformance.networks import CLASSES, distance, ids, images, labels, network, rising
from tests.conformance.product import Product


def _start(product: Product, x: torch.Tensor, norm: str = "linf", eps: float = 8 / 255, call=None, **options):
    attack = product.pgd(norm, eps, num_steps=0, **options)
    return attack.perturb(network(), x, labels(len(x)), **(call or {"sample_ids": ids(len(x))}))


def uniform_start_fills_the_ball_evenly(product: Product) -> None:
    x = images(n=200, low=0.4, high=0.6, dtype=torch.float64)
    unit = ((_start(product, x) - x) / (8 / 255)).flatten()
    assert unit.abs().max() <= 1, f"reaches {unit.abs().max():.2f} eps"
    assert abs(unit.mean()) < 0.02, f"mean {unit.mean():.2f} eps"
    share = torch.histc(unit, bins=10, min=-1, max=1) / len(unit)
    assert (share - 0.1).abs().max() < 0.01, f"not uniform: shares of ten bins {share.tolist()}"


def l2_start_has_the_stated_law(product: Product) -> None:
    x = images(n=1500, low=0.4, high=0.6, dtype=torch.float64)
    delta = _start(product, x, "l2", 0.5) - x
    share = torch.histc(distance(x + delta, x, "l2") / 0.5, bins=5, min=0, max=1) / len(x)
    assert (share - 0.2).abs().max() < 0.06, f"radius is not uniform in [0, eps): {share.tolist()}"
    direction = F.normalize(delta.flatten(1), dim=1)
    assert direction.mean(dim=0).abs().max() < 0.02, "directions are not even"
    kurtosis = (direction**4).mean() / (direction**2).mean() ** 2
    assert abs(kurtosis - 3) < 0.15, f"direction is not Gaussian: kurtosis {kurtosis:.2f}"


def gaussian_start_has_the_stated_deviation(product: Product) -> None:
    x = images(n=200, low=0.4, high=0.6, dtype=torch.float64)
    delta = _start(product, x, start="gaussian", start_std=0.001) - x
    assert abs(delta.std() - 0.001) < 2e-5, f"std {delta.std()}"
    assert delta.abs().max() > 0.003, "no tail"


def zero_start_is_the_clean_image(product: Product) -> None:
    x = images()
    assert torch.equal(_start(product, x, start="zero"), x), "no random start, and yet the start is not the image"
    assert torch.equal(_start(product, x, start="zero", norm="l2", eps=0.5), x)


def uniform_start_is_not_the_clean_image(product: Product) -> None:
    x = images()
    assert (distance(_start(product, x), x, "linf") > 0.5 * 8 / 255).all()


def start_is_clipped_only_where_said(product: Product) -> None:
    x = torch.zeros(12, 3, 6, 6)
    call = {"seed": 0, "epoch": 0, "sample_ids": ids()}
    threat = product.attacks.Threat("linf", 8 / 255)
    assert threat.random_start(x, clip=True, **call).min() >= 0, "a clipped start leaves the box"
    assert threat.random_start(x, clip=False, **call).min() < 0, "an unclipped start was clipped"


def target_never_equals_label(product: Product) -> None:
    y = labels(4000)
    for rule in ("random_other", "most_confusing", "least_likely"):
        flat = torch.zeros(4000, CLASSES)
        chosen = product.attacks.choose_targets(
            rule, y, CLASSES, seed=0, epoch=0, sample_ids=ids(4000), logits=flat if rule != "random_other" else None
        )
        assert (chosen != y).all(), f"{rule}: {int((chosen == y).sum())} targets equal their label"
        assert chosen.min() >= 0
        assert chosen.max() < CLASSES


def random_targets_are_even(product: Product) -> None:
    y = labels(8000)
    for rule, parts in (("random_other", CLASSES - 1), ("random_any", CLASSES)):
        chosen = product.attacks.choose_targets(rule, y, CLASSES, seed=0, epoch=0, sample_ids=ids(8000))
        counts = torch.bincount((chosen - y) % CLASSES, minlength=CLASSES) / len(y)
        expected = torch.full((CLASSES,), 1 / parts)
        expected[0] = 1 / CLASSES if rule == "random_any" else 0.0
        assert (counts - expected).abs().max() < 0.03, f"{rule}: {counts.tolist()}"


def logit_targets_follow_the_logits(product: Product) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    y = torch.tensor([0, 3])
    call = {"seed": 0, "epoch": 0, "sample_ids": ids(2), "logits": logits}
    assert product.attacks.choose_targets("most_confusing", y, 4, **call).tolist() == [1, 2]
    assert product.attacks.choose_targets("least_likely", y, 4, **call).tolist() == [3, 0]


def clean_start_coin_has_its_probability(product: Product) -> None:
    n = 2000
    x = images(n=n, low=0.4, high=0.6)
    for probability in (0.0, 0.2, 1.0):
        start = _start(product, x, start_clean_probability=probability)
        share = (distance(start, x, "linf") == 0).double().mean().item()
        assert abs(share - probability) < 0.04, f"probability {probability}, share {share:.3f}"


def clean_start_coin_is_one_a_group(product: Product) -> None:
    n = 1000
    x, groups = images(n=n, low=0.4, high=0.6), torch.arange(n) // 5
    call = {"sample_ids": ids(n), "group_ids": groups}
    start = _start(product, x, start_clean_probability=0.5, start_clean_scope="group", call=call)
    clean = (distance(start, x, "linf") == 0).reshape(-1, 5)
    assert (clean.all(1) | ~clean.any(1)).all(), "images of one group disagree"
    assert 0.35 < clean[:, 0].double().mean() < 0.65


def start_depends_on_its_keys_alone(product: Product) -> None:
    x = images(low=0.4, high=0.6)
    base = _start(product, x, call={"sample_ids": ids(), "epoch": 1, "seed": 1})
    again = _start(product, x, call={"sample_ids": ids(), "epoch": 1, "seed": 1})
    assert torch.equal(base, again), "the same keys gave another start"
    for other in (
        {"sample_ids": ids(first=5000), "epoch": 1, "seed": 1},
        {"sample_ids": ids(), "epoch": 2, "seed": 1},
        {"sample_ids": ids(), "epoch": 1, "seed": 2},
    ):
        same = (_start(product, x, call=other) == base).double().mean()
        assert same < 0.01, f"start ignores a key: {other}"


def result_is_independent_of_the_batch(product: Product) -> None:
    x, y, keys = images(low=0.3, high=0.7, dtype=torch.float64), labels(), ids()
    for norm, eps in (("linf", 8 / 255), ("l2", 0.5)):
        attack = product.pgd(norm, eps, target="random_other", num_classes=CLASSES, restarts=2)
        model = network(dtype=torch.float64)
        whole = attack.perturb(model, x, y, sample_ids=keys)
        turned = attack.perturb(model, x.flip(0), y.flip(0), sample_ids=keys.flip(0)).flip(0)
        alone = torch.cat(
            [attack.perturb(model, x[i : i + 1], y[i : i + 1], sample_ids=keys[i : i + 1]) for i in range(12)]
        )
        assert torch.allclose(whole, turned, atol=1e-12), f"{norm}: the order of the batch matters"
        assert torch.allclose(whole, alone, atol=1e-12), f"{norm}: the company of other images matters"


def memory_format_changes_nothing(product: Product) -> None:
    x, y = images(dtype=torch.float64), labels()
    last = x.to(memory_format=torch.channels_last)
    for norm, eps in (("linf", 8 / 255), ("l2", 0.5)):
        for options in ({"num_steps": 0}, {"num_steps": 2}, {"num_steps": 0, "start": "gaussian"}):
            attack = product.pgd(norm, eps, **options)
            model = network(dtype=torch.float64)
            one, other = attack.perturb(model, x, y), attack.perturb(model, last, y)
            assert torch.allclose(one, other, atol=1e-12), f"{norm} {options}"
            assert other.is_contiguous(memory_format=torch.channels_last)
            assert other.dtype == torch.float64


def restarts_keep_the_best(product: Product) -> None:
    x, y = images(), torch.zeros(12, dtype=torch.int64)
    threat = product.attacks.Threat("linf", 8 / 255)
    starts = [threat.random_start(x, seed=0, epoch=7, sample_ids=ids(), draw=r) for r in range(5)]
    assert not torch.equal(starts[0], starts[1]), "restarts begin at the same point"
    losses = torch.stack([F.cross_entropy(rising(s), y, reduction="none") for s in starts])
    adv = product.pgd(num_steps=0, restarts=5).perturb(rising, x, y, sample_ids=ids(), epoch=7, seed=0)
    found = F.cross_entropy(rising(adv), y, reduction="none")
    correct = torch.stack([rising(s).argmax(1) == y for s in starts])
    best = losses.masked_fill(correct & ~correct.all(0), -1.0).amax(0)
    assert torch.allclose(found, best), "not the best restart"


def restarts_prefer_fooling_to_loss(product: Product) -> None:
    """An image that is misclassified at a small loss beats a correct one at a greater loss."""

    def step_function(x: torch.Tensor) -> torch.Tensor:
        fooled = x[:, 0, 0, 0] > 0.5
        low_loss_but_wrong = torch.tensor([0.0, 0.1, -9.0, -9.0, -9.0])
        high_loss_but_right = torch.tensor([0.01, 0.0, 0.0, 0.0, 0.0])
        return torch.where(fooled[:, None], low_loss_but_wrong, high_loss_but_right)

    x, y = torch.full((64, 3, 6, 6), 0.5), torch.zeros(64, dtype=torch.int64)
    attack = product.pgd(num_steps=0, restarts=6)
    result = attack.perturb_with_info(step_function, x, y, sample_ids=ids(64))
    threat = product.attacks.Threat("linf", 8 / 255)
    from distributed_at.rng import EVALUATION_EPOCH

    starts = [threat.random_start(x, seed=0, epoch=EVALUATION_EPOCH, sample_ids=ids(64), draw=r) for r in range(6)]
    possible = torch.stack([s[:, 0, 0, 0] > 0.5 for s in starts]).any(0)
    assert torch.equal(result.success, possible), f"{int(result.success.sum())} fooled, {int(possible.sum())} possible"


def trajectory_agrees_with_shorter_attacks(product: Product) -> None:
    x, y, model = images(n=40, dtype=torch.float64), labels(40), network(dtype=torch.float64)
    y = model(x).argmax(1)
    marks = (0, 1, 3, 6)
    long = product.pgd(num_steps=6).perturb_with_info(model, x, y, sample_ids=ids(40), checkpoints=marks)
    for row, steps in enumerate(marks):
        short = product.pgd(num_steps=steps).perturb_with_info(model, x, y, sample_ids=ids(40))
        assert torch.equal(long.trajectory.correct[row], short.correct), f"after {steps} steps"
        assert torch.allclose(long.trajectory.loss[row], short.loss)


CHECKS = [
    uniform_start_fills_the_ball_evenly, l2_start_has_the_stated_law, gaussian_start_has_the_stated_deviation,
    zero_start_is_the_clean_image, uniform_start_is_not_the_clean_image, start_is_clipped_only_where_said,
    target_never_equals_label, random_targets_are_even, logit_targets_follow_the_logits,
    clean_start_coin_has_its_probability, clean_start_coin_is_one_a_group, start_depends_on_its_keys_alone,
    result_is_independent_of_the_batch, memory_format_changes_nothing, restarts_keep_the_best,
    restarts_prefer_fooling_to_loss, trajectory_agrees_with_shorter_attacks,
]  # fmt: skip
