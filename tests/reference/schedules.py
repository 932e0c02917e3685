"""Learning rate and radius at a step, from the papers and their codes, in exact fractions of an epoch."""

from __future__ import annotations

import math
from fractions import Fraction


def epochs(number: float) -> Fraction:
    """Return a time of a recipe as the fraction that its digits say: 0.1 is a tenth."""
    return Fraction(str(number))


def number_of_steps(recipe: dict, steps_per_epoch: int) -> int:
    return max(1, round(epochs(recipe["train"]["epochs"]) * steps_per_epoch))


def warm_up(step: int, steps_per_epoch: int, length: float, form: str) -> Fraction | None:
    """Return the share of the full value at a step, None once warm-up is over.

    "linear": from nothing at step 0 to everything at the end. "overshoot": Pang et al.'s code, whose clock stands at
    t = (step + 1) / steps an epoch and whose factor is (t + 1) / n while t < n.
    """
    n = epochs(length)
    time = Fraction(step + (form == "overshoot"), steps_per_epoch)
    if time >= n:
        return None
    return (time + 1) / n if form == "overshoot" else time / n


def learning_rate(step: int, recipe: dict, steps_per_epoch: int) -> float:
    """Return the rate of a step (from 0)."""
    schedule, optimizer, batch = recipe["schedule"], recipe["optimizer"], recipe["train"]["batch_size"]
    full = optimizer["lr"]
    if optimizer["lr_per"] is not None:  # Goyal et al. 2017: proportional to the batch
        full = full * batch / optimizer["lr_per"]
    share = warm_up(step, steps_per_epoch, schedule["warmup_epochs"], schedule["warmup_form"])
    if share is not None:
        low = (schedule["warmup_start"] or 0.0) if schedule["warmup_form"] == "linear" else 0.0
        return low + (full - low) * float(share)
    time, end = Fraction(step, steps_per_epoch), Fraction(number_of_steps(recipe, steps_per_epoch), steps_per_epoch)
    name, low = schedule["name"], schedule["final_lr"]
    if name == "constant":
        return full
    if name == "piecewise":
        # Xie & Yuille: after so many epochs. Pang et al.'s code: its clock has gone on at the last iteration already.
        clock = time + (Fraction(1, steps_per_epoch) if schedule["boundary"] == "last_iteration" else 0)
        if schedule["boundary"] == "counted_from_one":  # TRADES' code: for epoch in 1, 2, ...: epoch >= milestone
            clock = Fraction(1 + step // steps_per_epoch)
        return full * schedule["factor"] ** len([m for m in schedule["milestones"] if clock >= epochs(m)])
    if name == "exponential":  # a staircase (the ALP code: x 0.94 every two epochs)
        return full * schedule["factor"] ** math.floor(time / epochs(schedule["decay_every"]))
    if name == "cosine":  # Loshchilov & Hutter 2017, eq. 5, from the end of warm-up on
        begin = epochs(schedule["warmup_epochs"])
        return low + (full - low) / 2 * (1 + math.cos(math.pi * float((time - begin) / (end - begin))))
    if name == "cyclic":  # Wong et al. 2020: up in a straight line and down again
        peak = end / 2 if schedule["peak_epoch"] is None else epochs(schedule["peak_epoch"])
        height = time / peak if time < peak else (end - time) / (end - peak)
        return low + (full - low) * float(height)
    raise NotImplementedError(f"the reference knows no schedule {name!r}: write its formula here")


def tolerance(step: int, attack: dict, steps_per_epoch: int) -> dict:
    """Return the attack of a step: Pang et al.'s code adds one to the counter from each epoch on, by its clock."""
    if attack["early_stop"] is None:
        return attack
    time = Fraction(step + 1, steps_per_epoch)
    more = len([e for e in attack["early_stop_epochs"] if time >= epochs(e)])
    return {**attack, "early_stop": attack["early_stop"] + more}


def radius(step: int, attack: dict | None, steps_per_epoch: int) -> float:
    """Return eps of a step, in /255; 0 without an attack."""
    if attack is None:
        return 0.0
    share = warm_up(step, steps_per_epoch, attack["eps_warmup_epochs"], attack["eps_warmup_form"])
    return attack["eps"] * (1.0 if share is None else float(share))
