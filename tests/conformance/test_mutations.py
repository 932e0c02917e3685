"""Every planted bug is caught by the check that is there for it; the table at the end says which."""

from __future__ import annotations

import pytest

from tests.conformance import mutations_attack, mutations_training
from tests.conformance.objectives import MODULES as OBJECTIVE_MODULES
from tests.conformance.product import Mutation, mutated
from tests.conformance.scoreboard import SCOREBOARD
from tests.conformance.test_conformance import CHECKS

MUTATIONS = mutations_attack.MUTATIONS + mutations_training.MUTATIONS
MUTATIONS = MUTATIONS + [mutation for module in OBJECTIVE_MODULES for mutation in module.MUTATIONS]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.name.replace(" ", "-") for m in MUTATIONS])
def test_mutation_is_caught(mutation: Mutation, tmp_path_factory: pytest.TempPathFactory) -> None:
    SCOREBOARD[mutation.name] = None
    product = mutated(mutation, tmp_path_factory.mktemp("mutants"), MUTATIONS.index(mutation))
    with pytest.raises(AssertionError) as caught:
        CHECKS[mutation.caught_by](product)
    SCOREBOARD[mutation.name] = (
        f"{mutation.caught_by}: {str(caught.value).splitlines()[0] if str(caught.value) else 'assertion'}"
    )


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
