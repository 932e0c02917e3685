"""The training loop: data -> attack -> objective -> backward -> step -> events -> checkpoint and evaluation.

One step is a pure function of (weights, step number, recipe); everything that is kept between steps is in
``state.py``. Building the parts is ``builder.py``; this file only runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from distributed_at.engine.clock import StepClock
from distributed_at.engine.microbatches import MicroBatch, MicroBatches
from distributed_at.engine.nonfinite import (
    FINE,
    GRADIENT,
    LOSS,
    SPIKE,
    WORDS,
    offending_ids,
)
from distributed_at.engine.processes.notes import Notes
from distributed_at.engine.processes.preemption import agree_max
from distributed_at.engine.processes.watchdog import StepTimes
from distributed_at.engine.processes.world import gather_all, sum_over_ranks
from distributed_at.engine.saving import Checkpoints
from distributed_at.engine.state import TrainingState
from distributed_at.engine.validation import Validator
from distributed_at.errors import CheckpointError, DivergedError
from distributed_at.objectives import Terms
from distributed_at.observe.events import EventLog

_AFTER_STEP = 32  # forwards of a sample before the optimiser's step have smaller numbers
SLOW_SECONDS = 0.02  # a rank that is later by less holds nobody up


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended: 'finished', 'stopped' (asked to, saved), or on held-out images 'early' (no progress) or 'collapsed'."""

    reason: str
    step: int


class Trainer:
    """Runs a recipe from where its folder stands to its end, or to the next polite request to stop."""

    def __init__(
        self,
        state: TrainingState,
        checkpoints: Checkpoints,
        validator: Validator | None,
        events: EventLog | None,
        *,
        stop_requested: Callable[[], bool] = lambda: False,
        on_step: Callable[[int], None] = lambda step: None,
        watch: Callable[[str], AbstractContextManager[None]] = lambda section: nullcontext(),
        notes: Notes | None = None,
        warnings: Sequence[tuple[str, str]] = (),
    ) -> None:
        """``warnings``: (code, message) of what is known to be doubtful before the first step; they go into the events."""
        self.state = state
        self.parts = parts = state.parts
        self.config = parts.config
        self.world = parts.world
        self.guard, self.early, self.meters = state.guard, state.early, state.meters
        self._checkpoints = checkpoints
        self._validator = validator
        self._events = events
        self._stop_requested = stop_requested
        self._on_step = on_step
        self._watch = watch
        self._notes = notes
        self._warnings = warnings
        self._clock = StepClock(parts.world.device)
        self._times = StepTimes()
        self._slow: set[int] = set()
        self._suspected: set[str] = set()
        self._save_asked = False  # agreed in every step

    def run(self) -> RunOutcome:
        """Train to the end of the recipe, resuming from the folder's newest good checkpoint."""
        p = self.parts
        resumed = self._checkpoints.resume()
        self.meters.start_at(self.state.step)
        started_from = {} if p.initial_weights is None else {"initial_weights": p.initial_weights}
        self._event(
            "restart" if resumed else "run_start",
            world_size=self.world.world_size,
            total_steps=p.total_steps,
            **started_from,
        )
        for code, message in self._warnings:
            self._event("warning", code=code, message=message)
        for message in p.data.changed:
            self._event("warning", code="data_changed", message=message)
        if not resumed and self.config.train.on_nonfinite == "rollback":
            self._checkpoints.save_if_due(force=True)  # something to go back to from the first step on
        while (reason := self._loop()) == "rollback":
            self._go_back()
        if self._checkpoints.failure is not None and reason != "stopped":
            raise CheckpointError(
                f"training has come to its end, but its last checkpoint could not be written: {self._checkpoints.failure}. "
                "Make room and give the same command again: it repeats the steps since the checkpoint before."
            )
        self._event("run_end", reason=reason)
        return RunOutcome(reason, self.state.step)

    def _loop(self) -> str:
        p = self.parts
        first = self.state.step
        batches = MicroBatches(
            p.source,
            p.order,
            p.plan,
            rank=self.world.rank,
            device=self.world.device,
            seed=self.config.seed,
            first_step=first,
            last_step=p.total_steps,
            prefetch=self.config.data.prefetch,
        )
        try:
            for step in range(first, p.total_steps):
                if self.early.should_stop:  # a resumed run had stopped already
                    return self.early.ending
                self._on_step(step)
                with self._watch("setup" if step == first else "step"):  # the first step may compile
                    stop, back = self._step(batches, step)
                    if not back:
                        self._log_if_due(step)
                if back or not self._finish_step(stop):
                    return "rollback"
                if stop:
                    return "stopped"
            return self.early.ending if self.early.should_stop else "finished"
        finally:
            batches.close()
            with self._watch("checkpoint"):
                self._checkpoints.wait()

    def _step(self, batches: MicroBatches, step: int) -> tuple[bool, bool]:
        """Compute one step; return whether all ranks are to stop after it, and whether they are to go back."""
        p = self.parts
        with self._clock.section("data"):
            micros = batches.next_step()
        p.start_step(step)
        passed_over = step in self.guard.skipped
        if not passed_over:
            with self._clock.section("attack"):
                p.refresh_views()
                for check in p.view_checks:
                    check.compare(step, micros[0].batch)
            micros = [replace(micro, batch=p.objective.prepare(micro.batch)) for micro in micros]
        done = [] if passed_over else [self._micro_step(index, micro, step) for index, micro in enumerate(micros)]
        with self._clock.section("communication"):
            stop, bad = self._agree(done, micros)
        back = False
        if bad:
            p.buffers.restore()
            back = self._judge(done, micros, step, WORDS[bad])
        elif not passed_over:
            self._after_step(micros, step)
            with self._clock.section("communication"):
                p.buffers.finish_step()
            if p.twin_check is not None:
                p.twin_check.stepped(step)
            if p.average is not None:  # last: it may average the statistics too, and they are the step's by now
                p.average.update(step)
            self.guard.passed()
        self.state.step = step + 1
        return stop, back

    def _finish_step(self, stop: bool) -> bool:
        """Evaluate and save where it is due; False where the weights turned out not to be finite."""
        with self._watch("evaluation"):
            self._validate_if_due()
        finished = self.state.step == self.parts.total_steps
        with self._clock.section("checkpoint"), self._watch("checkpoint"):
            last = finished or self.early.should_stop
            saved = self._checkpoints.save_if_due(asked=self._save_asked, force=stop or last, patient=last and not stop)
        if not saved:
            self._event("nonfinite", at_step=self.state.step - 1, what="weights", sample_ids=[])
            self.guard.failed(self.state.step - 1, "weight", weights_stay=False)
        return saved

    def _go_back(self) -> None:
        """Load the last good checkpoint; the steps in ``guard.skipped`` are then passed over."""
        failed_at = self.state.step
        if not self._checkpoints.resume():
            raise DivergedError(f"a step before {failed_at} is not finite and there is no checkpoint to go back to")
        self.guard.check_progress(self.state.step)
        self.meters.start_at(self.state.step)
        self._event("rollback", from_step=failed_at, skipped=sorted(self.guard.skipped))

    def _micro_step(self, index: int, micro: MicroBatch, step: int) -> Terms:
        """Attack, objective, backward of one micro-batch; the optimiser steps at the last one."""
        p, batch = self.parts, micro.batch
        if index == 0:
            p.buffers.begin_step()
        p.buffers.begin_group()
        adv = None
        if p.attack is not None:
            with self._clock.section("attack"):
                assert p.twin is not None
                iteration = p.iteration
                if p.twin_check is not None:
                    p.twin_check.compare(step, batch)
                    iteration = p.twin_check.watching(step, iteration or p.attack.iteration(p.twin))
                # a batch that is used again begins from starts of its own
                attack = replace(p.attack, first_draw=batch.repeat * p.attack.restarts) if batch.repeat else p.attack
                attack = replace(attack, early_stop=p.schedules.early_stop(step))
                adv = attack.perturb(
                    p.twin,
                    batch.images,
                    batch.labels,
                    sample_ids=batch.ids,
                    epoch=batch.epoch,
                    seed=self.config.seed,
                    group_ids=batch.group_ids,
                    eps=p.schedules.eps(step) / 255.0,
                    soft_labels=batch.soft_labels if p.attack.takes_soft_labels else None,
                    iteration=iteration,
                )
        with self._clock.section("train"):
            p.engine.begin_batch(batch, self.config.seed)
            with p.objective.around(p.engine.module, batch, adv):
                terms = p.objective.loss(p.engine.forward, batch, adv)
                # DeepSpeed averages over W * k equal forwards; this weight makes it the mean over the batch's samples.
                scale = micro.weight * p.plan.world_size * p.plan.accumulation
                loss = terms.loss * scale if micro.weight else torch.nan_to_num(terms.loss) * 0.0
                p.engine.backward(loss)
            p.objective.before_step(p.engine.module, batch, last=index + 1 == p.plan.accumulation)
            p.engine.step()
        p.buffers.end_group(micro.weight)
        if micro.weight:
            self.meters.add(terms, batch.labels, unlabelled=batch.unlabelled)
        return replace(terms, loss=terms.loss.detach())

    def _after_step(self, micros: list[MicroBatch], step: int) -> None:
        """What an objective does with the new weights, group by group."""
        p = self.parts
        if p.objective.has_after_step:
            with self._clock.section("train"):
                for index, micro in enumerate(micros):
                    p.buffers.resume_group(index)
                    p.engine.begin_batch(micro.batch, self.config.seed, forward=_AFTER_STEP)
                    p.objective.after_step(p.engine.forward, micro.batch)
                    p.buffers.update_group(index)

    def _agree(self, done: list[Terms], micros: list[MicroBatch]) -> tuple[bool, int]:
        """Agree over ranks: is any asked to stop, and did anything of this step go wrong (``nonfinite``'s codes)?"""
        bad = FINE
        if done and not bool(torch.isfinite(torch.stack([terms.loss.float() for terms in done])).all()):
            bad = LOSS
        elif done and not self.parts.engine.step_applied:
            bad = GRADIENT
        flags = (self._stop_requested(), self.world.is_main and self._checkpoints.asks(), bad)
        stop, save, bad = agree_max([int(flag) for flag in flags], group=self.world.control)
        self._save_asked = bool(save)
        if done and not bad and self.guard.watches_jumps:
            own = sum(terms.loss.double() * micro.weight for terms, micro in zip(done, micros, strict=True))
            if self.guard.jumps(float(sum_over_ranks(self.world, torch.as_tensor(own)))):
                bad = SPIKE
        return bool(stop), bad

    def _judge(self, done: list[Terms], micros: list[MicroBatch], step: int, what: str) -> bool:
        """Record a bad step with its samples; return whether to go back. Raises DivergedError where that is the end."""
        ids = gather_all(offending_ids(done, [micro.batch.ids for micro in micros]), self.world)
        self._event("nonfinite", at_step=step, what=what, sample_ids=[i for own in ids for i in own])
        return self.guard.failed(step, what) == "rollback"

    def _log_if_due(self, step: int) -> None:
        if (step + 1) % self.config.log.every_steps == 0 or step + 1 == self.parts.total_steps:
            self._log_step(step)

    def _log_step(self, step: int) -> None:
        p = self.parts
        seconds, wall = self._clock.collect()
        values, images = self.meters.collect(
            lambda sums: sum_over_ranks(self.world, sums), lambda names: gather_all(names, self.world)
        )
        steps = self.meters.steps_since(step)
        self._event(
            "train",
            **values,
            lr=p.schedules.learning_rate(step),
            **({} if (momentum := p.schedules.momentum(step)) is None else {"momentum": momentum}),
            eps=p.schedules.eps(step) if self.config.attack is not None else 0.0,
            images_per_second=images / max(wall, 1e-9),
            seconds=seconds,
            wall_seconds=wall,
            total_steps=p.total_steps,
        )
        self._times.record((seconds["data"] + seconds["attack"]) / max(steps, 1))  # before the step's first collective
        self._name_slow_ranks()
        for code, message in self._notes.collect(self.world) if self._notes is not None else ():
            self._event("warning", code=code, message=message)

    def _name_slow_ranks(self) -> None:
        """Warn where other ranks than before hold the step up."""
        slow = self._times.stragglers(group=self.world.control, least=SLOW_SECONDS)
        if {s.rank for s in slow} != self._slow:
            self._slow = {s.rank for s in slow}
            told = ", ".join(f"rank {s.rank} on {s.host} ({s.ratio:.1f} times the median)" for s in slow)
            message = f"slow ranks hold every step up: {told}" if slow else "no rank is slow any more"
            self._event("warning", code="slow_ranks", message=message)

    def _validate_if_due(self) -> None:
        steps_per_epoch = self.parts.order.steps_per_epoch
        if self._validator is None or not self._validator.is_due(
            self.state.step, steps_per_epoch, self.parts.total_steps
        ):
            return
        with self._clock.paused():  # an evaluation is not part of a step's time
            results = self._validator.run(self.parts)
        for result in results:
            self._event("evaluation", **result.event())
        for verdict in self._validator.verdicts:
            if verdict.code not in self._suspected:  # once a start: a round after another would say the same
                self._suspected.add(verdict.code)
                self._event("warning", code=verdict.code, message=f"held-out images: {verdict.message}")
        improved = self.early.update(self.state.step, results, steps_per_epoch)
        if improved:
            self._checkpoints.mark_best(self.early.best)
        if self.early.collapse is not None:
            before, after = self.early.collapse
            self._event(
                "warning",
                code="collapse",
                message=f"held-out robust accuracy fell from {before:.1%} to {after:.1%}, more than train.stop_on_drop "
                f"{self.config.train.stop_on_drop:g} allows: training stops, and the best weights before it stand",
            )

    def _event(self, kind: str, **fields: object) -> None:
        if self._events is not None:
            self._events.write(kind, step=self.state.step, epoch=self.state.epoch, **fields)
