"""Faults planted in what objectives declare, in what they keep and in the hooks that a step gives them."""

from tests.mutations.mutation import Mutation

_PASSES = "tests/conformance/test_every_objective.py::"
_FACTS = "tests/unit/test_objectives.py::"
_REPEATS = "tests/unit/test_repeated_batches.py::"
_PLUGINS = "tests/integration/test_objective_plugins.py::"
_COST = "tests/unit/test_observe_cost.py::"
_COUNTED = _PASSES + "test_declared_passes_are_the_counted_ones"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "TRADES pays for one pass",
        "objectives/trades.py",
        '{"clean": float(order.count("clean")), "adv": 1.0}',
        '{"clean": float(order.count("clean"))}',
        _COUNTED,
    ),
    Mutation(
        "the clean forwards for statistics are free",
        "objectives/pgd_at.py",
        ", watched=float(len(clean)))",
        ")",
        _COUNTED,
    ),
    Mutation(
        "a share of clean images pays for all of them",
        "objectives/mixture.py",
        'trained={"clean": config.clean_ratio, "adv": 1.0}',
        'trained={"clean": 1.0, "adv": 1.0}',
        _COUNTED,
    ),
    Mutation(
        "TRADES is said to move statistics in the order of its formula",
        "objectives/trades.py",
        'else ("clean", "adv", "clean")',
        'else ("clean", "clean", "adv")',
        _COUNTED,
    ),
    Mutation(
        "a mixture without clean images claims to train both branches",
        "objectives/mixture.py",
        'return cls.branches if config.clean_ratio > 0 else ("adv",)',
        "return cls.branches",
        _PASSES + "test_branches_that_are_trained_are_the_declared_ones",
    ),
    Mutation(
        "half of the clean images need no whole group",
        "objectives/mixture.py",
        "if config.clean_ratio == 1:",
        "if config.clean_ratio > 0:",
        _FACTS + "test_a_kept_share_of_clean_images_wants_whole_groups_and_plan_says_so",
    ),
    Mutation(
        "passes without a backward cost as much as trained ones",
        "cost.py",
        "+ FORWARD * passes.watched)",
        "+ one_pass * passes.watched)",
        _COST + "test_objectives_pay_for_their_clean_passes",
    ),
    Mutation(
        "an objective that makes its own images pays for the recipe's attack too",
        "cost.py",
        'if attack and objective.needs(section).attack == "given":',
        "if attack:",
        _PLUGINS + "test_repeated_batches_are_steps_of_their_own_in_the_plan",
    ),
    Mutation(
        "activations of one image of a pair",
        "objectives/base.py",
        "return self.total_trained if self.held is None else self.held",
        "return 1.0 if self.held is None else self.held",
        _FACTS + "test_activations_of_all_trained_images_of_a_pair_count_in_the_plan",
    ),
    Mutation(
        "perturbed weights are put back by subtracting",
        "objectives/base.py",
        "                weight_of[name].copy_(weight)",
        "                weight_of[name].sub_(changes[name])",
        _FACTS + "test_perturbed_weights_act_on_loss_and_gradient_and_are_bitwise_restored",
    ),
    Mutation(
        "the backward happens after the weights are put back",
        "engine/trainer.py",
        "                p.engine.backward(loss)\n",
        "            p.engine.backward(loss)\n",
        _PLUGINS + "test_what_there_is_room_for_is_resumed_bitwise",
    ),
    Mutation(
        "every micro-batch counts as the last of its step",
        "engine/trainer.py",
        "last=index + 1 == p.plan.accumulation",
        "last=True",
        _PLUGINS + "test_gradients_changed_between_backward_and_step_are_those_of_the_step",
    ),
    Mutation(
        "views of other networks stay as they began",
        "engine/builder.py",
        "for twin in (self.twin, *self.views.values()):",
        "for twin in (self.twin,):",
        _PLUGINS + "test_views_of_other_networks_are_up_to_date",
    ),
    Mutation(
        "other networks are saved without their statistics",
        "engine/checkpoint/state.py",
        "in network.state_dict().items()",
        "in network.named_parameters()",
        _PLUGINS + "test_statistics_of_other_networks_are_saved",
    ),
    Mutation(
        "the eps of an objective's own images is in /255",
        "engine/builder.py",
        "eps=lambda step: schedules.eps(step) / 255.0",
        "eps=lambda step: schedules.eps(step)",
        _PLUGINS + "test_own_images_of_an_objective_keep_to_the_ball_of_the_recipe",
    ),
    Mutation(
        "a resumed run reads the next batch before the old one is used up",
        "engine/microbatches.py",
        "begun = first_step // order.repeats * order.repeats",
        "begun = first_step",
        _REPEATS + "test_a_run_may_go_on_in_the_middle_of_a_batchs_uses",
    ),
    Mutation(
        "groups of a repeated batch get new numbers",
        "engine/microbatches.py",
        "groups = order.batch(index) * plan.groups_per_step",
        "groups = index * plan.groups_per_step",
        _REPEATS + "test_a_repeated_batch_is_read_once_and_only_its_step_and_use_differ",
    ),
    Mutation(
        "stand-ins leave a trace at the first places",
        "engine/microbatches.py",
        "place=place if weight else None",
        "place=place",
        _REPEATS + "test_places_of_a_ranks_share_follow_each_other_and_stand_ins_have_none",
    ),
    Mutation(
        "a repeated batch is the next one, too",
        "data/order.py",
        "start = self.batch(step_in_epoch) * self.batch_size",
        "start = step_in_epoch * self.batch_size",
        _REPEATS + "test_order_shows_each_batch_for_as_many_steps_and_each_image_once_an_epoch",
    ),
    Mutation(
        "the last batch of a repeated epoch is thought empty",
        "data/order.py",
        "self.num_samples - self.batch(step_in_epoch) * self.batch_size)",
        "self.num_samples - step_in_epoch * self.batch_size)",
        _REPEATS + "test_order_shows_each_batch_for_as_many_steps_and_each_image_once_an_epoch",
    ),
    Mutation(
        "an epoch of repeated batches is planned as long as one of single ones",
        "planning.py",
        "drop_last=train.drop_last) * needs.repeats",
        "drop_last=train.drop_last)",
        _PLUGINS + "test_repeated_batches_are_steps_of_their_own_in_the_plan",
    ),
    Mutation(
        "one of several other networks counts in memory",
        "planning.py",
        "states += len(objective.needs(config.objective).networks) * (",
        "states += bool(objective.needs(config.objective).networks) * (",
        _PLUGINS + "test_other_networks_count_in_memory_and_checkpoints",
    ),
    Mutation(
        "clean forwards of the attack cost nothing",
        "cost.py",
        "return steps + last + clean_forwards(attack) * FORWARD",
        "return steps + last",
        _COST + "test_kl_attack_and_restarts_pay_for_their_extra_forwards",
    ),
)
