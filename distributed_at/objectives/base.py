"""What an objective is: one training step's forwards and the loss that they give. It owns no weights and no loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from distributed_at.batch import Batch

BranchName = Literal["clean", "adv"]


class Forward(Protocol):
    """The network as the engine lends it to an objective."""

    def __call__(
        self, x: torch.Tensor, branch: BranchName = "adv", bn: Literal["train", "batch"] = "train", grad: bool = True
    ) -> torch.Tensor:
        """Return logits (N, K) of images (N, C, H, W).

        ``bn="train"`` normalises with batch statistics and moves the running ones; ``"batch"`` leaves those alone.
        ``grad=False`` builds no graph.
        """
        ...


@dataclass(frozen=True)
class Terms:
    """The outcome of one micro-batch.

    Attributes:
        loss: scalar with its graph, a mean over samples: what the engine differentiates.
        terms: name -> scalar, detached, for the log.
        logits: "clean" and / or "adv" -> (N, K), detached, for accuracies. Kept by name, never by position.
        clean_rows: (M,) int64 rows of the batch that ``logits["clean"]`` belongs to; None = all of them.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]
    clean_rows: torch.Tensor | None = None

    def labels_of(self, name: str, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels that belong to ``logits[name]``, given those of the whole batch (N,)."""
        return labels[self.clean_rows] if name == "clean" and self.clean_rows is not None else labels


class Objective:
    """Base of all objectives. Subclasses define ``loss``.

    What a step leaves for the next one is declared here and nowhere else, and so is saved, resumed exactly and moved
    between world sizes: numbers and words in ``state_dict``, a row for each image of a batch in ``place_tensors``.

    Attributes:
        needs_attack: whether ``loss`` is given adversarial images.
        attack_branch: the norm branch that the attack and robust evaluation use.
        has_after_step: whether ``after_step`` does anything; the engine skips the call otherwise.
    """

    needs_attack: ClassVar[bool] = True
    attack_branch: BranchName = "adv"

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the loss of a micro-batch; ``adv`` (N, C, H, W) are the attack's images, None without an attack."""
        raise NotImplementedError

    @property
    def has_after_step(self) -> bool:
        return False

    def after_step(self, forward: Forward, batch: Batch) -> None:
        """Called once a micro-batch after the optimiser's step."""

    def bn_group_sizes(self, group_size: int) -> dict[BranchName, int]:
        """Return how many samples BN sees together on each branch when a group holds ``group_size`` images."""
        return {"clean": group_size, "adv": group_size}

    def state_dict(self) -> dict[str, Any]:
        """Return JSON values, equal on all ranks, that the next step needs; {} for a pure function of its arguments."""
        return {}

    def place_tensors(self) -> dict[str, torch.Tensor]:
        """Return name -> (B / W, ...) contiguous tensors that the next step needs, in their own storage.

        Row i belongs to the i-th place of this rank's share of a step's batch, whichever image stands there: what
        "free" adversarial training keeps of its perturbation (Shafahi et al. 2019, algorithm 1). A resume writes into
        these tensors, at any world size.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but the checkpoint holds {sorted(state)}")


def required_adv(adv: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """Return ``adv``, or raise a ValueError where the caller forgot the attack or handed another batch's images."""
    if adv is None or adv.shape != batch.images.shape:
        got = None if adv is None else tuple(adv.shape)
        raise ValueError(f"adversarial images of shape {tuple(batch.images.shape)} are needed, got {got}")
    return adv.detach()
