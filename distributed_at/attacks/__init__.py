"""White-box attacks on any network, usable without the rest of the package: ``from distributed_at.attacks import PGD``."""

from distributed_at.attacks.iteration import make_iteration
from distributed_at.attacks.losses import Goal
from distributed_at.attacks.pgd import PGD
from distributed_at.attacks.results import AttackResult, Trajectory
from distributed_at.attacks.targets import choose_targets
from distributed_at.attacks.threat import Threat
from distributed_at.catalogue.attacks import ATTACK_LOSSES, AttackLoss

__all__ = [
    "ATTACK_LOSSES",
    "PGD",
    "AttackLoss",
    "AttackResult",
    "Goal",
    "Threat",
    "Trajectory",
    "choose_targets",
    "make_iteration",
]
