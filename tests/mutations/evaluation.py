"""Faults planted in evaluation/, where rows are made, shared, stored and counted."""

from tests.mutations.mutation import Mutation

_PGD = "tests/strangers/test_pgd.py::"
_ROW = _PGD + "test_each_row_is_that_of_a_pgd_written_by_hand"
_STATISTICS = "tests/strangers/test_statistics.py::"
_PART = "tests/strangers/test_ranks.py::test_a_part_of_the_samples_is_never_reported_as_the_whole"
_RANKS = "tests/strangers/test_ranks.py::test_rows_of_two_ranks_are_those_of_code_written_by_hand"
_WEIGHTS = "tests/strangers/test_weights.py::"
_RUNNER = "tests/unit/test_evaluation_runner.py::"

ROWS = (
    Mutation(
        "images that are wrong without an attack are attacked, the others not",
        "evaluation/row_maker.py",
        "chosen = chosen[correct_clean]",
        "chosen = chosen[~correct_clean]",
        _ROW + "[linf-trained]",
    ),
    Mutation(
        "starts are those of the first images of the batch",
        "evaluation/row_maker.py",
        "torch.from_numpy(ids).to(self.device)[chosen]",
        "torch.from_numpy(ids).to(self.device)[: len(chosen)]",
        _ROW + "[linf-untrained]",
    ),
    Mutation(
        "an evaluation divides pixels by 256",
        "evaluation/row_maker.py",
        ".float().div_(255)",
        ".float().div_(256)",
        _PGD + "test_clean_accuracy_is_what_the_network_says_of_the_untouched_images",
    ),
    Mutation(
        "every broken image counts as wrong from the start",
        "evaluation/row_maker.py",
        "(~correct_clean & ~correct).cpu()",
        "(~correct).cpu()",
        _ROW + "[linf-trained]",
    ),
    Mutation(
        "a mixture's clean branch is measured on the other one",
        "evaluation/isolation.py",
        "on_branch(model, branch):",
        'on_branch(model, "adv"):',
        "tests/unit/test_evaluation_models.py::test_branches_of_a_mixture_norm_are_evaluated_apart_and_named",
    ),
    Mutation(
        "an unfinished evaluation writes its summary",
        "evaluation/runner.py",
        "if ledger is not None and result.complete and (",
        "if ledger is not None and (",
        _PART,
    ),
    Mutation(
        "an evaluation is complete as soon as it has rows",
        "evaluation/runner.py",
        "expected=len(ids),",
        "expected=len(everything),",
        _PART,
    ),
    Mutation(
        "jobs that share a folder deal out what each finds missing",
        "evaluation/runner.py",
        "dealt = missing if shard.connected else ids",
        "dealt = missing",
        _PART,
    ),
    Mutation(
        "a resumed AutoAttack makes a chunk of what is missing of one",
        "evaluation/runner.py",
        "row_maker.rows(piece if kind.batch_dependent else wanted)",
        "row_maker.rows(wanted)",
        "tests/unit/test_evaluation_autoattack.py::test_resumed_equals_uninterrupted_and_batch_size_does_not_matter",
    ),
    Mutation(
        "rows of samples outside the protocol are counted",
        "evaluation/runner.py",
        "return rows.take(np.isin(rows.sample_id, ids))",
        "return rows",
        _PART,
    ),
    Mutation(
        "the name of the attack goes over to other ranks as the hit of a target",
        "evaluation/sharding.py",
        "for i in table[:, -1]]",
        "for i in table[:, -2]]",
        _RANKS,
    ),
    Mutation(
        "ranks leave out the first piece of work",
        "evaluation/sharding.py",
        "items[self.rank :: self.world_size]",
        "items[self.rank + 1 :: self.world_size]",
        _ROW + "[linf-trained]",
    ),
    Mutation(
        "rows of several writers stay in the order of the files",
        "evaluation/ledger.py",
        "for i in sorted(found)]",
        "for i in found]",
        _PART,
    ),
    Mutation(
        "rows that disagree about the verdict count as one",
        "evaluation/ledger.py",
        '"correct_clean", "correct_adv")',
        '"correct_clean")',
        _RUNNER + "test_contradicting_rows_are_an_error_that_names_the_sample",
    ),
    Mutation(
        "rows at fewer steps are not kept for another start",
        "evaluation/step_counts.py",
        "            self._ledgers[count].append(rows)\n",
        "            pass\n",
        "tests/unit/test_evaluation_step_counts.py::test_finished_pass_is_read_and_not_repeated",
    ),
    Mutation(
        "all numbers of steps get the rows of the fewest",
        "evaluation/runner.py",
        "given=on_the_way.rows(count)",
        "given=on_the_way.rows(on_the_way.counts[0])",
        _PGD + "test_each_number_of_steps_of_one_pass_is_that_of_a_pgd_written_by_hand",
    ),
    Mutation(
        "fewer samples are the first ones",
        "evaluation/source.py",
        "return np.sort(ids[chosen])",
        "return ids[:num_samples]",
        _RUNNER + "test_fewer_samples_are_drawn_over_the_whole_split_and_always_the_same",
    ),
)

NUMBERS = (
    Mutation(
        "an accuracy is over the samples that the protocol names, counted or not",
        "evaluation/result.py",
        "return self.correct / self.total if self.total",
        "return self.correct / self.expected if self.total",
        _PART,
    ),
    Mutation(
        "a robust accuracy counts what was right before the attack",
        "evaluation/result.py",
        "return int(self.rows.correct_adv.sum())",
        "return int(self.rows.correct_clean.sum())",
        _STATISTICS + "test_a_result_counts_its_rows",
    ),
    Mutation(
        "a targeted attack's success is a share of the images that were right",
        "evaluation/result.py",
        "float(self.rows.target_hit.mean())",
        "float(self.rows.target_hit[self.rows.correct_clean].mean())",
        _ROW + "[linf, most confusing target, margin-untrained]",
    ),
    Mutation(
        "a worst case counts what was right before each attack",
        "evaluation/worst_case.py",
        "result.rows.sample_id[result.rows.correct_adv]",
        "result.rows.sample_id[result.rows.correct_clean]",
        _STATISTICS + "test_worst_case_is_the_intersection_of_sets",
    ),
    Mutation(
        "attacks of two norms make one worst case",
        "evaluation/worst_case.py",
        '["the ball"] if protocol.ball not in (None, ball) else []',
        "[]",
        "tests/unit/test_evaluation_verdicts.py::test_results_that_do_not_belong_together_are_not_intersected",
    ),
    Mutation(
        "a worst case is a share of what the first attack left",
        "evaluation/worst_case.py",
        "return self.correct / self.total",
        "return self.correct / self.remaining[0]",
        _STATISTICS + "test_worst_case_is_the_intersection_of_sets",
    ),
    Mutation(
        "two results are compared sample by sample at the places of one of them",
        "evaluation/verdicts.py",
        "b.rows.correct_adv[at_b]",
        "b.rows.correct_adv[at_a]",
        _STATISTICS + "test_suspicion_of_a_stronger_attack_rests_on_the_samples_that_both_saw",
    ),
    Mutation(
        "the chance of what was seen leaves out what was seen",
        "evaluation/verdicts.py",
        "range(more, n + 1)",
        "range(more + 1, n + 1)",
        _STATISTICS + "test_suspicion_of_a_stronger_attack_rests_on_the_samples_that_both_saw",
    ),
    Mutation(
        "an attack that is stronger as it should be is suspected",
        "evaluation/verdicts.py",
        "(strong & ~weak).sum()), int((weak & ~strong).sum())",
        "(weak & ~strong).sum()), int((strong & ~weak).sum())",
        _STATISTICS + "test_suspicion_of_a_stronger_attack_rests_on_the_samples_that_both_saw",
    ),
    Mutation(
        "the identity of weights leaves out batch norm's statistics",
        "evaluation/weights.py",
        "in module.state_dict().items()",
        "in dict(module.named_parameters()).items()",
        _WEIGHTS + "test_eval_measures_the_checkpoint_that_it_was_asked_for",
    ),
    Mutation(
        "examples are the first images of a split",
        "evaluation/examples.py",
        "np.linspace(0, source.num_samples - 1, min(num_examples, source.num_samples)).astype(int)",
        "np.arange(min(num_examples, source.num_samples))",
        _WEIGHTS + "test_examples_are_of_the_network_that_was_evaluated_and_lie_in_ball_and_box",
    ),
    Mutation(
        "examples show the clean prediction twice",
        "evaluation/examples.py",
        "adv_predictions = predicted_classes(network(adv))",
        "adv_predictions = predicted_classes(network(x))",
        _WEIGHTS + "test_examples_are_of_the_network_that_was_evaluated_and_lie_in_ball_and_box",
    ),
)

MUTATIONS: tuple[Mutation, ...] = (*ROWS, *NUMBERS)
