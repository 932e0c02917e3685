"""Faults of the command line and of what recipes say of mistakes."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_WORDS = "tests/unit/test_words.py::"
_TYPED = "tests/integration/test_typed_mistakes.py::"

MUTATIONS = (
    Mutation(
        "a word too many is passed over",
        "cli.py",
        'if extra := [*(getattr(args, "overrides", None) or []), *unknown]:',
        "if extra := unknown:",
        _WORDS + "test_no_verb_passes_over_an_argument_too_many",
    ),
    Mutation(
        "an override given twice: the last one wins",
        "commands/words.py",
        '            _once(values, key, value, "")\n',
        "",
        _WORDS + "test_the_message_says_what_to_write",
    ),
    Mutation(
        "an option's value with '=' in it is taken for an override",
        "commands/words.py",
        "if action is not None and action.nargs is None and not equals and at + 1 < len(given):",
        "if False:",
        _WORDS + "test_words_that_are_right_are_understood_wherever_they_stand",
    ),
    Mutation(
        "an anchor that holds itself is followed for ever",
        "recipe_nodes.py",
        "    if depth > _DEEPEST:\n",
        "    if depth > 10 * _DEEPEST**2:\n",
        _TYPED + "test_mistakes_in_recipes_are_refused",
    ),
    Mutation(
        "training keeps no warning",
        "engine/run.py",
        "        warnings=doubts,\n",
        "",
        "tests/integration/test_bad_inputs.py::test_what_plan_warns_of_stands_in_the_events_of_the_training_and_is_said",
    ),
)
