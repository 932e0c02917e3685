"""What an objective is: its facts, one training step's forwards, and the loss that they give. It owns no loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from distributed_at.batch import Batch
    from distributed_at.config import RunConfig
    from distributed_at.config.objective import ObjectiveSection

BranchName = Literal["clean", "adv"]


class Forward(Protocol):
    """The network as the engine lends it to an objective."""

    def __call__(
        self,
        x: torch.Tensor,
        branch: BranchName = "adv",
        bn: Literal["train", "batch"] = "train",
        grad: bool = True,
        shares: tuple[float, ...] | None = None,
    ) -> torch.Tensor:
        """Return logits (N, K) of images (N, C, H, W).

        ``bn="train"`` normalises with batch statistics and moves the running ones; ``"batch"`` leaves those alone.
        ``grad=False`` builds no graph. ``shares``: what each BN group of x counts in the running statistics, where that
        is not its share of x.
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
        counts: term -> images that it is a mean over, where it is not all of the batch.
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    logits: dict[str, torch.Tensor]
    clean_rows: torch.Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def labels_of(self, name: str, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels that belong to ``logits[name]``, given those of the whole batch (N,)."""
        return labels[self.clean_rows] if name == "clean" and self.clean_rows is not None else labels


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Passes of the network that an objective makes for one image of the batch, beside those of the recipe's attack.

    Attributes:
        trained: branch -> forwards with a backward through activations and weights; a fraction where a share of the
            batch is used.
        watched: forwards without a backward.
        held: images whose activations lie in memory together, for one of the batch; None = all that are trained.
    """

    trained: Mapping[BranchName, float]
    watched: float = 0.0
    held: float | None = None

    @property
    def total_trained(self) -> float:
        """Forwards with a backward, over branches."""
        return sum(self.trained.values())

    @property
    def activations(self) -> float:
        """Images whose activations lie in memory together, for one of the batch."""
        return self.total_trained if self.held is None else self.held


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective needs around it.

    Attributes:
        attack: "given" = the recipe's attack makes its adversarial images; "none" = it sees none.
        whole_groups: why a BN group may not be cut between ranks; "" = it may.
    """

    attack: Literal["none", "given"] = "given"
    whole_groups: str = ""


@dataclass(frozen=True, kw_only=True)
class ObjectiveContext:
    """What an objective may know of its run beside its own section.

    Attributes:
        num_classes: K of the classifier.
        seed: the run's seed, for choices made by counters.
        shared_statistics: clean and adversarial images normalise with each other where they share a forward: one batch
            norm for both. False where each kind has a norm of its own, or images do not meet in the norm.
        attack_branch: ``attack.branch`` of the recipe: the norm branch that the attack uses.
    """

    num_classes: int
    seed: int
    shared_statistics: bool = True
    attack_branch: BranchName = "adv"

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"an objective needs at least 2 classes, got {self.num_classes}")


class Objective:
    """Base of all objectives. A subclass gives its section, its facts, ``passes`` and ``loss``; everything else asks it.

    What a step leaves for the next one is declared here and nowhere else, and so is saved, resumed exactly and moved
    between world sizes: numbers and words in ``state_dict``, a row for each image of a batch in ``place_tensors``.

    Attributes:
        Config: the section of a recipe whose ``name`` chooses this objective.
        title: what a report calls it.
        source: who proposed it, and where.
        branches: kinds of images that its loss sees, which are the norm branches that it trains.
        attack_losses: losses measured from the clean prediction that its attack may maximise. Losses of labels alone go
            with every objective.
    """

    Config: ClassVar[type[ObjectiveSection]]
    title: ClassVar[str]
    source: ClassVar[str]
    branches: ClassVar[tuple[BranchName, ...]] = ("clean", "adv")
    attack_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, context: ObjectiveContext) -> None:
        self.config = config
        self.context = context

    @classmethod
    def trains(cls, config: Any) -> tuple[BranchName, ...]:
        """Return those of ``branches`` that it trains with this section."""
        return cls.branches

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Return what it needs around it with this section."""
        return Needs()

    @classmethod
    def passes(cls, config: Any) -> Passes:
        """Return the passes that it makes for an image with this section; a test counts them."""
        raise NotImplementedError

    @classmethod
    def refuse(cls, run: RunConfig) -> str | None:
        """Return why it cannot be combined with the rest of a recipe, in a sentence that names fields; None = it can."""
        return None

    @classmethod
    def clean_share(cls, config: Any) -> float | None:
        """Return the clean images for each adversarial one, where the loss is a mixture of both; None for other losses."""
        return None

    @classmethod
    def extras(cls, config: Any) -> tuple[str, ...]:
        """Return short names of what this section adds to the plain objective, for legends."""
        return ()

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the loss of a micro-batch; ``adv`` (N, C, H, W) are the attack's images, None without an attack."""
        raise NotImplementedError

    @property
    def has_after_step(self) -> bool:
        """Whether ``after_step`` does anything; the engine skips the call otherwise."""
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
