"""PGD written by hand from the papers, in float64 and with gradients of the losses on paper; for comparison alone.

Of the product it uses the counter-based numbers, which have tests of their own, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from distributed_at import rng

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An attack; ``eps`` and ``step_size`` in /255."""

    norm: str = "linf"
    eps: float
    num_steps: int
    step_size: float
    start: str = "uniform"
    start_std: float = 0.001
    clip_start: bool = True
    start_clean_probability: float = 0.0
    target: str = "none"
    loss: str = "ce"
    restarts: int = 1
    seed: int = 0


@dataclass
class Row:
    """What became of one image; ``judged`` holds every image (C, H, W) on which the network was asked for a verdict."""

    clean_prediction: int
    adv_prediction: int
    correct_clean: bool
    correct_adv: bool
    loss: float
    target_hit: bool = False
    attack: str = ""
    judged: list[np.ndarray] = field(default_factory=list)


def logits_of(network: Network, x: np.ndarray) -> np.ndarray:
    """(N, K) float64."""
    with torch.no_grad():
        return network(torch.from_numpy(x)).double().numpy()


def cross_entropy(z: np.ndarray, label: int) -> float:
    top = z.max()
    return float(np.log(np.exp(z - top).sum()) + top - z[label])


def _softmax(z: np.ndarray) -> np.ndarray:
    shares = np.exp(z - z.max())
    return shares / shares.sum()


def slope(loss: str, z: np.ndarray, label: int, target: int | None, clean: np.ndarray) -> np.ndarray:
    """Gradient (K,) of what is maximised with respect to the logits z (K,); ``clean``: logits of the clean image."""
    one = np.eye(len(z))
    if loss == "ce":
        return _softmax(z) - one[label] if target is None else one[target] - _softmax(z)
    if loss == "kl":
        return _softmax(z) - _softmax(clean)
    aim = target if target is not None else int(np.argmax(np.where(one[label] > 0, -np.inf, z)))
    if loss == "margin":
        return one[aim] - one[label]
    assert loss == "dlr"
    order = np.argsort(-z)
    below = one[order[2]] if target is None else 0.5 * (one[order[2]] + one[order[3]])
    spread = one[order[0]] - below
    width = spread @ z + 1e-12
    found = (one[aim] - one[label]) / width - (z[aim] - z[label]) / width**2 * spread
    # Where the label is the third the ratio is 1 whatever the logits are, but for the 1e-12 in its denominator.
    return np.where(np.abs(found) < 1e-9, 0.0, found)


def choose_target(plan: Plan, label: int, sample: int, clean: np.ndarray) -> int | None:
    classes = len(clean)
    where = (plan.seed, rng.Purpose.TARGET, rng.EVALUATION_EPOCH, np.array([sample]), 1)
    if plan.target == "random_other":
        return int(label + 1 + rng.below(classes - 1, *where)[0, 0]) % classes
    if plan.target == "random_any":
        return int(rng.below(classes, *where)[0, 0])
    others = [k for k in np.argsort(clean) if k != label]
    return {"none": None, "most_confusing": int(others[-1]), "least_likely": int(others[0])}[plan.target]


def _float32_at_most(values: np.ndarray) -> np.ndarray:
    near = values.astype(np.float32)
    return np.where(near > values, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float32)


def into_ball(adv: np.ndarray, x: np.ndarray, norm: str, eps: float, box: bool = True) -> np.ndarray:
    """The point of ball and box nearest to ``adv`` (C, H, W), in float32."""
    center, radius = x.astype(np.float64), float(_float32_at_most(np.array(eps)))
    if norm == "linf":
        lower, upper = -_float32_at_most(-(center - radius)), _float32_at_most(center + radius)
        adv = np.clip(adv.astype(np.float32), lower, upper)
    else:
        delta = adv - center
        length = np.sqrt((delta**2).sum())
        adv = (center + delta * min(1.0, radius / max(length, 1e-300))).astype(np.float32)
    return np.clip(adv, np.float32(0), np.float32(1)) if box else adv


def start_at(plan: Plan, x: np.ndarray, sample: int, restart: int) -> np.ndarray:
    """Where restart number ``restart`` begins for the image x (C, H, W)."""

    def numbers(purpose: rng.Purpose, count: int) -> tuple:
        return plan.seed, purpose, rng.EVALUATION_EPOCH, torch.tensor([sample]), count

    eps = plan.eps / 255
    if plan.start == "zero":
        noise = np.zeros(x.size)
    elif plan.start == "gaussian":
        noise = plan.start_std * rng.normal(*numbers(rng.Purpose.START, x.size), draw=restart)[0].double().numpy()
    elif plan.norm == "linf":
        noise = eps * (2 * rng.uniform(*numbers(rng.Purpose.START, x.size), draw=restart)[0].double().numpy() - 1)
    else:
        way = rng.normal(*numbers(rng.Purpose.START, x.size), draw=restart)[0].double().numpy()
        share = float(rng.uniform(*numbers(rng.Purpose.START_RADIUS, 1), draw=restart)[0, 0])
        noise = eps * share * way / np.sqrt((way**2).sum())
    coin = float(rng.uniform(*numbers(rng.Purpose.CLEAN_START, 1), draw=restart)[0, 0])
    if coin < plan.start_clean_probability:
        return x
    clip = plan.clip_start or plan.num_steps == 0
    return into_ball(x.astype(np.float64) + noise.reshape(x.shape), x, plan.norm, eps, box=clip)


def trajectory(network: Network, plan: Plan, x, y, ids, targets, clean, restart: int) -> list[np.ndarray]:
    """Images (N, C, H, W) after 0, 1, ... ``num_steps`` steps."""
    adv = np.stack([start_at(plan, x[i], int(ids[i]), restart) for i in range(len(x))])
    path = [adv]
    for _ in range(plan.num_steps):
        image = torch.from_numpy(adv).requires_grad_()
        with torch.enable_grad():
            logits = network(image)
        z = logits.detach().double().numpy()
        slopes = np.stack([slope(plan.loss, z[i], int(y[i]), targets[i], clean[i]) for i in range(len(x))])
        (gradient,) = torch.autograd.grad(logits, image, torch.from_numpy(slopes).to(logits.dtype))
        adv = np.stack([_stepped(plan, adv[i], gradient[i].double().numpy(), x[i]) for i in range(len(x))])
        path.append(adv)
    return path


def _stepped(plan: Plan, adv: np.ndarray, gradient: np.ndarray, x: np.ndarray) -> np.ndarray:
    way = np.sign(gradient) if plan.norm == "linf" else gradient / max(np.sqrt((gradient**2).sum()), 1e-300)
    return into_ball(adv.astype(np.float64) + plan.step_size / 255 * way, x, plan.norm, plan.eps / 255)


def attack(network: Network, plan: Plan, x: np.ndarray, y: np.ndarray, ids: np.ndarray) -> list[Row]:
    """Attack images x (N, C, H, W) float32 in [0, 1] with labels and ids (N,).

    Without targets only images that are classified rightly are attacked, and a restart only those that still stand. With
    targets every image is attacked in every restart. Of a broken image the first verdict counts, else the highest loss.
    """
    return along(network, plan, x, y, ids, (plan.num_steps,))[plan.num_steps]


def along(network: Network, plan: Plan, x, y, ids, counts: tuple[int, ...]) -> dict[int, list[Row]]:
    """Return the rows after each of several numbers of steps of one attack."""
    clean = logits_of(network, x)
    targets = [choose_target(plan, int(y[i]), int(ids[i]), clean[i]) for i in range(len(x))]
    paths = [trajectory(network, plan, x, y, ids, targets, clean, restart) for restart in range(plan.restarts)]
    answers = {count: [logits_of(network, path[count]) for path in paths] for count in counts}
    found = {}
    for count in counts:
        found[count] = [
            _judge(clean[i], int(y[i]), targets[i], [z[i] for z in answers[count]], [p[count][i] for p in paths])
            for i in range(len(x))
        ]
    return found


def _judge(clean: np.ndarray, label: int, target: int | None, answers: list, images: list) -> Row:
    first, right = int(clean.argmax()), bool(clean.argmax() == label)
    if target is None and not right:
        return Row(first, first, False, False, cross_entropy(clean, label), attack="clean")
    row = Row(first, label, right, True, -np.inf)
    for z, image in zip(answers, images, strict=True):
        row.judged.append(image)
        said, loss = int(z.argmax()), cross_entropy(z, label)
        row.target_hit |= said == target
        if row.correct_adv:
            row = replace(row, adv_prediction=said, loss=loss if said != label else max(loss, row.loss))
            row.correct_adv = said == label
        if target is None and not row.correct_adv:
            break
    row.attack = "" if row.correct_adv else "pgd" if right else "clean"
    return row
