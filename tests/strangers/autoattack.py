"""Plain pyautoattack on one chunk of images, and what each of its attacks asked of the network and broke."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack

from tests.strangers.asking import Witness


@dataclass(frozen=True)
class Attack:
    """One attack of the ensemble: what it was given, what it returned, and how often it asked the network."""

    name: str
    seed: int
    x: np.ndarray  # (n, C, H, W)
    adv: np.ndarray
    calls: int
    images: int
    asked_next: int  # position among what the network saw: the batch on which the verdict was asked


def _name(attack: Any) -> str:
    if isinstance(attack, FABAttack_PT):
        return "fab-t" if attack.targeted else "fab"
    if isinstance(attack, SquareAttack):
        return "square"
    return "apgd-t" if isinstance(attack, APGDAttack_targeted) else f"apgd-{attack.loss}"


@contextmanager
def watched(network: Witness) -> Iterator[list[Attack]]:
    """Note every attack of pyautoattack's that runs on ``network``, whoever calls it."""
    noted: list[Attack] = []

    def noting(original: Any) -> Any:
        def perturb(self: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            before, given = dict(network.asked), x.detach().clone()
            adv = original(self, x, y)
            spent = [network.asked[name] - before[name] for name in ("calls", "images")]
            found = adv.detach().clone().numpy()
            noted.append(Attack(_name(self), self.seed, given.numpy(), found, *spent, asked_next=len(network.seen)))
            return adv

        return perturb

    with ExitStack() as stack:
        for kind in (APGDAttack, APGDAttack_targeted, FABAttack_PT, SquareAttack):
            stack.enter_context(mock.patch.object(kind, "perturb", noting(kind.perturb)))
        yield noted


def seed_of(seed: int, ids: np.ndarray) -> int:
    """The generator seed of one chunk: 63 bits of the sha256 of the evaluation's seed and the sorted sample ids."""
    text = b"".join(int(number).to_bytes(8, "little", signed=True) for number in [seed, *sorted(ids.tolist())])
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def positions(some: np.ndarray, x: np.ndarray) -> list[int]:
    """Where the images ``some`` stand among ``x``."""
    return [int(np.flatnonzero((x == image).all(axis=(1, 2, 3)))[0]) for image in some]


@dataclass(frozen=True)
class Verdicts:
    """What plain pyautoattack says of each image."""

    robust: np.ndarray  # (N,) bool
    broken_by: np.ndarray  # (N,) str, "clean" where it was wrong from the start, empty where it is robust
    prediction: np.ndarray  # (N,) of the kept image
    adv: np.ndarray  # (N, C, H, W), the kept image; the clean one where nothing broke it
    attacks: list[Attack]


def run(
    network: Witness,
    x: np.ndarray,
    y: np.ndarray,
    *,
    eps: float,
    seed: int,
    norm: str = "linf",
    version: str = "standard",
    attacks: list[str] | None = None,
    num_steps: int | None = None,
    num_queries: int | None = None,
    num_targets: int | None = None,
    restarts: int | None = None,
) -> Verdicts:
    """Call ``run_standard_evaluation`` on all images as one batch. ``eps`` in [0, 1]; None = as published."""
    plain = AutoAttack(
        network, attacks=attacks, eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm], seed=seed, version=version
    )
    if num_steps is not None:
        for apgd in (plain.apgd, plain.apgd_targeted):
            apgd.__init__(  # its schedule of checkpoints is computed from the number of steps
                network, n_iter=num_steps, norm=apgd.norm, n_restarts=apgd.n_restarts, eps=eps, seed=seed,
                eot_iter=apgd.eot_iter, rho=0.75, device="cpu", logger=plain.logger,
            )  # fmt: skip
        plain.fab.n_iter = num_steps
    if num_queries is not None:
        plain.square.n_queries = num_queries
    if num_targets is not None:
        plain.apgd_targeted.n_target_classes = plain.fab.n_target_classes = num_targets
    if restarts is not None:
        plain.apgd.n_restarts = plain.fab.n_restarts = restarts
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    with torch.no_grad():
        clean = network(images).argmax(1).numpy()
    broken_by = np.where(clean == y, "", "clean").astype(object)
    with torch.random.fork_rng(), watched(network) as noted:
        adv, prediction = plain.run_standard_evaluation(images, labels, batch_size=len(x))
    for one in noted:
        with torch.no_grad():
            answers = network(torch.from_numpy(one.adv)).argmax(1).numpy()
        for i, said in zip(positions(one.x, x), answers, strict=True):
            if said != y[i]:
                assert broken_by[i] == ""
                broken_by[i] = one.name
    robust = (prediction == labels).numpy()
    np.testing.assert_array_equal(robust, broken_by == "")
    return Verdicts(robust, broken_by.astype(str), prediction.numpy(), adv.numpy(), noted)
