"""One worker's life: process group, lock, run folder, parts, training, and a clean way out with the right exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Any

from distributed_at.config import RunConfig
from distributed_at.engine.builder import build_parts
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.processes.failures import lost_rank, rank_and_host, what_was_lost, write_failure
from distributed_at.engine.processes.launch import detect_rank
from distributed_at.engine.processes.leaving import before_leaving
from distributed_at.engine.processes.notes import Notes
from distributed_at.engine.processes.preemption import StopListener, start_listening
from distributed_at.engine.processes.rendezvous import refuse, set_up_is_over
from distributed_at.engine.processes.watchdog import Watchdog, section_timeouts
from distributed_at.engine.processes.world import World, from_main, import_deepspeed, initialise_world, shutdown_world
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.lock import RunLock
from distributed_at.engine.runs.views import remote_views
from distributed_at.engine.saving import Checkpoints
from distributed_at.engine.state import TrainingState
from distributed_at.engine.trainer import RunOutcome, Trainer
from distributed_at.engine.validation import Validator
from distributed_at.errors import EXIT_HANG, EXIT_OK, EXIT_REQUEUE, UserError
from distributed_at.models.norm import bn_layers
from distributed_at.observe.console import ConsoleView
from distributed_at.observe.environment import changes, collect_environment, read_environment, write_environment
from distributed_at.observe.events import EventLog, View, next_restart
from distributed_at.observe.secrets import without_secrets
from distributed_at.plan_warnings import plan_warnings


def run_training(
    config: RunConfig, folder: RunFolder, *, fresh: bool = False, quiet: bool = False, accept_data: bool = False
) -> int:
    """Train on this rank; return the exit code that every rank ends with."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    stop = start_listening(leave_set_up_with=EXIT_REQUEUE)  # a long set-up must be stoppable too
    import_deepspeed()
    world = initialise_world(config.parallel.timeout_seconds)
    lock: RunLock | None = None
    events: EventLog | None = None
    watchdog: Watchdog | None = None
    together = False
    try:
        lock = _enter_folder(world, config, folder, fresh)
        watchdog = Watchdog(folder.logs, rank=world.rank, timeouts=section_timeouts(config.parallel.timeout_seconds))
        events = _open_events(world, config, folder, lock, quiet)
        if lock is not None:
            before_leaving(lock.release)
        with watchdog.section("setup"):
            outcome = _train(world, config, folder, lock, events, watchdog, stop, quiet=quiet, accept_data=accept_data)
        together = True
    finally:
        if watchdog is not None:
            watchdog.close()
        if events is not None:
            events.close()
        if lock is not None:
            lock.release()
        shutdown_world(together=together)
    return EXIT_REQUEUE if outcome.reason == "stopped" else EXIT_OK


def run_worker(
    config: RunConfig, folder: RunFolder, *, fresh: bool = False, quiet: bool = False, accept_data: bool = False
) -> int:
    """``run_training`` as a process of its own: tells what went wrong and ends at once with the right exit code.

    After a failure nothing is tidied: other ranks may wait in a collective until this process is gone.
    """
    try:
        return run_training(config, folder, fresh=fresh, quiet=quiet, accept_data=accept_data)
    except UserError as error:
        code, told = error.exit_code, f"distributed-at: error: {error}"
        refuse(error, code, detect_rank())
    except Exception as error:
        path = write_failure(folder.logs)
        if lost_rank(error):
            code = EXIT_HANG
            told = (
                f"distributed-at: error: rank {rank_and_host()} lost another rank: {what_was_lost(error)} (see {path})"
            )
        else:
            code, told = 1, traceback.format_exc()
            refuse(error, code, detect_rank())
    print(without_secrets(told), file=sys.stderr, flush=True)
    sys.stdout.flush()
    logging.shutdown()
    os._exit(code)


def _enter_folder(world: World, config: RunConfig, folder: RunFolder, fresh: bool) -> RunLock | None:
    """Take the run's lock and prepare its folder on rank 0; a refusal there ends every rank with the same message."""
    refusal: UserError | None = None
    lock: RunLock | None = None
    if world.is_main:
        try:
            folder.check(config)
            lock = RunLock(folder.root).acquire()
            folder.prepare(config)
            if fresh:
                folder.set_aside()
        except UserError as error:
            refusal = error
    told = from_main(refusal, world)
    if told is not None:
        if lock is not None:
            lock.release()
        raise told
    return lock


def _open_events(world: World, config: RunConfig, folder: RunFolder, lock: RunLock | None, quiet: bool) -> EventLog:
    if not world.is_main:
        return EventLog(folder.root, enabled=False)
    restart = next_restart(folder.root)
    before = read_environment(folder.root)
    environment = collect_environment(restart=restart, world_size=world.world_size)
    write_environment(folder.root, environment)
    views: list[View] = (
        [] if quiet else [ConsoleView(file=sys.stderr, name=config.name, total_epochs=config.train.epochs)]
    )
    views += remote_views(config, folder)
    events = EventLog(folder.root, restart=restart, views=views)
    if lock is not None and lock.took_over is not None:
        message = f"the folder's lock was left by {lock.took_over}"
        events.write("warning", step=0, epoch=0.0, code="lock_taken_over", message=message)
    if before and (changed := changes(before, environment)):
        message = f"this start differs from the one before: {', '.join(changed)}; it need not be bitwise the same run"
        events.write("warning", step=0, epoch=0.0, code="environment_changed", message=message)
    return events


def _train(
    world: World,
    config: RunConfig,
    folder: RunFolder,
    lock: RunLock | None,
    events: EventLog,
    watchdog: Watchdog,
    stopping: StopListener,
    *,
    quiet: bool,
    accept_data: bool,
) -> RunOutcome:
    def on_checkpoint_event(kind: str, fields: dict[str, Any]) -> None:
        step = int(fields.pop("step", 0))
        events.write(kind, step=step, epoch=step / parts.order.steps_per_epoch, **fields)
        events.sync()

    manager = CheckpointManager(
        folder.checkpoints,
        keep=config.checkpoint.keep,
        keep_every_epochs=config.checkpoint.keep_every_epochs,
        on_event=on_checkpoint_event,
        timeout_seconds=config.parallel.timeout_seconds,
    )
    manager.probe()
    notes = Notes()
    parts = build_parts(config, world, folder, warn=notes.add, accept_data=accept_data)
    validator = Validator(config, world, warn=notes.add, alive=watchdog.beat) if config.evaluation.validation else None
    warnings = plan_warnings(
        config,
        parts.plan,
        num_train=parts.source.num_samples,
        has_batch_norm=any(True for _ in bn_layers(parts.engine.module)),
    )
    doubts = [(w.code, w.message) for w in warnings if w.level == "warning"]
    for code, message in doubts if quiet and world.is_main else ():  # no console shows the events
        print(f"warning: {code}: {message}", file=sys.stderr, flush=True)
    state = TrainingState(parts)
    trainer = Trainer(
        state,
        Checkpoints(manager, config.checkpoint, state, lock),
        validator,
        events,
        stop_requested=stopping.stop_requested,
        watch=watchdog.section,
        notes=notes,
        warnings=doubts,
    )
    set_up_is_over()
    stopping.set_up_is_over()
    try:
        outcome = trainer.run()
    finally:
        manager.close()
    parts.engine.close()  # not after a failure: on a GPU it waits for what may never end
    return outcome
