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
    schedule = _ticking(recipe, steps_per_epoch)
    optimizer, batch = recipe["optimizer"], recipe["train"]["batch_size"]
    full = optimizer["lr"]
    if optimizer["lr_per"] is not None:  # Goyal et al. 2017: proportional to the batch
        full = full * batch / optimizer["lr_per"]
    share = warm_up(step, steps_per_epoch, schedule["warmup_epochs"], schedule["warmup_form"])
    if share is not None:
        low = (schedule["warmup_start"] or 0.0) if schedule["warmup_form"] == "linear" else 0.0
        return low + (full - low) * float(share)
    time, end = _clock(step, recipe, steps_per_epoch)
    name, low = schedule["name"], schedule["final_lr"]
    if name == "constant":
        return full
    if name == "piecewise":
        # Xie & Yuille: after so many epochs. Pang et al.'s code: its clock has gone on at the last iteration already.
        clock = time + (Fraction(1, steps_per_epoch) if schedule["boundary"] == "last_iteration" else 0)
        if schedule["boundary"] == "counted_from_one":  # TRADES' code: for epoch in 1, 2, ...: epoch >= milestone
            clock = Fraction(1 + step // steps_per_epoch)
        if schedule["boundary"] == "after_warmup":  # Gowal et al.'s code joins a schedule of its own to the warm-up
            clock -= epochs(schedule["warmup_epochs"])
        for number, milestone in enumerate(schedule["milestones"]):
            if clock >= epochs(milestone):  # FAT's code: 0.1, 0.01, 0.005
                full *= schedule["factors"][number] if schedule["factors"] else schedule["factor"]
        return full
    if name == "points":  # Pang et al.'s code: numpy.interp, and "lineardecay", which jumps before it falls to 0
        clock = time + (Fraction(1, steps_per_epoch) if schedule["boundary"] == "last_iteration" else 0)
        share = None
        for (a, low_share), (b, high_share) in zip(schedule["points"], schedule["points"][1:], strict=False):
            if epochs(a) <= clock < epochs(b):
                weight = float((clock - epochs(a)) / (epochs(b) - epochs(a)))
                share = (1 - weight) * low_share + weight * high_share
        return full * (schedule["points"][-1][1] if share is None else share)
    if name == "exponential":  # a staircase (the ALP code: x 0.94 every two epochs), or without stairs
        power = time / epochs(schedule["decay_every"])
        return full * schedule["factor"] ** (math.floor(power) if schedule["staircase"] else float(power))
    if name == "cosine":  # Loshchilov & Hutter 2017, eq. 5, from the end of warm-up on
        begin = epochs(schedule["warmup_epochs"])
        return low + (full - low) / 2 * (1 + math.cos(math.pi * float((time - begin) / (end - begin))))
    if name == "cyclic":  # Wong et al. 2020: up in a straight line and down again
        return low + (full - low) * _height(time, end, schedule)
    if name == "onecycle":
        rising = time < _peak(time, end, schedule)
        below = full / schedule["start_divisor"] if rising else low
        return below + (full - below) * _height(time, end, schedule)
    raise NotImplementedError(f"the reference knows no schedule {name!r}: write its formula here")


def _clock(step: int, recipe: dict, steps_per_epoch: int) -> tuple[Fraction, Fraction]:
    """Return the time of a step and the end of the run, in epochs; some codes look at the clock once an epoch."""
    end = Fraction(number_of_steps(recipe, steps_per_epoch), steps_per_epoch)
    if recipe["schedule"]["changes"] == "epoch":
        return Fraction(step // steps_per_epoch), Fraction(math.ceil(end))
    return Fraction(step, steps_per_epoch), end


def _height(time: Fraction, end: Fraction, schedule: dict) -> float:
    """Return how far up the cycle the rate is: torch's CyclicLR in straight lines, its OneCycleLR on two half cosines."""
    peak = _peak(time, end, schedule)
    if schedule["name"] == "cyclic":
        return float(time / peak if time < peak else (end - time) / (end - peak))
    away = (peak - time) / peak if time < peak else (time - peak) / (end - schedule["tick"] - peak)
    return (1 + math.cos(math.pi * float(away))) / 2


def _peak(time: Fraction, end: Fraction, schedule: dict) -> Fraction:
    if schedule["name"] == "cyclic":
        return end / 2 if schedule["peak_epoch"] is None else epochs(schedule["peak_epoch"])
    length = Fraction(3, 10) * end if schedule["peak_epoch"] is None else epochs(schedule["peak_epoch"])
    return length - schedule["tick"]  # torch counts steps from 0: the last of so many is the peak


def momentum(step: int, recipe: dict, steps_per_epoch: int) -> float | None:
    """Return the momentum of a step, where the cycle moves it too: torch's cycle_momentum."""
    schedule, base = _ticking(recipe, steps_per_epoch), recipe["optimizer"]["momentum"]
    if schedule["momentum_at_peak"] is None:
        return None
    time, end = _clock(step, recipe, steps_per_epoch)
    return base - (base - schedule["momentum_at_peak"]) * _height(time, end, schedule)


def _ticking(recipe: dict, steps_per_epoch: int) -> dict:
    """Return the schedule with the time between two of its values, in epochs."""
    tick = Fraction(1) if recipe["schedule"]["changes"] == "epoch" else Fraction(1, steps_per_epoch)
    return {**recipe["schedule"], "tick": tick}


def tolerance(step: int, attack: dict, steps_per_epoch: int) -> dict:
    """Return the attack of a step: Pang et al.'s and FAT's codes add one to the counter from each epoch on, by their clocks."""
    if attack["early_stop"] is None:
        return attack
    time = Fraction(step + (attack["early_stop_boundary"] == "last_iteration"), steps_per_epoch)
    more = len([e for e in attack["early_stop_epochs"] if time >= epochs(e)])
    return {**attack, "early_stop": attack["early_stop"] + more}


def radius(step: int, attack: dict | None, steps_per_epoch: int) -> float:
    """Return eps of a step, in /255; 0 without an attack."""
    if attack is None:
        return 0.0
    share = warm_up(step, steps_per_epoch, attack["eps_warmup_epochs"], attack["eps_warmup_form"])
    return attack["eps"] * (1.0 if share is None else float(share))
