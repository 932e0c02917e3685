"""Faults planted in engine/: checkpoints' files, and the processes, locks and folders of a run."""

from tests.mutations.mutation import Mutation

_CHECKPOINT = "tests/unit/test_checkpoint.py::"
_SHARDS = "tests/unit/test_checkpoint_shards.py::"
_RANKS = "tests/distributed/test_checkpoint_ranks.py::"
_NATIVE = "tests/unit/test_checkpoint_native.py::"
_STOP = "tests/distributed/test_preemption.py::"
_LOCK = "tests/unit/test_runlock.py::"
_LAUNCH = "tests/unit/test_launch.py::"
_CLOCK = "tests/unit/test_clock.py::"
_FOLDER = "tests/unit/test_runfolder.py::"
_HOSTILE = "tests/integration/test_hostile_files.py::"
_OTHER_WORLD = _RANKS + "test_fragments_written_by_two_ranks_open_on_one_and_three"

FILES: tuple[Mutation, ...] = (
    Mutation(
        "a background save writes what training changes meanwhile",
        "engine/checkpoint/manager.py",
        "shards = snapshot(shards, self._buffers)",
        "snapshot(shards, self._buffers)",
        _CHECKPOINT + "test_asynchronous_save_keeps_the_state_of_the_call",
    ),
    Mutation(
        "the oldest good checkpoint is resumed from",
        "engine/checkpoint/manager.py",
        "sorted(named, reverse=True)",
        "sorted(named)",
        _CHECKPOINT + "test_any_damage_to_any_file_is_found_and_the_previous_checkpoint_used",
    ),
    Mutation(
        "loaded values stay beside tensors that are not contiguous",
        "engine/checkpoint/manager.py",
        "                    shard.on_load()\n",
        "                    pass\n",
        _CHECKPOINT + "test_non_contiguous_tensors_are_filled_in_place_and_independent_of_memory_format",
    ),
    Mutation(
        "a checkpoint given by its path is not verified",
        "engine/checkpoint/manager.py",
        "content=ranks.broadcast(folder not in self._verified)",
        "content=ranks.broadcast(folder in self._verified)",
        _CHECKPOINT + "test_a_checkpoint_given_by_its_path_is_verified_before_anything_is_filled",
    ),
    Mutation(
        "the wait between attempts to save does not grow",
        "engine/checkpoint/manager.py",
        "2 ** (self._failures_in_row - 1)",
        "2 ** 0",
        _CHECKPOINT + "test_the_wait_after_a_failed_save_doubles_up_to_a_quarter_of_an_hour_and_begins_anew",
    ),
    Mutation(
        "one rank's full disk is not heard by the others",
        "engine/checkpoint/manager.py",
        "for r, (why, _) in enumerate(reports) if why]\n",
        "for r, (why, _) in enumerate(reports[:1]) if why]\n",
        _RANKS + "test_a_full_disk_on_one_rank_fails_the_save_on_all_and_the_next_one_works[False]",
    ),
    Mutation(
        "the pieces of a tensor leave out the last",
        "engine/checkpoint/shards.py",
        "for i in (piece, piece + 1))",
        "for i in (piece, min(piece + 1, max(pieces - 1, 1))))",
        _SHARDS + "test_shares_of_all_ranks_are_every_element_once",
    ),
    Mutation(
        "a piece is read from the beginning of what another rank wrote",
        "engine/checkpoint/reader.py",
        "piece.narrow(0, item.storage_offsets[0], item.lengths[0])",
        "piece.narrow(0, 0, item.lengths[0])",
        _CHECKPOINT + "test_rows_of_places_open_at_another_world_size",
    ),
    Mutation(
        "a piece is put at the beginning of its tensor",
        "engine/checkpoint/shards.py",
        "shard.local.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])",
        "shard.local.narrow(0, 0, read_item.lengths[0])",
        _OTHER_WORLD,
    ),
    Mutation(
        "a tensor of another dtype is read as it comes",
        "engine/checkpoint/shards.py",
        "elif saved.properties.dtype != shard.local.dtype:",
        "elif saved.properties.dtype.is_complex != shard.local.dtype.is_complex:",
        _CHECKPOINT + "test_what_does_not_fit_is_named_and_nothing_is_filled",
    ),
    Mutation(
        "contents are compared with the manifest's sizes alone",
        "engine/checkpoint/files.py",
        "        if digest != recorded:\n",
        "        if len(digest) != len(recorded):\n",
        _CHECKPOINT + "test_any_damage_to_any_file_is_found_and_the_previous_checkpoint_used",
    ),
    Mutation(
        "a checkpoint whose replacement was interrupted is swept away",
        "engine/checkpoint/files.py",
        "        if not (root / step_name(step)).exists():\n            os.rename",
        "        if (root / step_name(step)).exists():\n            os.rename",
        _CHECKPOINT + "test_saving_a_step_again_replaces_it_and_dying_between_the_renames_loses_nothing",
    ),
    Mutation(
        "the table of tensors may name any class",
        "engine/checkpoint/reader.py",
        "        if (module, name) not in _ALLOWED:\n",
        '        if module.startswith("os"):\n',
        _HOSTILE + "test_a_hostile_checkpoint_is_refused_by_a_run_that_would_resume_from_it",
    ),
    Mutation(
        "a period keeps its last checkpoint, not its first",
        "engine/checkpoint/retention.py",
        "for folder in reversed(folders):  # oldest first",
        "for folder in folders:",
        _CHECKPOINT + "test_retention_keeps_the_newest_the_best_and_one_a_period",
    ),
    Mutation(
        "an epoch that ends a period counts to the one before",
        "engine/checkpoint/retention.py",
        "epoch / keep_every_epochs + 1e-9",
        "epoch / keep_every_epochs",
        _CHECKPOINT + "test_an_epoch_that_is_a_whole_number_of_periods_begins_one",
    ),
    Mutation(
        "the best checkpoint is removed with the old ones",
        "engine/checkpoint/retention.py",
        "        staying.add(best)\n",
        "        staying.discard(best)\n",
        _CHECKPOINT + "test_retention_keeps_the_newest_the_best_and_one_a_period",
    ),
    Mutation(
        "parts of DeepSpeed's ranks are joined in the order of file names",
        "engine/checkpoint/native.py",
        "(match := _SHARD.search(path.name))),\n    )",
        "(match := _SHARD.search(path.name))),\n        key=lambda shard: shard[1].name,\n    )",
        _NATIVE + "test_parts_of_more_than_ten_ranks_keep_their_order",
    ),
    Mutation(
        "one rank's failure inside torch's save ends training",
        "engine/checkpoint/ranks.py",
        "        action()\n    except (Exception, CheckpointException) as error:",
        "        action()\n    except Exception as error:",
        _RANKS + "test_a_full_disk_on_one_rank_fails_the_save_on_all_and_the_next_one_works[False]",
    ),
)

PROCESSES: tuple[Mutation, ...] = (
    Mutation(
        "ranks stop only where all of them were asked",
        "exchange.py",
        "own = torch.maximum(own, others)",
        "own = torch.minimum(own, others)",
        _STOP + "test_all_ranks_stop_at_the_same_step_and_slow_ranks_are_named",
    ),
    Mutation(
        "a repeated signal within the grace leaves without saving",
        "engine/processes/preemption.py",
        "now - self._first_time >= self._grace_seconds",
        "now - self._first_time <= self._grace_seconds",
        _STOP + "test_usr1_storm_and_repeated_term_within_the_grace_are_one_request",
    ),
    Mutation(
        "the slowest rank is the measure of slowness",
        "engine/processes/watchdog.py",
        "statistics.median_low([seconds for _, seconds in found])",
        "max(seconds for _, seconds in found)",
        _STOP + "test_all_ranks_stop_at_the_same_step_and_slow_ranks_are_named",
    ),
    Mutation(
        "a hang leaves as an ordinary failure, which is not requeued",
        "engine/processes/watchdog.py",
        "        os._exit(EXIT_HANG)\n",
        "        os._exit(1)\n",
        "tests/unit/test_checkpoint_watchdog.py::test_a_hang_leaves_stacks_and_its_exit_code",
    ),
    Mutation(
        "a step of the running job takes its lock over",
        "engine/runs/lock.py",
        "holder.restart < me.restart",
        "holder.restart <= me.restart",
        _LOCK + "test_requeued_job_takes_over_its_own_lock",
    ),
    Mutation(
        "a process of another container counts as dead",
        "engine/runs/lock.py",
        " and holder.boot == me.boot and holder.namespace == me.namespace:",
        " and holder.boot == me.boot:",
        _LOCK + "test_process_of_another_container_on_this_host_is_judged_by_its_heartbeat",
    ),
    Mutation(
        "a process id that is used again keeps a lock alive",
        "engine/runs/lock.py",
        "_start_time(holder.pid) != holder.started or",
        "not _start_time(holder.pid) or",
        _LOCK + "test_dead_process_on_this_host_and_reused_pid_are_stale",
    ),
    Mutation(
        "leaving removes whoever's lock is there",
        "engine/runs/lock.py",
        "        if self.held():\n            with contextlib.suppress(OSError):\n                self.path.unlink()",
        "        if self._me is not None:\n            with contextlib.suppress(OSError):\n                self.path.unlink()",
        _LOCK + "test_heartbeat_keeps_the_lock_fresh_and_a_lost_lock_is_noticed_and_left_alone",
    ),
    Mutation(
        "rank = local_rank under srun",
        "engine/processes/launch.py",
        'Rank(int(environ["SLURM_PROCID"]), int',
        'Rank(int(environ.get("SLURM_LOCALID", 0)), int',
        _LAUNCH + "test_srun_gives_the_rank_and_the_rendezvous_of_its_launching_node",
    ),
    Mutation(
        "a requeued job waits at the port of its first start",
        "engine/processes/launch.py",
        "job * 131 + step * 17 + restart * 7",
        "job * 131 + step * 17",
        _LAUNCH + "test_a_requeued_job_meets_at_another_port",
    ),
    Mutation(
        "a diverged rank's exit code hides behind those that lost it",
        "engine/processes/launch.py",
        "key=lambda code: (code == EXIT_HANG, code != first_failure)",
        "key=lambda code: code != first_failure",
        _LAUNCH + "test_the_code_of_several_failing_ranks_is_the_one_that_explains_most",
    ),
    Mutation(
        "a section shows the seconds of its last visit",
        "engine/clock.py",
        "self._seconds[name] += time.perf_counter() - begin",
        "self._seconds[name] = time.perf_counter() - begin",
        _CLOCK + "test_sections_add_up_over_visits_and_the_rest_is_other",
    ),
    Mutation(
        "an evaluation slows the images per second down",
        "engine/clock.py",
        "self._wall_start += time.perf_counter() - begin",
        "self._wall_start += 0.0 * begin",
        _CLOCK + "test_an_evaluation_is_in_no_figure",
    ),
    Mutation(
        "a folder's other recipe goes on as if it were the same",
        "engine/runs/folder.py",
        "        if held == config:\n",
        "        if held.name == config.name:\n",
        _FOLDER + "test_another_recipe_is_refused_with_the_difference_and_the_same_one_goes_on",
    ),
    Mutation(
        "a fresh start goes on writing the old events",
        "engine/runs/folder.py",
        "for path in (self.events, self.checkpoints):",
        "for path in (self.checkpoints,):",
        _FOLDER + "test_fresh_starts_set_events_and_checkpoints_aside_each_time",
    ),
    Mutation(
        "the warnings of rank 0 alone are told",
        "engine/processes/notes.py",
        "for notes in gather_all(own, world) for note in notes",
        "for notes in gather_all(own, world)[:1] for note in notes",
        "tests/distributed/test_notes.py::test_notes_of_all_ranks_are_told_once_and_the_newest_are_kept",
    ),
    Mutation(
        "a lost rank is not recognised behind the error that it caused",
        "engine/processes/failures.py",
        "seen = seen.__cause__ or seen.__context__",
        "seen = None",
        "tests/unit/test_failures.py::test_a_lost_rank_is_recognised_behind_the_errors_that_it_caused",
    ),
    Mutation(
        "a process ends while its thread still asks the store",
        "engine/processes/rendezvous.py",
        "        atexit.register(stop_looking)\n",
        "",
        "tests/distributed/test_refusals.py::test_process_that_ends_while_it_looks_ends_with_its_own_exit_code",
    ),
    Mutation(
        "a rank that leaves at once keeps the run's lock",
        "engine/run.py",
        "            before_leaving(lock.release)\n",
        "            pass\n",
        "tests/distributed/test_refusals.py::test_rank_that_refuses_in_set_up_ends_all_with_its_message",
    ),
    Mutation(
        "a terminal that is gone stays where a run prints",
        "engine/processes/preemption.py",
        "                os.dup2(null, number)\n",
        "",
        "tests/distributed/test_preemption.py::test_what_is_printed_on_a_terminal_that_is_gone_ends_nothing",
    ),
)

MUTATIONS: tuple[Mutation, ...] = (*FILES, *PROCESSES)
