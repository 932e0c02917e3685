"""Adversarial training on one page of plain torch: what a recipe means, computed without engine, objectives or attacks.

One process, one loop, float64. A step is taken over the whole batch at once, batch-norm group by batch-norm group; ranks,
micro-batches, ZeRO, twins, folding and prefetching do not exist here. Of the product it uses ``rng`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from distributed_at import rng
from distributed_at.rng import Purpose
from tests.reference import schedules
from tests.reference.losses import LOSSES, Outcome
from tests.reference.networks import OTHER, Named, forward
from tests.reference.optimisers import Optimiser
from tests.reference.pgd import perturb

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
TEST_IMAGES = 360


def digits(recipe: dict) -> tuple[np.ndarray, Tensor, Tensor]:
    """Return the ids of the training images, and images (1797, 3, 8, 8) in [0, 1] and labels of the whole set."""
    data = load_digits()
    ids = np.sort(rng.permutation(0, 2, len(data.target), purpose=Purpose.SPLIT)[TEST_IMAGES:])
    limit = recipe["data"]["limit_train"]
    ids = np.sort(ids[rng.permutation(recipe["seed"], 1, len(ids), purpose=Purpose.SPLIT)[:limit]])
    grey = torch.tensor(np.round(data.images * 255 / 16), dtype=torch.float32)  # whole grey levels
    pixels = (grey / 255).double()  # a pixel is the float32 nearest to level / 255
    return ids, pixels[:, None].expand(-1, 3, -1, -1), torch.tensor(data.target)


@dataclass
class Row:
    """Running sums between two rows of the log: of values times images, and of those images, by name."""

    sums: dict[str, float] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, mean: float, images: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + mean * images
        self.images[name] = self.images.get(name, 0) + images

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / self.images[name] for name in self.sums}


class Reference:
    """A run of a recipe (a dictionary of its resolved sections).

    Args:
        recipe: what ``recipe.yaml`` holds.
        initial: weights and running statistics to begin with, by the product's names.
        forwards: of one step, over all ranks: where a recipe leaves the batch-norm group free it is what one forward holds.

    Attributes:
        rows: what the log should say.
    """

    def __init__(self, recipe: dict[str, Any], initial: Named, *, forwards: int = 1) -> None:
        self.recipe, self.train = recipe, recipe["train"]
        self.weights = {n: t.double() for n, t in initial.items() if not n.endswith(BUFFERS)}
        self.statistics = {
            n: t if n.endswith("tracked") else t.double() for n, t in initial.items() if n.endswith(BUFFERS)
        }
        trained = {n: w for n, w in self.weights.items() if self._is_trained(n)}
        self.optimiser = Optimiser(recipe["optimizer"], trained)
        self.average = {n: t.clone() for n, t in self._averaged().items()}
        self.group = self.train["bn_group_size"] or self.train["batch_size"] // forwards
        self.ids, self.images, self.labels = digits(recipe)
        batches = len(self.ids) / self.train["batch_size"]
        self.uses = recipe["objective"].get("replays", 1)  # steps in a row with one batch
        self.steps_per_epoch = (math.floor(batches) if self.train["drop_last"] else math.ceil(batches)) * self.uses
        self.delta = torch.zeros(
            self.train["batch_size"], *self.images.shape[1:], dtype=torch.float64
        )  # of each place in a batch
        self.steps = schedules.number_of_steps(recipe, self.steps_per_epoch)
        self.rows: list[dict[str, float]] = []

    def _is_trained(self, name: str) -> bool:
        """Whether a parameter moves; finetuning of batch norms moves those of one branch alone."""
        branch, layer = self.train["bn_only"], name.rpartition(".")[0]
        if branch is None:
            return True
        return f"{layer}.running_mean" in self.statistics and not layer.endswith(f".{OTHER[branch]}")

    def _averaged(self) -> Named:
        """Return what the average of weights is taken of."""
        ema = self.train["ema"]
        if ema is None:
            return {}
        moving = {n: t for n, t in self.statistics.items() if not n.endswith("tracked")}
        return {**self.weights, **(moving if ema["buffers"] == "average" else {})}

    def batch(self, step: int) -> np.ndarray:
        """Return the sample ids of a step, in order."""
        epoch, index = divmod(step, self.steps_per_epoch)
        index //= self.uses
        size = self.train["batch_size"]
        order = rng.permutation(self.recipe["seed"], epoch, len(self.ids))
        return self.ids[order[index * size : (index + 1) * size]]

    def run(self) -> None:
        """Train to the end."""
        row, images = Row(), 0
        for step in range(self.steps):
            images += self.step(step, row)
            mu = schedules.momentum(step, self.recipe, self.steps_per_epoch)
            if (step + 1) % self.recipe["log"]["every_steps"] == 0 or step + 1 == self.steps:
                self.rows.append(
                    {
                        **row.means(),
                        "step": step + 1,
                        "epoch": (step + 1) / self.steps_per_epoch,
                        "lr": schedules.learning_rate(step, self.recipe, self.steps_per_epoch),
                        **({} if mu is None else {"momentum": mu}),
                        "eps": schedules.radius(step, self.recipe["attack"], self.steps_per_epoch),
                        "images": images,
                        "total_steps": self.steps,
                    }
                )
                row, images = Row(), 0

    def step(self, step: int, row: Row) -> int:
        """Take one optimiser step and note its numbers; return its number of images."""
        ids = self.batch(step)
        for weight in self.weights.values():
            weight.requires_grad_()
        total, ends, shown = torch.zeros(()), [], []
        for group in self._groups(step, ids):
            found, statistics = self._group(step, group, row)
            total = total + found.loss * len(group.ids) / len(ids)
            ends.append((group, statistics))
            if found.delta is not None:
                shown.append((group, found))
        names = list(self.optimiser.state)
        leaves = [found.delta for _, found in shown if found.climb is None]
        both = torch.autograd.grad(total, [self.weights[n] for n in names] + leaves)
        gradients, climbs = both[: len(names)], list(both[len(names) :])
        for group, found in shown:
            self._climb(step, group, climbs.pop(0) if found.climb is None else found.climb)
        if (longest := self.recipe["optimizer"]["clip_norm"]) is not None:  # Pascanu et al. 2013, algorithm 1
            norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            gradients = tuple(g * min(1.0, longest / (norm + 1e-6)) for g in gradients)  # torch's and DeepSpeed's 1e-6
        self.weights = {n: w.detach() for n, w in self.weights.items()}
        lr = schedules.learning_rate(step, self.recipe, self.steps_per_epoch)
        mu = schedules.momentum(step, self.recipe, self.steps_per_epoch)
        for name, gradient in zip(names, gradients, strict=True):
            self.weights[name] = self.optimiser.move(name, self.weights[name], gradient, lr, mu)
        self._merge([(group, self._after_step(step, group, statistics)) for group, statistics in ends])
        if self.train["ema"] is not None:
            decay = self.train["ema"]["decay"]
            if self.train["ema"]["dynamic"]:  # Gowal et al.'s code
                decay = min(decay, (1 + step) / (10 + step))
            for name, value in self._averaged().items():
                self.average[name] = decay * self.average[name] + (1 - decay) * value
        return len(ids)

    def _climb(self, step: int, group: Group, gradient: Tensor) -> None:
        """Move what the places of a group keep: a step of the sign, the ball, and the box (Wong et al.'s code)."""
        attack, rows = self.recipe["attack"], slice(group.place, group.place + len(group.ids))
        eps = schedules.radius(step, attack, self.steps_per_epoch) / 255
        moved = self.delta[rows] + attack["step_size"] / 255 * gradient.sign()
        moved = torch.where(moved.abs() > eps, eps * moved.sign(), moved)
        if self.recipe["objective"]["box"] == "perturbation":
            moved = torch.max(torch.min(moved, 1 - group.images), 0 - group.images)
        self.delta[rows] = moved.detach()

    def _groups(self, step: int, ids: np.ndarray) -> Iterator[Group]:
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index // self.uses * (self.train["batch_size"] // self.group)  # groups are numbered through an epoch
        for number, low in enumerate(range(0, len(ids), self.group)):
            mine = torch.from_numpy(ids[low : low + self.group])
            yield Group(mine, self.images[mine], self.labels[mine], epoch, first + number, low)

    def _group(self, step: int, group: Group, row: Row) -> tuple[Outcome, Named]:
        """Return what comes of a group, and what it makes of the running statistics that the step began with."""
        attack, section, branch = self.recipe["attack"], self.recipe["objective"], self._attack_branch()
        network = Network(self, step, self.statistics)
        adv, bn = None, ""
        if attack is not None:
            bn = {"eval": "running", "batch": "batch", "train": "train"}[attack["bn_mode"]]
        if attack is not None and section["name"] != "free_at":
            attack = schedules.tolerance(step, attack, self.steps_per_epoch)
            adv = perturb(
                lambda x: network(x, branch, bn), group.images, group.labels, group.ids,
                attack=attack, eps=schedules.radius(step, attack, self.steps_per_epoch), seed=self.recipe["seed"],
                epoch=group.epoch, group=group.number,
            )  # fmt: skip
        found = LOSSES[section["name"]](
            lambda x, branch, bn: network(x, branch, "running" if self._is_frozen(step) else bn),
            group.images, adv, group.labels, section,
            branch=branch, norm=self.recipe["model"]["norm"], ids=group.ids, seed=self.recipe["seed"], epoch=group.epoch,
            delta=self.delta[group.place : group.place + len(group.ids)], attack_bn=bn,
        )  # fmt: skip
        seen = {"clean": len(group.ids) if found.clean is None else found.clean}
        for name, value in {"loss": found.loss, **found.terms}.items():
            row.add(name, float(value.detach()), seen.get(name.removesuffix("_loss"), len(group.ids)))
        for branch, correct in found.correct.items():
            count = seen.get(branch, len(group.ids))
            row.add(f"{branch}_accuracy", correct / count, count)
        return found, network.statistics

    def _attack_branch(self) -> str:
        return "adv" if self.recipe["attack"] is None else self.recipe["attack"]["branch"]

    def _is_frozen(self, step: int) -> bool:
        """Whether batch norm trains with frozen running statistics (Xie & Yuille, the rows marked '*')."""
        start = self.train["freeze_bn_from_epoch"]
        return start is not None and step >= schedules.epochs(start) * self.steps_per_epoch

    def _after_step(self, step: int, group: Group, statistics: Named) -> Named:
        """Return a group's statistics after the clean forward with the new weights, as Rice et al.'s and Pang et al.'s codes make it."""
        network = Network(self, step, statistics)
        if self.recipe["objective"].get("bn_clean_updates_per_step", 0) and not self._is_frozen(step):
            network(group.images, self._attack_branch(), "train")
        return network.statistics

    def _merge(self, ends: list[tuple[Group, Named]]) -> None:
        """Set the running statistics to the mean over the step's groups, weighted by their images."""
        total = sum(len(group.ids) for group, _ in ends)
        for name in self.statistics:
            if name.endswith("tracked"):  # counts the forwards of a group
                self.statistics[name] = max(found[name] for _, found in ends)
            else:
                self.statistics[name] = torch.stack([f[name] * len(g.ids) for g, f in ends]).sum(dim=0) / total

    def tensors(self) -> Named:
        """Return everything that a checkpoint should hold, by its names there."""
        states = {f"optimizer.{k}.{n}": t for n, state in self.optimiser.state.items() for k, t in state.items()}
        kept = {"objective.delta": self.delta} if self.recipe["objective"]["name"] == "free_at" else {}
        return {
            **kept,
            **{f"model.{n}": t for n, t in self.weights.items()},
            **{f"buffer.{n}": t for n, t in self.statistics.items()},
            **{f"ema.{n}": t for n, t in self.average.items()},
            **states,
        }


@dataclass
class Group:
    """The images whose statistics batch norm takes together, and what chance depends on."""

    ids: Tensor
    images: Tensor
    labels: Tensor
    epoch: int
    number: int  # within the epoch
    place: int = 0  # of its first image within the batch


class Network:
    """The network during one group of a step: it remembers what its forwards make of the running statistics."""

    def __init__(self, run: Reference, step: int, statistics: Named) -> None:
        self._run, self.statistics = run, statistics

    def __call__(self, x: Tensor, branch: str, bn: str) -> Tensor:
        logits, self.statistics = forward(
            self._run.weights, self.statistics, x, branch=branch, bn=bn, model=self._run.recipe["model"]
        )
        return logits
