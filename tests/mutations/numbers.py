"""The files that decide numbers, and for each the quick tests of ``make test`` that should notice a change in it.

A mutant stops at the first test that fails, so the most telling file stands first.
"""

from __future__ import annotations

_UNIT = "tests/unit/test_"
_CONFORMANCE = "tests/conformance/test_conformance.py"
_PLAIN_PGD = "tests/conformance/test_reference.py"


# AutoAttack whole takes a minute; these take seconds.
_AUTOATTACK = tuple(
    f"{_UNIT}evaluation_autoattack.py::test_{name}"
    for name in (
        "rounding_is_removed_but_a_real_excess_is_an_error",
        "seed_depends_on_the_chunk_and_not_on_what_ran_before",
        "budget_of_the_protocol_is_what_runs",
        "images_outside_the_ball_are_refused_and_not_counted",
        "input_outside_the_pixel_box_is_refused",
        "verdicts_belong_to_the_samples_whose_images_were_judged",
        "chunks_draw_different_noise_from_seeds_of_their_own",
        "plus_keeps_its_restarts_in_every_chunk",
        "trace_function_and_logger_survive",
    )
)


def _unit(*names: str) -> tuple[str, ...]:
    return tuple(f"{_UNIT}{name}.py" for name in names)


FILES: dict[str, tuple[str, ...]] = {
    "attacks/balls.py": (*_unit("attack_formulas", "attacks_properties", "attacks"), _PLAIN_PGD),
    "attacks/losses.py": (*_unit("attack_formulas", "attacks", "attacks_properties"), _CONFORMANCE),
    "attacks/pgd.py": (*_unit("attack_formulas", "attacks"), _PLAIN_PGD, _CONFORMANCE),
    "attacks/counters.py": (*_unit("attack_formulas", "attacks"), _PLAIN_PGD, _CONFORMANCE),
    "attacks/starts.py": (*_unit("attack_formulas", "attacks", "attacks_properties"), _PLAIN_PGD, _CONFORMANCE),
    "attacks/targets.py": (*_unit("attacks"), _CONFORMANCE),
    "attacks/updates.py": (*_unit("attacks"), _CONFORMANCE),
    "attacks/threat.py": (*_unit("attack_formulas", "attacks", "attacks_properties"), _PLAIN_PGD, _CONFORMANCE),
    "data/augment.py": _unit("augment_plain", "data_augment"),
    "data/order.py": _unit("data_order"),
    "data/split.py": _unit("data_order"),
    "engine/averaging.py": _unit("averaging"),
    "engine/batching.py": _unit("batching_plain", "batching", "microbatches"),
    "engine/buffers.py": (*_unit("buffers"), _CONFORMANCE),
    "engine/microbatches.py": _unit("microbatches", "batching"),
    "engine/optimizers.py": _unit("optimizers"),
    "engine/progress.py": (*_unit("progress"), _CONFORMANCE),
    "engine/schedules.py": _unit("schedules"),
    "evaluation/kinds/autoattack.py": (*_unit("evaluation_plain", "evaluation_protocol"), *_AUTOATTACK),
    "evaluation/attacked.py": _unit("evaluation_plain", "evaluation_runner"),
    "evaluation/kinds/pgd.py": _unit(
        "evaluation_plain", "evaluation_runner", "evaluation_step_counts", "evaluation_protocol", "report_numbers"
    ),
    "evaluation/protocol.py": _unit("evaluation_protocol", "evaluation_plain"),
    "evaluation/worst_case.py": _unit("evaluation_verdicts"),
    "models/norm.py": (*_unit("norm"), _CONFORMANCE, "tests/distributed/test_norm_sync.py"),
    "models/parameters.py": _unit("optimizers", "models_weights"),
    "objectives/labels.py": _unit("objectives"),
    "objectives/mixture.py": (*_unit("objectives_plain", "objectives"), _CONFORMANCE),
    "objectives/pgd_at.py": (*_unit("objectives_plain", "objectives"), _CONFORMANCE),
    "objectives/trades.py": (*_unit("objectives_plain", "objectives"), _CONFORMANCE),
    "ops/reference.py": (*_unit("attack_formulas", "ops", "attacks_properties"), _PLAIN_PGD),
    "rng.py": (*_unit("rng"), _PLAIN_PGD),
    "statistics.py": _unit("statistics"),
}
