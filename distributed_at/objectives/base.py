"""What an objective is: its facts, one training step's forwards, and the loss that they give. It owns no loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from distributed_at.lazy import torch

if TYPE_CHECKING:
    from distributed_at.batch import Batch
    from distributed_at.config import AttackConfig, RunConfig
    from distributed_at.config.objective import ObjectiveSection

BranchName = Literal["clean", "adv"]
ITSELF = "itself"  # among ``Objective.views``: the network that is trained


class Forward(Protocol):
    """The network as the engine lends it to an objective."""

    def __call__(
        self,
        x: torch.Tensor,
        branch: BranchName = "adv",
        bn: Literal["train", "batch"] = "train",
        grad: bool = True,
        shares: tuple[float, ...] | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits (N, K) of images (N, C, H, W).

        ``bn="train"`` normalises with batch statistics and moves the running ones; ``"batch"`` leaves those alone.
        ``grad=False`` builds no graph. ``shares``: what each BN group of x counts in the running statistics, where that
        is not its share of x. ``ids``: (N,) sample ids where x is not the batch's images in their order; dropout's masks
        belong to them.
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
        moving: kinds of images that BN's running statistics see, in this order, which in train mode is part of what an
            objective means; two kinds in one forward count as both.
        watched: forwards without a backward.
        attacked: forwards with a gradient to the image alone, of an objective that makes its own adversarial images.
        held: images whose activations lie in memory together, for one of the batch; None = all that are trained.
    """

    trained: Mapping[BranchName, float]
    moving: tuple[BranchName, ...]
    watched: float = 0.0
    attacked: float = 0.0
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
        attack: "given" = the recipe's attack makes its adversarial images; "none" = it sees none; "own" = it makes them
            itself, within the ball of the recipe's attack, which is then not run.
        whole_groups: why a BN group may not be cut between ranks; "" = it may.
        networks: names of the networks that it keeps beside the one that is trained.
        gradients: ``before_step`` reads or changes the weights' gradients.
        state: it keeps numbers or tensors from one step to the next.
        itself: ``views`` hold the trained network as the recipe's attack would see it, for gradients to images.
        repeats: how many steps in a row a batch is used for. Each is an optimiser step of its own; an epoch still reads
            every image once, and so has ``repeats`` times as many steps.
    """

    attack: Literal["none", "given", "own"] = "given"
    whole_groups: str = ""
    networks: tuple[str, ...] = ()
    gradients: bool = False
    state: bool = False
    itself: bool = False
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class ObjectiveContext:
    """What an objective may know of its run beside its own section.

    Attributes:
        num_classes: K of the classifier.
        seed: the run's seed, for choices made by counters.
        shared_statistics: clean and adversarial images normalise with each other where they share a forward: one batch
            norm for both. False where each kind has a norm of its own, or images do not meet in the norm.
        attack_branch: ``attack.branch`` of the recipe: the norm branch that the attack uses.
        places: images of a step on this rank, B / W: rows of ``place_tensors``.
        image_size: height and width of the images, of three channels.
        device: where images and networks lie.
        attack: the recipe's attack, None without one.
        eps: step -> radius of the attack in [0, 1] units.
        new_network: returns another network of the recipe's architecture on the device, in eval mode and frozen, with
            the weights of a run or file (its argument, as in ``train.init_from``) or those that the run begins with.
    """

    num_classes: int
    seed: int
    shared_statistics: bool = True
    attack_branch: BranchName = "adv"
    places: int = 0
    image_size: int = 0
    device: str = "cpu"
    attack: AttackConfig | None = None
    eps: Callable[[int], float] | None = None
    new_network: Callable[[str | None], torch.nn.Module] | None = None

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"an objective needs at least 2 classes, got {self.num_classes}")


class Objective:
    """Base of all objectives. A subclass gives its section, its facts, ``passes`` and ``loss``; everything else asks it.

    What a step leaves for the next one is declared here and nowhere else, and so is saved, resumed exactly and moved
    between world sizes: numbers and words in ``state_dict``, a row for each image of a batch in ``place_tensors``, other
    networks in ``networks``. ``needs`` says that there is such a state.

    Attributes:
        Config: the section of a recipe whose ``name`` chooses this objective.
        title: what a report calls it.
        source: who proposed it, and where.
        branches: kinds of images that its loss sees, which are the norm branches that it trains.
        attack_losses: losses measured from the clean prediction that its attack may maximise. Losses of labels alone go
            with every objective.
        views: name of one of ``networks``, and ``ITSELF`` where ``needs`` asks for it -> images in [0, 1] to logits float32,
            for gradients to the images: set by the engine where there is an attack, and up to date whenever the
            objective is called.
    """

    Config: ClassVar[type[ObjectiveSection]]
    title: ClassVar[str]
    source: ClassVar[str]
    branches: ClassVar[tuple[BranchName, ...]] = ("clean", "adv")
    attack_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, context: ObjectiveContext) -> None:
        self.config = config
        self.context = context
        self.views: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {}

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
    def needs_labels(cls, run: RunConfig) -> str | None:
        """Return what looks at the label of every image, in words; None where images may come without one (label -1)."""
        return f"objective '{run.objective.name}' trains on the label of every image"

    @classmethod
    def clean_share(cls, config: Any) -> float | None:
        """Return the clean images for each adversarial one, where the loss is a mixture of both; None for other losses."""
        return None

    @classmethod
    def notes(cls, config: Any, group_size: int) -> tuple[str, ...]:
        """Return what ``plan`` should say of this section where BN groups hold so many images, a sentence each."""
        return ()

    @classmethod
    def extras(cls, config: Any) -> tuple[str, ...]:
        """Return short names of what this section adds to the plain objective, for legends."""
        return ()

    def prepare(self, batch: Batch) -> Batch:
        """Return the micro-batch as attack and loss are to see it, e.g. with soft targets; called before the attack."""
        return batch

    def around(self, network: torch.nn.Module, batch: Batch, adv: torch.Tensor | None) -> AbstractContextManager[None]:
        """Return what holds while a micro-batch's loss and its backward are computed, such as ``perturbed`` weights."""
        return nullcontext()

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the loss of a micro-batch; ``adv`` (N, C, H, W) are the attack's images, None without an attack."""
        raise NotImplementedError

    def before_step(self, network: torch.nn.Module, batch: Batch, *, last: bool) -> None:
        """Called between the backward of a micro-batch and the optimiser's step.

        Gradients of images that asked for one are there. After the ``last`` micro-batch of a step, where ``needs`` asks
        for ``gradients``, the weights' are there too: the mean over the step's batch, equal on all ranks.
        """

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
        "free" adversarial training keeps of its perturbation (Shafahi et al. 2019, algorithm 1). A micro-batch begins
        at row ``Batch.place``. An incomplete last batch fills the first places of the whole batch, at any world size. A
        resume writes into these tensors, at any world size.
        """
        return {}

    def networks(self) -> dict[str, torch.nn.Module]:
        """Return the networks beside the one that is trained: a frozen teacher, a companion, a source of transfer.

        The optimiser does not know them. They are equal on all ranks after every step; a resume writes into them.
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


@contextmanager
def perturbed(network: torch.nn.Module, changes: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Add ``changes`` (parameter name -> tensor) to the weights; afterwards they are bitwise what they were.

    A backward through a loss of the changed weights must happen inside.
    """
    weight_of = {name: parameter for name, parameter in network.named_parameters() if name in changes}
    if missing := set(changes) - set(weight_of):
        raise ValueError(f"the network has no parameters {sorted(missing)}")
    kept = {name: weight.detach().clone() for name, weight in weight_of.items()}
    try:
        with torch.no_grad():
            for name, change in changes.items():
                weight_of[name].add_(change)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                weight_of[name].copy_(weight)


def check_declared(objective: Objective) -> None:
    """Refuse an objective that keeps what it does not declare, or declares what it does not keep.

    Raises:
        TypeError: what ``needs`` says is not what it holds.
    """
    needs, name = objective.needs(objective.config), type(objective).__name__
    if set(objective.networks()) != set(needs.networks):
        raise TypeError(f"{name} declares the networks {needs.networks} and holds {tuple(objective.networks())}")
    if bool(objective.state_dict() or objective.place_tensors()) != needs.state:
        raise TypeError(f"{name} {'declares a state and keeps none' if needs.state else 'keeps a state: declare it'}")
