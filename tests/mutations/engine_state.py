"""Faults planted in the twin, and in how engine/ keeps a run's state and goes on from it."""

from tests.mutations.mutation import Mutation

_CHECK = "tests/integration/test_twin_check.py::"
_TWIN = "tests/unit/test_twin.py::"
_FOLD = "tests/unit/test_folding.py::"
_COMPILED = "tests/unit/test_compiled_attack.py::"
_REGIONS = "tests/unit/test_regions.py::"
_MATRIX = "tests/integration/test_resume_matrix.py::"
_CORNERS = "tests/integration/test_resume_corners.py::"
_STAGES = "tests/integration/test_imagenet_stages.py::"
_ENGINE = "tests/distributed/test_checkpoint_engine.py::"
_WEIGHTS = "tests/unit/test_run_weights.py::"
_BAD = "tests/unit/test_nonfinite.py::"
_RUN = _CHECK + "test_attack_meets_the_live_network_at_every_step_of_a_run"
_RESUMED = _MATRIX + "test_resume_in_the_middle_of_an_epoch_is_bitwise_the_undisturbed_run"

TWIN: tuple[Mutation, ...] = (
    Mutation(
        "the twin holds a copy of the weights",
        "engine/twin/twin.py",
        "nn.Parameter(parameter.detach(), requires_grad=False)",
        "nn.Parameter(parameter.detach().clone(), requires_grad=False)",
        _RUN + "[group_norm]",
    ),
    Mutation(
        "the twin holds a copy of the statistics",
        "engine/twin/twin.py",
        "memo[id(buffer)] = buffer",
        "memo[id(buffer)] = buffer.clone()",
        _TWIN + "test_train_mode_moves_the_live_statistics_and_other_modes_do_not",
    ),
    Mutation(
        "a convolution's bias is folded with the wrong sign",
        "engine/twin/folding.py",
        "n.running_mean - c.bias",
        "n.running_mean + c.bias",
        _FOLD + "test_convolution_with_a_bias_folds_exactly",
    ),
    Mutation(
        "a convolution that another layer reads too is folded",
        "engine/twin/folding.py",
        " and len(conv.users) == 1:",
        ":",
        _FOLD + "test_convolution_read_twice_is_not_folded",
    ),
    Mutation(
        "group norm swallows whatever stands behind it",
        "engine/twin/folding.py",
        "relu = relu and isinstance(module.get_submodule(str(reader.target)), nn.ReLU)",
        "relu = relu and isinstance(module.get_submodule(str(reader.target)), nn.Module)",
        _FOLD + "test_other_activations_stay_behind_group_norm",
    ),
    Mutation(
        "fused group norm has an eps of its own",
        "engine/twin/folding.py",
        "norm.num_groups, norm.eps, relu",
        "norm.num_groups, 1e-5, relu",
        _FOLD + "test_fused_group_norm_keeps_the_recipes_eps",
    ),
    Mutation(
        "only the folded weights are brought up to date",
        "engine/twin/folding.py",
        "        from_, to = [a for a, _ in self.copied], [b for _, b in self.copied]\n        if self.folded:\n",
        "        from_, to = [a for a, _ in self.copied], [b for _, b in self.copied]\n        if self.folded:\n"
        "            from_, to = [], []\n",
        _RUN + "[folded_mixture_cast_zero_2_accumulation]",
    ),
    Mutation(
        "the compiled attack keeps the bounds of its first batch",
        "engine/twin/compiled_attack.py",
        "self._seen is None or self._seen[0] is not bounds or self._seen[1] is not goal",
        "self._seen is None or self._seen[1] is not goal and self._seen[0] is None",
        _COMPILED + "test_one_compilation_serves_epochs_warm_up_and_the_last_batch",
    ),
    Mutation(
        "the compiled attack of a last batch returns its padding",
        "engine/twin/compiled_attack.py",
        "(following[:count], logits[:count])",
        "(following[-count:], logits[-count:])",
        _COMPILED + "test_one_compilation_serves_epochs_warm_up_and_the_last_batch",
    ),
    Mutation(
        "batch statistics see padding",
        "engine/twin/compiled_attack.py",
        'twin.bn_mode == "eval"\n',
        'twin.bn_mode != "train"\n',
        _COMPILED + "test_batch_statistics_never_see_padding",
    ),
    Mutation(
        "the runs before a capture stay in the running statistics",
        "engine/twin/cuda_graph.py",
        "tensor.copy_(value)",
        "value.copy_(tensor)",
        _COMPILED + "test_captured_attack_in_train_mode_moves_the_statistics_as_the_plain_one",
    ),
    Mutation(
        "a captured attack in train mode is not told what it moves",
        "engine/twin/compiled_attack.py",
        'twin.module.buffers() if twin.bn_mode == "train" else ()',
        'twin.module.buffers() if twin.bn_mode == "batch" else ()',
        _COMPILED + "test_captured_attack_in_train_mode_moves_the_statistics_as_the_plain_one",
    ),
    Mutation(
        "regions of one kind share the first one's weights",
        "engine/twin/regions.py",
        "(x, *region.tensors)\n        return x",
        "(x, *self.regions[self._numbers.index(number)].tensors)\n        return x",
        _REGIONS + "test_regions_give_the_gradient_of_the_whole_bit_for_bit_and_compile_each_kind_once",
    ),
    Mutation(
        "layers of one class count as one kind whatever their settings",
        "engine/twin/regions.py",
        "(key, repr(value) if isinstance(value, _PLAIN) else id(value))",
        "(key, type(value))",
        _REGIONS + "test_blocks_that_differ_share_nothing",
    ),
    Mutation(
        "the twin's debug mode asks the twin which BN mode it should be in",
        "engine/twin/check.py",
        "set_bn_mode(spare, attack.bn_mode)",
        "set_bn_mode(spare, twin.bn_mode)",
        _CHECK + "test_a_twin_of_another_branch_or_bn_mode_is_caught",
    ),
    Mutation(
        "the twin's debug mode does not see who wrote into the live network",
        "engine/twin/check.py",
        "if self._left_by != step - 1:",
        "if self._left_by != step:",
        _CHECK + "test_an_average_copied_into_the_live_network_is_caught",
    ),
    Mutation(
        "the twin's debug mode moves statistics a second time",
        "engine/twin/check.py",
        'if self._bn_mode == "train" else []',
        'if self._bn_mode == "batch" else []',
        _CHECK + "test_an_attack_that_moves_statistics_moves_them_once_under_comparison",
    ),
)

RESUMING: tuple[Mutation, ...] = (
    Mutation(
        "sums since the last log row are lost in a resume",
        "engine/state.py",
        "self._meters.load(state, self._world.rank, self._world.world_size)",
        "pass",
        _RESUMED + "[pgd_at-bn-sgd-cosine-rows_across_the_stop]",
    ),
    Mutation(
        "a resumed run has forgotten the best accuracy so far",
        "engine/state.py",
        '            "early_stopping": self.early,\n',
        "",
        _RESUMED + "[pgd_at-bn-sgd-cosine-early_stop_later]",
    ),
    Mutation(
        "an objective's own numbers start again in a resume",
        "engine/state.py",
        '            "objective": parts.objective,\n',
        "",
        _MATRIX + "test_what_an_objective_keeps_between_steps_is_resumed_where_it_is_declared[True]",
    ),
    Mutation(
        "statistics stay frozen after going back before the freeze",
        "engine/parallel.py",
        "            self.unfreeze_bn()\n",
        "            pass\n",
        _CORNERS + "test_going_back_before_the_freeze_of_statistics_lets_them_move_again",
    ),
    Mutation(
        "loaded weights do not reach the network",
        "engine/state.py",
        "        after_load(self.parts.engine.engine)\n",
        "",
        _RESUMED + "[pgd_at-bn-sgd-cosine-ema]",
    ),
    Mutation(
        "the moving average starts again in a resume",
        "engine/state.py",
        "ema=parts.average.tensors if parts.average is not None else None,",
        "ema=None,",
        _CORNERS + "test_a_checkpoint_holds_the_whole_state",
    ),
    Mutation(
        "optimiser state that does not exist yet is made of ones",
        "engine/checkpoint/state.py",
        "torch.zeros_like(parameter, requires_grad=False)",
        "torch.ones_like(parameter, requires_grad=False)",
        _CORNERS + "test_a_checkpoint_before_the_first_step_changes_no_number",
    ),
    Mutation(
        "weights that are not trained are not saved",
        "engine/checkpoint/state.py",
        "        if name not in covered:",
        "        if name not in covered and parameter.requires_grad:",
        _STAGES + "test_bn_only_run_resumed_keeps_the_weights_that_it_does_not_train",
    ),
    Mutation(
        "a fragment's place is that in the flat partition",
        "engine/checkpoint/state.py",
        "mapping.lp_fragment_address.start",
        "mapping.hp_fragment_address.start",
        _ENGINE + "test_state_opens_bit_equal_at_another_stage_and_world_size",
    ),
    Mutation(
        "DeepSpeed is not told of the loaded optimiser state",
        "engine/checkpoint/state.py",
        "    zero._hp_optimizer_states_linked = False\n",
        "",
        _ENGINE + "test_deepspeed_finds_the_optimiser_state_of_every_parameter_group_after_a_load",
    ),
    Mutation(
        "a finished network is the live one where its recipe averages",
        "engine/runs/weights.py",
        "(EMA if averaged and name in names else MODEL)",
        "(EMA if averaged and name not in names else MODEL)",
        _WEIGHTS + "test_network_of_a_run_has_the_weights_and_statistics_that_its_recipe_means",
    ),
    Mutation(
        "averaged weights run on live statistics where the recipe averages those too",
        "engine/runs/weights.py",
        'config.train.ema.buffers == "average"',
        'config.train.ema.buffers == "copy_live"',
        _WEIGHTS + "test_network_of_a_run_has_the_weights_and_statistics_that_its_recipe_means",
    ),
    Mutation(
        "evaluation takes the newest checkpoint where the recipe selects the best",
        "engine/runs/weights.py",
        'which = "best" if config.train.select == "best_validation" else "last"',
        'which = "last"',
        _WEIGHTS + "test_auto_is_the_checkpoint_that_the_recipe_selects",
    ),
    Mutation(
        "finetuning begins from the live weights of a run that averages",
        "engine/runs/initial_weights.py",
        'weights="ema" if held.train.ema is not None else "model"',
        'weights="model"',
        _WEIGHTS + "test_a_run_begun_from_another_takes_what_an_evaluation_of_that_would",
    ),
    Mutation(
        "finetuning begins from the newest weights of a run that selects",
        "engine/runs/initial_weights.py",
        "read_weights(best or path,",
        "read_weights(path,",
        _WEIGHTS + "test_a_run_begun_from_another_takes_what_an_evaluation_of_that_would",
    ),
    Mutation(
        "initial weights reach rank 0 alone",
        "engine/runs/initial_weights.py",
        "        for tensor in module.state_dict().values():\n",
        "        for tensor in ():\n",
        "tests/distributed/test_initial_weights.py::test_every_rank_begins_with_the_files_bits_and_all_refuse_together",
    ),
    Mutation(
        "initial statistics reach rank 0 alone",
        "engine/runs/initial_weights.py",
        "        for tensor in module.state_dict().values():\n            dist",
        "        for tensor in map(torch.Tensor.detach, module.parameters()):\n            dist",
        "tests/distributed/test_initial_weights.py::test_every_rank_begins_with_the_files_bits_and_all_refuse_together",
    ),
    Mutation(
        "bad steps add up over a whole run",
        "engine/nonfinite.py",
        '        """Count a good step."""\n        self.in_row = 0\n',
        '        """Count a good step."""\n',
        _BAD + "test_only_bad_steps_in_a_row_end_a_run",
    ),
    Mutation(
        "going back forgets which step was bad",
        "engine/nonfinite.py",
        'self.skipped |= set(state["skipped"])',
        'self.skipped = set(state["skipped"])',
        _BAD + "test_an_older_checkpoint_does_not_make_a_bad_step_good_again",
    ),
    Mutation(
        "a jump of the loss is a measure for the next",
        "engine/nonfinite.py",
        "            return True\n        if math.isfinite(loss):",
        "            self._losses.append(loss)\n            return True\n        if math.isfinite(loss):",
        _BAD + "test_a_jump_is_judged_by_the_median_of_enough_recent_losses",
    ),
    Mutation(
        "rows of kept clean images are taken for rows of the batch",
        "engine/nonfinite.py",
        "own[term.clean_rows] if",
        "own[: len(term.clean_rows)] if",
        _BAD + "test_samples_are_named_by_their_logits_of_either_branch",
    ),
    Mutation(
        "statistics that are not finite are saved",
        "engine/nonfinite.py",
        "(*module.parameters(), *module.buffers())",
        "module.parameters()",
        _BAD + "test_a_number_that_is_not_finite_is_found_in_weights_and_statistics",
    ),
    Mutation(
        "a rank without samples reduces fewer sums than the others",
        "engine/progress.py",
        "{name for own in gather(sorted(self._sums)) for name in own}",
        "set(self._sums)",
        "tests/unit/test_progress.py::test_a_rank_without_samples_reduces_what_the_others_do",
    ),
)

ARITHMETIC = (
    Mutation(
        "TF32 is left as the process had it",
        "engine/builder.py",
        'allow_tf32(config.train.precision == "tf32")',
        'config.train.precision == "tf32"',
        "tests/unit/test_float32.py::test_training_uses_tf32_only_where_the_recipe_says_so[fp32-False]",
    ),
    Mutation(
        "validation rounds to TF32 where training does",
        "engine/validation.py",
        "with tf32(False):",
        "with tf32(True):",
        "tests/integration/test_evaluate_run.py::test_training_in_tf32_is_validated_and_evaluated_in_float32",
    ),
    Mutation(
        "group norms count nothing towards the host's time",
        "engine/twin/compiled_attack.py",
        " + _GROUP_NORM_SECONDS * self.fused_norms",
        "",
        "tests/unit/test_compiled_attack.py::test_auto_decides_by_the_work_ahead",
    ),
)

ATTACKING: tuple[Mutation, ...] = (
    Mutation(
        "a batch that is used again begins from the same starts",
        "engine/trainer.py",
        "replace(p.attack, first_draw=batch.repeat * p.attack.restarts) if batch.repeat else p.attack",
        "p.attack",
        "tests/integration/test_objective_plugins.py::test_every_use_of_a_batch_begins_from_starts_and_masks_of_its_own",
    ),
    Mutation(
        "a batch that is used again has the same masks",
        "engine/parallel.py",
        "batch.repeat * FORWARDS_A_STEP + forward",
        "forward",
        "tests/integration/test_objective_plugins.py::test_every_use_of_a_batch_begins_from_starts_and_masks_of_its_own",
    ),
    Mutation(
        "soft labels do not reach the attack of training",
        "engine/trainer.py",
        "soft_labels=batch.soft_labels if p.attack.takes_soft_labels else None,",
        "soft_labels=None,",
        "tests/integration/test_objective_plugins.py::test_soft_labels_reach_attack_and_loss",
    ),
    Mutation(
        "the forward that a published attack ends with is not made",
        "config/attack.py",
        'return self.final_forward and self.bn_mode == "train"',
        "return False",
        "tests/integration/test_statistics_updates.py::test_one_step_moves_the_statistics_as_often_as_the_published_code[baselines.yaml#resnet18-train-14]",
    ),
    Mutation(
        "TRADES' attack looks at the clean images once",
        "config/attack.py",
        'return self.reference_forward == "each_step" and self.bn_mode == "train"',
        "return False",
        "tests/integration/test_statistics_updates.py::test_one_step_moves_the_statistics_as_often_as_the_published_code[table9.yaml#eps8-wrn34-10-wd2e-4-train-22]",
    ),
)

MUTATIONS: tuple[Mutation, ...] = (*TWIN, *RESUMING, *ARITHMETIC, *ATTACKING)
