"""Projected gradient descent (Madry et al. 2018), with starts and targets drawn from ``rng`` alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_at import rng
from distributed_at.rng import Purpose


def perturb(
    network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, ids: Tensor, *,
    attack: dict, eps: float, seed: int, epoch: int, group: int,
) -> Tensor:  # fmt: skip
    """Return adversarial images of one batch-norm group.

    Args:
        network: images -> logits, with the batch norm that the attack works with.
        x, y, ids: (N, 3, H, W) in [0, 1], labels and sample ids.
        attack: the recipe's section, lengths in /255.
        eps: radius of this step, in /255.
        seed, epoch, group: what beside the ids chance depends on.
    """
    eps = eps / 255
    step = attack["step_size"]
    if attack["step_rule"] == "at_least_eps_over_steps":  # Xie & Yuille's code; the recipe's eps, without warm-up
        step = max(step, attack["eps"] / attack["num_steps"])
    step = step / 255
    sizes = [step]
    for done in range(1, attack["num_steps"]):
        sizes.append(sizes[-1] * dict(attack["step_schedule"]).get(done, 1.0))
    again = attack["loss"] == "kl" and attack["reference_forward"] == "each_step"
    clean = None
    if (attack["loss"] == "kl" and not again) or attack["target"] in ("most_confusing", "least_likely"):
        clean = network(x).detach()
    target = _target(attack["target"], y, ids, clean, seed, epoch)
    reference = None if clean is None else F.softmax(clean, dim=1)
    best: tuple[Tensor, Tensor, Tensor] | None = None  # images, fooled, loss
    for restart in range(attack["restarts"]):
        adv = _start(x, ids, attack, eps, seed, epoch, group, restart)
        mistakes, mean, square = torch.zeros(len(x)), torch.zeros_like(x), torch.zeros_like(x)
        for done, size in enumerate(sizes[: attack["num_steps"]]):
            adv = adv.detach().requires_grad_()
            logits = network(adv)
            if again:  # the TRADES code looks at the clean images after the adversarial ones, in every step
                reference = F.softmax(network(x).detach(), dim=1)
            loss = objective(logits, y, target, reference, attack["loss"])
            (gradient,) = torch.autograd.grad(loss.sum(), adv)
            if attack["update"] == "adam":  # Kingma & Ba 2015, with Gowal et al.'s constants, upwards
                mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
                scale = (square / (1 - 0.999 ** (done + 1))).sqrt() + 1e-9
                move = mean / (1 - 0.9 ** (done + 1)) / scale
            else:
                move = _direction(gradient, attack["norm"])
            ahead = adv.detach() + size * move
            if attack["step_noise"]:  # FAT's code: omega; a draw for each step of each restart
                draw = restart * attack["num_steps"] + done
                noise = rng.normal(seed, Purpose.STEP_NOISE, epoch, ids, x[0].numel(), draw=draw)
                ahead = ahead + attack["step_noise"] * noise.to(x.dtype).reshape(x.shape)
            moved = _project(ahead, x, eps, attack["norm"]).clamp(0, 1)
            mistakes += logits.detach().argmax(dim=1) != y
            if attack["early_stop"] is not None:  # Zhang et al. 2020, "Friendly AT"
                moved = torch.where((mistakes < attack["early_stop"])[:, None, None, None], moved, adv.detach())
            adv = moved
        if attack["restarts"] == 1:
            if attack["final_forward"]:  # Pang et al.'s and Rice et al.'s codes
                network(adv)
            return adv.detach()
        logits = network(adv).detach()
        fooled, loss = logits.argmax(dim=1) != y, objective(logits, y, target, reference, attack["loss"])
        if best is not None:
            better = (fooled & ~best[1]) | ((fooled == best[1]) & (loss > best[2]))
            adv = torch.where(better[:, None, None, None], adv, best[0])
            fooled, loss = torch.where(better, fooled, best[1]), torch.where(better, loss, best[2])
        best = (adv, fooled, loss)
    assert best is not None
    return best[0].detach()


def objective(logits: Tensor, y: Tensor, target: Tensor | None, clean: Tensor | None, kind: str) -> Tensor:
    """Return (N,) what the attack raises; with a target, the nearer the target the higher."""
    rows = torch.arange(len(y))
    if kind == "ce":
        p = F.log_softmax(logits, dim=1)
        return -p[rows, y] if target is None else p[rows, target]
    if kind == "kl":  # Zhang et al. 2019: KL(p_clean || p_adv)
        assert clean is not None
        return (clean * (clean.log() - F.log_softmax(logits, dim=1))).sum(dim=1)
    wrong = logits.clone()
    wrong[rows, y] = -torch.inf
    aim = wrong.max(dim=1).values if target is None else logits[rows, target]
    margin = aim - logits[rows, y]
    if kind == "margin":  # Carlini & Wagner 2017
        return margin
    if kind == "dlr":  # Croce & Hein 2020, eq. 6 and 7; the small number is their code's
        ranked = logits.sort(dim=1, descending=True).values
        low = ranked[:, 2] if target is None else (ranked[:, 2] + ranked[:, 3]) / 2
        return margin / (ranked[:, 0] - low + 1e-12)
    raise NotImplementedError(f"the reference knows no attack loss {kind!r}: write its formula here")


def _target(rule: str, y: Tensor, ids: Tensor, clean: Tensor | None, seed: int, epoch: int, classes: int = 10):
    """Return the classes aimed at, None where there are none."""
    if rule == "none":
        return None
    if rule == "random_other":  # Xie & Yuille's code: never the label
        return (y + 1 + rng.below(classes - 1, seed, Purpose.TARGET, epoch, ids, 1)[:, 0]) % classes
    if rule == "random_any":  # their text: any class
        return rng.below(classes, seed, Purpose.TARGET, epoch, ids, 1)[:, 0]
    assert clean is not None
    wrong = F.one_hot(y, classes) == 0
    if rule == "most_confusing":  # Wang & Zhang, Bilateral AT
        return torch.where(wrong, clean, -torch.inf).argmax(dim=1)
    if rule == "least_likely":  # Kurakin et al. 2017
        return torch.where(wrong, clean, torch.inf).argmin(dim=1)
    raise NotImplementedError(f"the reference knows no rule {rule!r} of targets")


def _start(x: Tensor, ids: Tensor, attack: dict, eps: float, seed: int, epoch: int, group: int, restart: int) -> Tensor:
    count = x[0].numel()

    def uniform(purpose: Purpose, keys: Tensor, many: int) -> Tensor:
        return rng.uniform(seed, purpose, epoch, keys, many, draw=restart).to(x.dtype)

    if attack["start"] == "zero":
        return x
    if attack["start"] == "gaussian":  # the TRADES code
        noise = attack["start_std"] * rng.normal(seed, Purpose.START, epoch, ids, count, draw=restart).to(x.dtype)
    elif attack["norm"] == "linf":
        noise = eps * (2 * uniform(Purpose.START, ids, count) - 1)
    else:  # Pang et al.'s code: a Gaussian direction, and a length uniform up to eps
        normal = rng.normal(seed, Purpose.START, epoch, ids, count, draw=restart).to(x.dtype)
        noise = eps * uniform(Purpose.START_RADIUS, ids, 1) * normal / normal.square().sum(dim=1, keepdim=True).sqrt()
    start = _project(x + noise.reshape(x.shape), x, eps, attack["norm"])
    if attack["clip_start"] or attack["num_steps"] == 0:
        start = start.clamp(0, 1)
    keys = torch.full_like(ids, group) if attack["start_clean_scope"] == "group" else ids
    stays = uniform(Purpose.CLEAN_START, keys, 1)[:, 0] < attack["start_clean_probability"]
    return torch.where(stays[:, None, None, None], x, start)


def _length(v: Tensor) -> Tensor:
    return v.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


def _direction(gradient: Tensor, norm: str) -> Tensor:
    return gradient.sign() if norm == "linf" else gradient / _length(gradient)


def _project(adv: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return torch.min(torch.max(adv, x - eps), x + eps)
    length = _length(adv - x)
    return torch.where(length > eps, x + (adv - x) * eps / length, adv)
