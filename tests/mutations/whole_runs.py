"""The faults that adversarial-training code has most often outside of its attack and loss, planted where they would be here.

Who reads which image, what resuming needs, whose statistics move, what selects a checkpoint, what an evaluation counts.
"""

from tests.mutations.mutation import Mutation

_RESUMED = (
    "tests/integration/test_resume_matrix.py::test_resume_in_the_middle_of_an_epoch_is_bitwise_the_undisturbed_run"
)
_EVERY_IMAGE = (
    "tests/unit/test_evaluation_runner.py::test_a_whole_split_is_every_image_however_many_and_every_row_is_kept"
)

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "rank = local_rank",
        "engine/processes/launch.py",
        'Rank(int(environ["RANK"]), int',
        'Rank(int(environ.get("LOCAL_RANK", 0)), int',
        "tests/unit/test_launch.py::test_local_rank_is_not_the_rank",
    ),
    Mutation(
        "resume loads only weights",
        "engine/saving.py",
        "self._manager.load_latest(self._state.tensors)",
        'self._manager.load_latest(lambda: {n: t for n, t in self._state.tensors().items() if n.startswith("model.")})',
        _RESUMED + "[pgd_at-bn-sgd-piecewise-none]",
    ),
    Mutation(
        "resume starts the epoch again",
        "engine/state.py",
        'self.step = int(metadata["step"])',
        'self.step = int(metadata["epoch"]) * metadata["steps_per_epoch"]',
        _RESUMED + "[pgd_at-bn-sgd-piecewise-none]",
    ),
    Mutation(
        "attack in train mode poisons BN statistics",
        "engine/builder.py",
        "engine.module, bn_mode=config.attack.bn_mode,",
        'engine.module, bn_mode="train",',
        "tests/integration/test_imagenet_stages.py::test_branches_of_a_mixture_never_contaminate_each_other",
    ),
    Mutation(
        "best checkpoint chosen on the test set",
        "engine/validation.py",
        'open_split(config.data, "validation",',
        'open_split(config.data, "test",',
        "tests/unit/test_validation.py::test_selection_sees_held_out_training_images_alone",
    ),
    Mutation(
        "evaluation on the first 1,000 images",
        "evaluation/source.py",
        "        return ids\n",
        "        return ids[:1000]\n",
        _EVERY_IMAGE,
    ),
    Mutation(
        "last incomplete batch dropped",
        "evaluation/kinds/base.py",
        "for i in range(0, len(missing), batch_size)]",
        "for i in range(0, len(missing) - batch_size + 1, batch_size)]",
        _EVERY_IMAGE,
    ),
    Mutation(
        "results printed, not kept",
        "evaluation/runner.py",
        "            ledger.append(rows)\n",
        "            print(rows)\n",
        _EVERY_IMAGE,
    ),
    Mutation(
        "normalised images given to AutoAttack",
        "evaluation/kinds/autoattack.py",
        "return run_autoattack(forward, x, y,",
        "return run_autoattack(forward, (x - 0.47) / 0.25, y,",
        "tests/unit/test_evaluation_autoattack.py::test_natural_model_falls_to_zero",
    ),
    Mutation(
        "clean loss for the log in train mode",
        "evaluation/isolation.py",
        "        model.eval()\n        for parameter",
        "        for parameter",
        "tests/unit/test_evaluation_runner.py::test_model_flags_buffers_and_generators_are_bitwise_as_before",
    ),
)
