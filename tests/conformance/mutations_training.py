"""Bugs planted in what objectives share."""

from tests.conformance.product import Mutation

MUTATIONS = [
    Mutation(
        "training gradient flows into the attack", "objectives/base.py", "    return adv.detach()\n", "    return adv\n",
        "attack_gets_no_training_gradient",
    ),
    Mutation(
        "smoothing over K where K - 1 is meant", "objectives/labels.py",
        "wrong, true = smoothing / (num_classes - 1), 1.0 - smoothing",
        "wrong, true = smoothing / num_classes, 1.0 - smoothing", "smoothing_follows_its_convention",
    ),
    Mutation(
        "soft labels of a float64 run in float32", "objectives/labels.py",
        "dtype = torch.float32 if dtype is None else dtype", "dtype = torch.float32",
        "smoothing_follows_its_convention",
    ),
]  # fmt: skip
