"""Bugs planted in a copy of the objectives and of the loops around them."""

from tests.conformance.product import Mutation

PGD_AT, TRADES, MIXTURE = "objectives/pgd_at.py", "objectives/trades.py", "objectives/mixture.py"
LOOPS = "loops.py"

_ADV = "        adv_logits = forward(adv, branch=self.attack_branch)\n"

MUTATIONS = [
    Mutation(
        "train-mode clean forward poisons BN statistics", PGD_AT, _ADV,
        _ADV + "        forward(batch.images, branch=self.attack_branch, grad=False)\n",
        "adversarial_training_moves_bn_once",
    ),
    Mutation(
        "trained on clean images", PGD_AT, "        adv = required_adv(adv, batch)\n", "        adv = batch.images\n",
        "adversarial_training_moves_bn_once",
    ),
    Mutation(
        "training gradient flows into the attack", "objectives/base.py", "    return adv.detach()\n", "    return adv\n",
        "attack_gets_no_training_gradient",
    ),
    Mutation(
        "sum instead of mean over the batch", PGD_AT, "form=self.label_smoothing_form\n        ).mean()",
        "form=self.label_smoothing_form\n        ).sum()", "adversarial_loss_is_plain_cross_entropy",
    ),
    Mutation(
        "smoothing over K where K - 1 is meant", "attacks/labels.py",
        "wrong, true = smoothing / (num_classes - 1), 1.0 - smoothing",
        "wrong, true = smoothing / num_classes, 1.0 - smoothing", "smoothing_follows_its_convention",
    ),
    Mutation(
        "KL in the wrong direction", TRADES, "return (clean.exp() * (clean - adv)).sum(dim=1)",
        "return (adv.exp() * (adv - clean)).sum(dim=1)", "trades_is_the_published_loss",
    ),
    Mutation(
        "KL cut off from the clean logits", TRADES, "F.log_softmax(clean_logits, dim=1), F.log",
        "F.log_softmax(clean_logits.detach(), dim=1), F.log", "trades_is_the_published_loss",
    ),
    Mutation(
        "KL divided by classes too", TRADES, "divergence = kl_divergence(paired, adv_logits).mean()",
        "divergence = kl_divergence(paired, adv_logits).mean() / adv_logits.shape[1]", "trades_is_the_published_loss",
    ),
    Mutation(
        "clean forward moves BN against the recipe", TRADES,
        'bn: Literal["train", "batch"] = "train" if self.clean_bn == "update" else "batch"',
        'bn: Literal["train", "batch"] = "train"', "trades_forwards_are_the_stated_ones",
    ),
    Mutation(
        "clean and adv branches swapped", MIXTURE,
        'return forward(clean, branch="clean"), forward(adv, branch="adv")',
        'return forward(clean, branch="adv"), forward(adv, branch="clean")', "mixture_branches_carry_their_names",
    ),
    Mutation(
        "BN sees clean and adversarial images apart", MIXTURE, '        if self.norm != "bn":\n            return forward',
        "        if True:\n            return forward", "mixture_with_one_bn_is_one_forward",
    ),
    Mutation(
        "BN groups mixed up in the joint forward", MIXTURE, "order = torch.argsort(groups, stable=True)",
        "order = torch.arange(len(groups))", "mixture_with_one_bn_is_one_forward",
    ),
    Mutation(
        "alpha on the wrong side", MIXTURE, "loss = self.alpha * clean_loss + (1.0 - self.alpha) * adv_loss",
        "loss = self.alpha * adv_loss + (1.0 - self.alpha) * clean_loss", "mixture_loss_is_the_stated_mean",
    ),
    Mutation(
        "clean subset from the global generator", MIXTURE,
        "draw = rng.words(self.seed, rng.Purpose.CLEAN_SUBSET, batch.epoch, batch.ids, 1)[:, 0]",
        "draw = torch.randint(0, 2**31, batch.ids.shape)", "clean_subset_depends_on_counters_alone",
    ),
    Mutation(
        "clean subset is always the first images", MIXTURE,
        "draw = rng.words(self.seed, rng.Purpose.CLEAN_SUBSET, batch.epoch, batch.ids, 1)[:, 0]", "draw = batch.ids",
        "clean_subset_depends_on_counters_alone",
    ),
    Mutation(
        "logits paired with another image", MIXTURE, "pairing_loss(clean_logits, adv_logits[rows], ",
        "pairing_loss(clean_logits, adv_logits.roll(1, 0)[rows], ", "logit_pairing_pairs_the_same_image",
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
