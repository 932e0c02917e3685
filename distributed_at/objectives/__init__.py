"""What one training step minimises, one file each; ``OBJECTIVES`` maps a recipe's name to its class."""

from __future__ import annotations

from distributed_at.config import MixtureConfig, Norm, PgdAtConfig, StandardConfig, TradesConfig
from distributed_at.objectives.base import BranchName, Forward, Objective, Terms
from distributed_at.objectives.mixture import Mixture
from distributed_at.objectives.pgd_at import PgdAt
from distributed_at.objectives.standard import Standard
from distributed_at.objectives.trades import Trades

OBJECTIVES: dict[str, type[Objective]] = {
    "standard": Standard,
    "pgd_at": PgdAt,
    "trades": Trades,
    "mixture": Mixture,
}


def build_objective(
    config: StandardConfig | PgdAtConfig | TradesConfig | MixtureConfig,
    *,
    num_classes: int,
    seed: int,
    norm: Norm = "bn",
    attack_branch: BranchName = "adv",
) -> Objective:
    """Build the objective of a recipe.

    Args:
        config: the recipe's objective section.
        num_classes: K of the classifier.
        seed: the run's seed, for choices made by counters.
        norm: the network's normalisation, which decides whether clean and adversarial images share a forward.
        attack_branch: ``attack.branch`` of the recipe.
    """
    if num_classes < 2:
        raise ValueError(f"an objective needs at least 2 classes, got {num_classes}")
    if isinstance(config, StandardConfig):
        return Standard.from_config(config)
    if isinstance(config, PgdAtConfig):
        return PgdAt.from_config(config, attack_branch=attack_branch)
    if isinstance(config, TradesConfig):
        return Trades.from_config(config, attack_branch=attack_branch)
    return Mixture.from_config(config, seed=seed, norm=norm, attack_branch=attack_branch)


__all__ = [
    "OBJECTIVES",
    "BranchName",
    "Forward",
    "Mixture",
    "Objective",
    "PgdAt",
    "Standard",
    "Terms",
    "Trades",
    "build_objective",
]
