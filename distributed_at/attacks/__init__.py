"""White-box attacks on any network, usable without the rest of the package: ``from distributed_at.attacks import PGD``."""

from distributed_at.attacks.iteration import make_iteration
from distributed_at.attacks.losses import LOSSES, Goal, attack_loss
from distributed_at.attacks.pgd import PGD
from distributed_at.attacks.results import AttackResult, Trajectory
from distributed_at.attacks.targets import choose_targets
from distributed_at.attacks.threat import Threat

__all__ = [
    "LOSSES",
    "PGD",
    "AttackResult",
    "Goal",
    "Threat",
    "Trajectory",
    "attack_loss",
    "choose_targets",
    "make_iteration",
]
