"""Faults planted in engine/: in schedules, optimisers and the average of weights."""

from tests.mutations.mutation import Mutation

_RUN = "tests/reference/test_reference_run.py::test_product_trains_what_the_reference_trains"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "a warm-up that ends on a step lasts one step longer",
        "engine/schedules.py",
        "step < epochs * steps_per_epoch - _TOLERANCE",
        "step < epochs * steps_per_epoch + _TOLERANCE",
        _RUN + "[bag-of-tricks-1x1]",
    ),
    Mutation(
        "the two readings of a milestone are swapped",
        "engine/schedules.py",
        'schedule.boundary == "last_iteration"',
        'schedule.boundary == "after"',
        _RUN + "[bag-of-tricks-1x1]",
    ),
    Mutation(
        "cosine begins before warm-up",
        "engine/schedules.py",
        "first = schedule.warmup_epochs * steps_per_epoch\n    progress",
        "first = 0.0\n    progress",
        _RUN + "[pgd_at-1x1]",
    ),
    Mutation(
        "cosine ends at zero",
        "engine/schedules.py",
        "return schedule.final_lr + (base_lr - schedule.final_lr) * 0.5",
        "return base_lr * 0.5",
        _RUN + "[pgd_at-1x1]",
    ),
    Mutation(
        "the rate falls where the batch grows",
        "engine/schedules.py",
        "optimizer.lr * batch_size / optimizer.lr_per",
        "optimizer.lr * optimizer.lr_per / batch_size",
        _RUN + "[pgd_at-1x1]",
    ),
    Mutation(
        "the triangle of the rate is turned round behind its peak",
        "engine/schedules.py",
        "(num_steps - step) / max",
        "(step - peak) / max",
        _RUN + "[robust-overfitting-1x1]",
    ),
    Mutation(
        "the staircase of the rate steps down half an interval early",
        "engine/schedules.py",
        "math.floor(step / (schedule.decay_every * steps_per_epoch) + _TOLERANCE)",
        "round(step / (schedule.decay_every * steps_per_epoch) + _TOLERANCE)",
        _RUN + "[trades-1x1]",
    ),
    Mutation(
        "warm-up of the rate always starts at zero",
        "engine/schedules.py",
        "start = schedule.warmup_start or 0.0",
        "start = 0.0",
        _RUN + "[intriguing-properties-1x1]",
    ),
    Mutation(
        "the overshooting warm-up counts whole steps before",
        "engine/schedules.py",
        "((step + 1) / steps_per_epoch + 1.0) / epochs",
        "(step / steps_per_epoch + 1.0) / epochs",
        _RUN + "[bag-of-tricks-1x1]",
    ),
    Mutation(
        "the average keeps what it should give away",
        "engine/averaging.py",
        "1 - self.decay_at(step)",
        "self.decay_at(step)",
        _RUN + "[trades-1x1]",
    ),
    Mutation(
        "the dynamic decay starts at its end",
        "engine/averaging.py",
        "return min(self._config.decay",
        "return max(self._config.decay",
        _RUN + "[pgd_at-1x1]",
    ),
    Mutation(
        "statistics are averaged where they should be live",
        "engine/averaging.py",
        'config.buffers == "average"',
        'config.buffers != "average"',
        _RUN + "[trades-1x1]",
    ),
    Mutation(
        "weight decay falls on norms and biases and spares the kernels",
        "engine/optimizers.py",
        "((decay, config.weight_decay), (no_decay, 0.0))",
        "((no_decay, config.weight_decay), (decay, 0.0))",
        _RUN + "[intriguing-properties-1x1]",
    ),
    Mutation(
        "adam decays weights beside the gradient as adamw does",
        "engine/optimizers.py",
        "return torch.optim.Adam(groups",
        "return torch.optim.AdamW(groups",
        _RUN + "[trades-1x1]",
    ),
    Mutation(
        "adamw decays weights in the gradient as adam does",
        "engine/optimizers.py",
        "return torch.optim.AdamW(groups",
        "return torch.optim.Adam(groups",
        _RUN + "[uncovering-the-limits-1x1]",
    ),
    Mutation(
        "adam forgets the recipe's eps",
        "engine/optimizers.py",
        "torch.optim.Adam(groups, lr=lr, eps=config.eps)",
        "torch.optim.Adam(groups, lr=lr)",
        _RUN + "[trades-1x1]",
    ),
    Mutation(
        "sgd forgets nesterov",
        "engine/optimizers.py",
        "return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)",
        "return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=False)",
        _RUN + "[intriguing-properties-1x1]",
    ),
    Mutation(
        "rmsprop remembers what it should forget",
        "engine/optimizers.py",
        "alpha=config.rmsprop_decay",
        "alpha=1 - config.rmsprop_decay",
        _RUN + "[trades-on-two-branches-1x1]",
    ),
)
