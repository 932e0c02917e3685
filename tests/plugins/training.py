"""An optimiser and a schedule of a user's: RAdam, and a straight line down."""

import torch

from distributed_at.catalogue.optimizers import Optimizer
from distributed_at.catalogue.schedules import Schedule


def radam(groups, config, lr):
    return torch.optim.RAdam(groups, lr=lr, betas=tuple(config.options.get("betas", (0.9, 0.999))))


def line(step, *, schedule, base_lr, steps_per_epoch, num_steps):
    """From the rate down to ``options.end`` of it."""
    end = schedule.options.get("end", 0.0)
    return base_lr * (1 - (1 - end) * step / num_steps)


OPTIMIZERS = {"radam": Optimizer(title="RAdam", build=radam, states=2)}
SCHEDULES = {"line": Schedule(title="a straight line", rate=line)}
