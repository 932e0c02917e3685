"""Faults by which numbers, data and weights lose their meaning without a word."""

from tests.mutations.mutation import Mutation

_SAME = "tests/integration/test_same_measure.py::"
_DATA = "tests/integration/test_other_data.py::"
_FALSE = "tests/integration/test_false_robustness.py::"
_FILES = "tests/unit/test_weight_files.py::"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "the paper's number stands beside another evaluation of the same name",
        "observe/paper_row.py",
        "if found is not None and not self.differences and self.is_measured_alike(measurement) else None",
        "if found is not None and not self.differences else None",
        _SAME + "test_another_evaluation_of_the_same_name_does_not[evaluation.final.1.attack.eps=1]",
    ),
    Mutation(
        "the paper's number stands beside a run of another recipe",
        "observe/paper_row.py",
        "if found is not None and not self.differences and",
        "if found is not None and",
        _SAME + "test_a_changed_recipe_is_told_in_place_of_points",
    ),
    Mutation(
        "the paper's number stands beside one of fewer images",
        "observe/paper_row.py",
        "if images is not None and measurement.total != images:",
        "if False:",
        _SAME + "test_fewer_images_do_not",
    ),
    Mutation(
        "another seed is another recipe",
        "observe/paper_row.py",
        "paper\\b.*|seed|",
        "paper\\b.*|",
        _SAME + "test_a_run_of_the_row_stands_beside_the_paper_s_numbers",
    ),
    Mutation(
        "the quotable hash holds the weights",
        "evaluation/protocol.py",
        'OF_THE_RUN = ("weights", "model", "seed")',
        'OF_THE_RUN = ("model", "seed")',
        _SAME + "test_protocol_hashes_of_two_networks_agree_and_result_hashes_do_not",
    ),
    Mutation(
        "a repeated evaluation forgets the measured seconds",
        "evaluation/runner.py",
        "seconds=before + seconds,",
        "seconds=seconds,",
        _SAME + "test_a_repeated_evaluation_keeps_the_measured_seconds",
    ),
    Mutation(
        "plan assumes the published number of images",
        "planning.py",
        "return _indexed(data) or (data.facts.train, data.facts.test)",
        "return data.facts.train, data.facts.test",
        _SAME + "test_plan_reads_an_index_and_says_what_it_assumes",
    ),
    Mutation(
        "ranks do not compare their data",
        "engine/runs/data.py",
        '        if difference is not None:\n            raise ConfigError(\n                f"data.path',
        '        if False:\n            raise ConfigError(\n                f"data.path',
        _DATA + "test_a_rank_that_sees_other_data_ends_all_before_the_first_step",
    ),
    Mutation(
        "a resumed run goes on with other data",
        "engine/runs/data.py",
        "            if not self._accept:",
        "            if False:",
        _DATA + "test_a_resumed_run_refuses_other_data_unless_they_are_accepted",
    ),
    Mutation(
        "the protocol knows a folder by its names alone",
        "data/imagenet.py",
        '            "content": self._index.content,\n',
        "",
        _DATA + "test_rows_of_other_images_under_the_same_names_are_never_reused",
    ),
    Mutation(
        "a fingerprint is the size of a file",
        "data/inspection.py",
        'b"%d:" % size + head + file.read(_END)',
        'b"%d:" % size',
        "tests/integration/test_imagenet_data.py::test_image_of_the_same_name_and_size_is_another_image",
    ),
    Mutation(
        "labels are not mapped by the names of classes",
        "data/source.py",
        "return images, torch.from_numpy(self._place)[labels]",
        "return images, labels",
        _DATA + "test_classes_in_another_order_are_mapped_by_their_names",
    ),
    Mutation(
        "a class without training images is no matter",
        "engine/runs/data.py",
        "    if empty:",
        "    if False:",
        _DATA + "test_a_class_without_images_is_an_error_in_training_and_a_warning_in_test",
    ),
    Mutation(
        "the largest of logits with NaN is class 0",
        "logits.py",
        "return torch.where(torch.isfinite(logits).all(dim=1), logits.argmax(dim=1), NO_CLASS)",
        "return logits.argmax(dim=1)",
        _FALSE + "test_logits_that_are_not_finite_are_wrong_in_every_kind_and_said",
    ),
    Mutation(
        "labels below zero are taken",
        "logits.py",
        "    wrong = labels < 0\n",
        "    wrong = labels < -1000\n",
        _FALSE + "test_labels_outside_of_the_classes_are_named_before_the_loop[ce-True--100]",
    ),
    Mutation(
        "nobody looks at the network before its numbers are believed",
        "engine/runs/evaluate_run.py",
        "            doubts += looked_at(subject, fitting, device=world.device)\n",
        "",
        _FALSE + "test_a_run_whose_gradients_vanish_is_suspected_wherever_its_number_stands",
    ),
    Mutation(
        "an attack that breaks nothing is not suspected",
        "evaluation/verdicts.py",
        "    found += [breaks_nothing(result) for result in untargeted]\n",
        "",
        _FALSE + "test_a_run_whose_gradients_vanish_is_suspected_wherever_its_number_stands",
    ),
    Mutation(
        "attacks of as many steps are not compared",
        "evaluation/verdicts.py",
        "        return [attacks_disagree(weak, strong)]",
        "        return []",
        _FALSE + "test_attacks_of_one_ball_that_disagree_are_said",
    ),
    Mutation(
        "held-out images are not looked at while a run trains",
        "engine/validation.py",
        "[*looked_at(subject, self._source, device=self._world.device), *judge(results)]",
        "judge(results)",
        _FALSE + "test_held_out_images_are_looked_at_while_a_run_trains",
    ),
    Mutation(
        "the normaliser that came with weights is not compared",
        "engine/runs/initial_weights.py",
        '            file.check_normaliser(model.pixel_mean, model.pixel_std, source=f"{field} {source}")\n',
        "            pass\n",
        _FILES + "test_weights_come_out_of_the_wrappings_of_other_codes[RobustBench]",
    ),
    Mutation(
        "weights leave without their meaning",
        "engine/checkpoint/tools.py",
        'metadata={"format": "pt", ABOUT: json.dumps(about(source, average=average))}',
        'metadata={"format": "pt"}',
        _FILES + "test_weights_leave_with_what_they_need_to_mean_something",
    ),
)
