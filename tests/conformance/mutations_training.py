"""Bugs planted in what objectives share, and in a copy of the loops around them."""

from tests.conformance.product import Mutation

LOOPS = "loops.py"

MUTATIONS = [
    Mutation(
        "training gradient flows into the attack", "objectives/base.py", "    return adv.detach()\n", "    return adv\n",
        "attack_gets_no_training_gradient",
    ),
    Mutation(
        "smoothing over K where K - 1 is meant", "objectives/labels.py",
        "wrong, true = smoothing / (num_classes - 1), 1.0 - smoothing",
        "wrong, true = smoothing / num_classes, 1.0 - smoothing", "smoothing_follows_its_convention",
    ),
    Mutation(
        "soft labels of a float64 run in float32", "objectives/labels.py",
        "dtype = torch.float32 if dtype is None else dtype", "dtype = torch.float32",
        "smoothing_follows_its_convention",
    ),
    Mutation(
        "rank = local_rank", LOOPS, "    share = batch_size // world_size\n",
        "    share = batch_size // world_size\n    rank = local_rank\n", "ranks_of_all_nodes_share_the_batch",
    ),
    Mutation(
        "resume loads only weights", LOOPS, 'for n, m in state["momentum"].items()}', 'for n, m in state["momentum"].items()}\n'
        "    momentum = {n: torch.zeros_like(m) for n, m in momentum.items()}", "resumed_training_continues_bitwise",
    ),
    Mutation(
        "resume starts the epoch again", LOOPS, 'for step in range(state["step"], steps):',
        'for step in range(0, steps - state["step"]):', "resumed_training_continues_bitwise",
    ),
    Mutation(
        "attack in train mode poisons BN statistics", LOOPS, "ATTACK.perturb(model.eval(), batch.images",
        "ATTACK.perturb(lambda z: model.train()(z), batch.images", "running_statistics_come_from_the_loss_alone",
    ),
    Mutation(
        "best checkpoint chosen on the test set", LOOPS, 'row["validation_robust"]', 'row["test_robust"]',
        "best_checkpoint_is_chosen_off_the_test_set",
    ),
    Mutation(
        "evaluation on the first 1,000 images", LOOPS, "for first in range(0, len(images), 500):",
        "for first in range(0, 1000, 500):", "every_image_is_evaluated_and_kept",
    ),
    Mutation(
        "last incomplete batch dropped", LOOPS, "for first in range(0, len(images), 500):",
        "for first in range(0, len(images) - 499, 500):", "every_image_is_evaluated_and_kept",
    ),
    Mutation(
        "results printed, not kept", LOOPS, '(folder / "ledger.jsonl").write_text(', "print(",
        "every_image_is_evaluated_and_kept",
    ),
    Mutation(
        "normalised images given to AutoAttack", LOOPS, "adv = evaluator(model, images, labels)",
        "adv = evaluator(model, (images - 0.47) / 0.25, labels)", "evaluator_is_given_pixels",
    ),
    Mutation(
        "clean loss for the log in train mode", LOOPS, "    model.eval()\n    with torch.no_grad():\n        value",
        "    with torch.no_grad():\n        value", "logging_the_clean_loss_moves_nothing",
    ),
]  # fmt: skip
