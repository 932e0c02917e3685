"""Small loops around the real attacks and objectives: data order, training, selection, evaluation, on one page.

They stand for the places where adversarial-training loops go wrong outside the attack, so that the checks and their
mutations have something to bite on that runs in milliseconds. The shipped loops are tested at their own places.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from distributed_at import rng
from distributed_at.attacks import PGD, Threat
from distributed_at.batch import Batch
from distributed_at.objectives import ObjectiveContext, build_objective

ATTACK = PGD(threat=Threat("linf", 8 / 255), num_steps=2, step_size=4 / 255)


def rows_of_rank(order, step: int, batch_size: int, *, rank: int, local_rank: int, world_size: int):
    """Return this rank's sample ids of a step; ``local_rank`` picks a device and nothing else."""
    batch = order[step * batch_size : (step + 1) * batch_size]
    share = batch_size // world_size
    return batch[rank * share : (rank + 1) * share]


def initial_state(model: nn.Module) -> dict:
    return {
        "step": 0,
        "model": model.state_dict(),
        "momentum": {n: torch.zeros_like(p) for n, p in model.named_parameters()},
    }


def train(model: nn.Module, images, labels, config, *, steps: int, state: dict | None = None, seed: int = 0) -> dict:
    """Run adversarial training up to step ``steps`` and return what a resumed run needs; momentum SGD, batches of 6."""
    state = state if state is not None else initial_state(model)
    momentum = {n: m.clone() for n, m in state["momentum"].items()}
    model.load_state_dict(state["model"])
    objective = build_objective(config, ObjectiveContext(num_classes=5, seed=seed))
    per_epoch = len(images) // 6

    def forward(x, branch="adv", bn="train", grad=True, shares=None, ids=None):
        model.train(bn == "train")
        with torch.set_grad_enabled(grad):
            return model(x)

    for step in range(state["step"], steps):
        epoch, index = divmod(step, per_epoch)
        ids = torch.from_numpy(rng.permutation(seed, epoch, len(images)))[index * 6 : (index + 1) * 6]
        batch = Batch(ids, images[ids], labels[ids], epoch, step, torch.full((6,), index))
        adv = ATTACK.perturb(model.eval(), batch.images, batch.labels, sample_ids=ids, epoch=epoch, seed=seed)
        loss = objective.loss(forward, batch, adv).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                momentum[name] = 0.9 * momentum[name] + gradient
                parameter -= 0.05 * momentum[name]
        objective.after_step(forward, batch)
    return {
        "step": steps,
        "model": {n: v.clone() for n, v in model.state_dict().items()},
        "momentum": momentum,
    }


def best_checkpoint(history: list[dict]) -> int:
    """Return the step of the best checkpoint by robust accuracy on held-out training images, the earliest of equals."""
    return max(history, key=lambda row: (row["validation_robust"], -row["step"]))["step"]


def evaluate(model: nn.Module, images, labels, folder: Path, *, epoch: int = rng.EVALUATION_EPOCH) -> float:
    """Attack every image in batches of 500, write one row an image to ``ledger.jsonl``, return robust accuracy."""
    rows = []
    for first in range(0, len(images), 500):
        x, y = images[first : first + 500], labels[first : first + 500]
        ids = torch.arange(first, first + len(x))
        result = ATTACK.perturb_with_info(model, x, y, sample_ids=ids, epoch=epoch)
        rows += [{"id": i, "correct": c} for i, c in zip(ids.tolist(), result.correct.tolist(), strict=True)]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sum(row["correct"] for row in rows) / len(rows)


def evaluate_with(model: nn.Module, images, labels, evaluator) -> float:
    """Hand [0, 1] images to an external evaluator (AutoAttack's signature); normalisation stays inside the model."""
    adv = evaluator(model, images, labels)
    return (model(adv).argmax(1) == labels).double().mean().item()


def clean_loss(model: nn.Module, images, labels) -> float:
    """Return the clean loss for the log, moving nothing: eval mode, flags restored, no graph."""
    training = model.training
    model.eval()
    with torch.no_grad():
        value = F.cross_entropy(model(images), labels).item()
    model.train(training)
    return value
