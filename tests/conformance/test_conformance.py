"""Our attacks and objectives keep every promise of the suite."""

from __future__ import annotations

import pytest

from tests.conformance import checks_attack, checks_attack_entries, checks_objectives, checks_start
from tests.conformance.objectives import MODULES as OBJECTIVE_MODULES
from tests.conformance.product import FUSED, REAL

MODULES = (checks_attack, checks_attack_entries, checks_start, checks_objectives, *OBJECTIVE_MODULES)
CHECKS = {check.__name__: check for module in MODULES for check in module.CHECKS}


@pytest.mark.parametrize("name", CHECKS)
def test_promise(name: str) -> None:
    CHECKS[name](REAL)


@pytest.mark.parametrize(
    "check", [*checks_attack.CHECKS, *checks_attack_entries.CHECKS, *checks_start.CHECKS], ids=lambda c: c.__name__
)
def test_promise_with_fused_kernels(check) -> None:
    check(FUSED)


def test_every_check_is_listed() -> None:
    """A check that nobody runs keeps nothing."""
    for module in MODULES:
        defined = {
            n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
            and callable(v) and v.__annotations__.get("product") and list(v.__annotations__) == ["product", "return"]
        }  # fmt: skip
        assert defined == {c.__name__ for c in module.CHECKS}
