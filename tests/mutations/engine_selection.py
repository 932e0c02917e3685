"""Faults planted where a run's weights are chosen: validation, selection, and every door that opens a checkpoint."""

from tests.mutations.mutation import Mutation

_WEIGHTS = "tests/strangers/test_weights.py::"
_VALIDATION = _WEIGHTS + "test_every_validation_measured_the_averaged_weights_with_the_live_statistics"
_BEST = _WEIGHTS + "test_best_is_the_earliest_epoch_with_the_most_images_right_under_the_last_protocol"
_EVAL = _WEIGHTS + "test_eval_measures_the_checkpoint_that_it_was_asked_for"
_LEAVE = _WEIGHTS + "test_weights_that_leave_a_run_are_those_that_were_asked_for"
_SELECTION = "tests/strangers/test_selection.py::"
_EARLIEST = _SELECTION + "test_the_best_is_the_earliest_of_the_most_robust_epochs"
_PATIENCE = _SELECTION + "test_patience_is_counted_in_epochs_from_the_best"
_AVERAGE = _WEIGHTS + "test_averaged_statistics_are_measured_where_the_recipe_averages_them"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "validation of averaged weights measures the live ones",
        "engine/validation.py",
        "            parts.average.copy_into(self._network)\n",
        "            self._network.load_state_dict(parts.engine.module.state_dict())\n",
        _VALIDATION,
    ),
    Mutation(
        "validation measures the average of the first time again",
        "engine/validation.py",
        "self._network.eval()\n        if parts.average is not None:\n            parts.average.copy_into(self._network)\n",
        "self._network.eval()\n            if parts.average is not None:\n                parts.average.copy_into(self._network)\n",
        _VALIDATION,
    ),
    Mutation(
        "validation keeps the batch norm statistics of the first time",
        "engine/validation.py",
        "for n, b in module.named_buffers() if n not in parts.average.tensors}",
        "for n, b in module.named_buffers() if n in parts.average.tensors}",
        _VALIDATION,
    ),
    Mutation(
        "the first protocol selects, not the last",
        "engine/progress.py",
        "result = results[-1]",
        "result = results[0]",
        _EARLIEST,
    ),
    Mutation(
        "the latest of equals is the best",
        "engine/progress.py",
        'result.correct > self.best["correct"]',
        'result.correct >= self.best["correct"]',
        _EARLIEST,
    ),
    Mutation(
        "the worst epoch is the best",
        "engine/progress.py",
        'result.correct > self.best["correct"]',
        'result.correct < self.best["correct"]',
        _BEST,
    ),
    Mutation(
        "patience lasts an evaluation longer",
        "engine/progress.py",
        ">= self._patience * steps_per_epoch",
        "> self._patience * steps_per_epoch",
        _PATIENCE,
    ),
    Mutation(
        "patience is counted in steps",
        "engine/progress.py",
        ">= self._patience * steps_per_epoch",
        ">= self._patience",
        _PATIENCE,
    ),
    Mutation(
        "a restart forgets the best epoch",
        "engine/progress.py",
        'self.best, self.should_stop = state["best"], state["should_stop"]',
        'self.should_stop = state["should_stop"]',
        _SELECTION + "test_what_was_the_best_is_remembered_through_a_restart",
    ),
    Mutation(
        "every validation marks the best",
        "engine/trainer.py",
        "        if improved:\n",
        "        if results:\n",
        _BEST,
    ),
    Mutation(
        "the checkpoint that is marked best is the newest one saved",
        "engine/checkpoint/retention.py",
        "folder = root / files.step_name(step)\n",
        "folder = files.list_steps(root)[0][1]\n",
        _EVAL,
    ),
    Mutation(
        "'auto' is the best checkpoint wherever one is marked",
        "engine/runs/weights.py",
        'which = "best" if config.train.select == "best_validation" else "last"',
        'which = "best" if manager.best() is not None else "last"',
        _WEIGHTS + "test_eval_of_a_run_that_selects_the_last_takes_the_last",
    ),
    Mutation(
        "validation mixes live statistics into averaged ones",
        "engine/averaging.py",
        "targets: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}\n"
        "        for name, value in self.tensors.items():\n",
        "targets: dict[str, torch.Tensor] = dict(module.named_parameters())\n"
        "        for name, value in ((n, v) for n, v in self.tensors.items() if n in targets):\n",
        "tests/unit/test_averaging.py::test_statistics_are_averaged_only_where_the_recipe_says_so[average]",
    ),
    Mutation(
        "a run that selects its last weights hands on its best",
        "engine/runs/initial_weights.py",
        'if held.train.select == "best_validation" else None',
        "if held.train.select else None",
        _WEIGHTS + "test_eval_of_a_run_that_selects_the_last_takes_the_last",
    ),
    Mutation(
        "convert writes the live weights for the averaged ones",
        "engine/checkpoint/tools.py",
        'weights = "ema" if average else "model"',
        'weights = "model" if average else "ema"',
        _LEAVE,
    ),
    Mutation(
        "eval ignores which checkpoint it was asked for",
        "commands/eval.py",
        "checkpoint=args.checkpoint,",
        'checkpoint="auto",',
        _EVAL,
    ),
    Mutation(
        "eval of held-out images reads the test images",
        "commands/eval.py",
        "split=args.split,",
        'split="test",',
        _VALIDATION,
    ),
    Mutation(
        "a certificate of precision is of the last checkpoint",
        "commands/bench.py",
        "open_network(folder, config, args.checkpoint,",
        'open_network(folder, config, "last",',
        _WEIGHTS + "test_certificate_of_precision_is_of_the_network_that_eval_measures",
    ),
    Mutation(
        "figure 6 sets batches of averaged weights beside live statistics",
        "commands/figures.py",
        "average=False)",
        "average=True)",
        _WEIGHTS + "test_figures_speak_of_the_network_that_was_trained",
    ),
)
