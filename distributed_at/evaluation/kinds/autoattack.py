"""AutoAttack (Croce & Hein 2020) through pyautoattack, with results that neither sharding nor a restart can change.

pyautoattack's algorithms are used as they are; its outer loop is not: its state file cannot be read back, its seeds
follow the order of batches, and its verdicts trust the images that it made. Here one fixed chunk of samples is one
call with its own seed, and an image counts only if it lies in the ball and the model, asked again, is wrong on it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from distributed_at.errors import ConfigError
from distributed_at.evaluation.outcome import Outcome, inside_ball
from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.quiet import isolated_generators

Forward = Callable[[torch.Tensor], torch.Tensor]
_NORMS = {"linf": "Linf", "l2": "L2"}


def chunk_seed(seed: int, ids: np.ndarray) -> int:
    """Return the generator seed of a chunk: a hash of the evaluation's seed and the chunk's sample ids, 63 bits."""
    text = np.concatenate([[seed], np.sort(ids)]).astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


@contextmanager
def _silent_logger() -> Iterator[None]:
    """Keep pyautoattack's warnings off the console: they repeat for every chunk and lead to its own documentation."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _toolbox(forward: Forward, protocol: Protocol, device: torch.device, seed: int):
    """Build pyautoattack's four attacks with this protocol's budgets, without its outer loop."""
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ConfigError(
            "evaluation kind 'autoattack' needs the package pyautoattack: pip install pyautoattack"
        ) from error
    tools = AutoAttack(
        forward,
        attacks=list(protocol.attacks),
        device=device,
        eps=protocol.eps / 255,
        norm=_NORMS[protocol.norm],
        seed=seed,
        version="custom",
    )
    # Every budget is set by hand: its 'custom' leaves 5 restarts, and one of its versions overwrites FAB's restarts
    # while running, so that a second call of the same object would be weaker than the first.
    tools.apgd.n_restarts = protocol.restarts
    tools.apgd.eot_iter = protocol.eot_steps
    tools.apgd_targeted.n_restarts = 1
    tools.apgd_targeted.n_target_classes = protocol.num_targets
    tools.fab.n_target_classes = protocol.num_targets
    for apgd in (tools.apgd, tools.apgd_targeted):
        apgd.n_iter = apgd.n_iter_orig = protocol.num_steps
        apgd.n_iter_2 = max(int(0.22 * protocol.num_steps), 1)
        apgd.n_iter_min = max(int(0.06 * protocol.num_steps), 1)
        apgd.size_decr = max(int(0.03 * protocol.num_steps), 1)
    tools.fab.n_iter = protocol.num_steps
    tools.square.n_queries = protocol.num_queries
    return tools


def _run_one(tools, name: str, x: torch.Tensor, y: torch.Tensor, restarts: int) -> torch.Tensor:
    """Run one attack of the ensemble on samples that are still right; (N, C, H, W) in and out."""
    if name in ("apgd-ce", "apgd-dlr"):
        tools.apgd.loss = name.removeprefix("apgd-")
        return tools.apgd.perturb(x, y)
    if name == "apgd-t":
        return tools.apgd_targeted.perturb(x, y)
    if name in ("fab", "fab-t"):
        tools.fab.targeted = name == "fab-t"
        tools.fab.n_restarts = 1 if name == "fab-t" else restarts
        return tools.fab.perturb(x, y)
    if name == "square":
        return tools.square.perturb(x, y)
    raise ConfigError(f"AutoAttack has no attack {name!r}")


def run_autoattack(
    forward: Forward, x: torch.Tensor, y: torch.Tensor, *, chunk_ids: np.ndarray, protocol: Protocol
) -> Outcome:
    """Attack one chunk's correctly classified samples with the whole ensemble, each attack on what is left.

    Args:
        forward: x -> logits, normalisation inside, in eval mode.
        x: (N, C, H, W) float32 in [0, 1]; all must be classified correctly.
        y: (N,) int64.
        chunk_ids: ids of the whole chunk, wrong samples included: what the seed is made of.

    Raises:
        ValueError: where the input is not inside [0, 1] (AutoAttack would leave the ball without a word).
    """
    if x.numel() and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"AutoAttack needs pixels in [0, 1], got [{x.min():g}, {x.max():g}]")
    outcome = Outcome.unbroken(y)
    if not len(y):
        return outcome
    seed = chunk_seed(protocol.seed, chunk_ids)
    with isolated_generators(x.device), _silent_logger(), torch.no_grad():
        tools = _toolbox(forward, protocol, x.device, seed)
        for number, name in enumerate(protocol.attacks):
            left = torch.nonzero(~outcome.broken).squeeze(1)
            if not len(left):
                break
            for part in (tools.apgd, tools.apgd_targeted, tools.fab, tools.square):
                part.seed = seed
            adv = _run_one(
                tools, name, x[left].clone(memory_format=torch.contiguous_format), y[left].clone(), protocol.restarts
            )
            adv = inside_ball(adv, x[left], eps=protocol.eps / 255, norm=protocol.norm)
            logits = forward(adv)
            outcome.record(left, logits, F.cross_entropy(logits, y[left], reduction="none"), y[left], number)
    return outcome
