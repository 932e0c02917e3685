"""Free adversarial training: each batch is used several times, and one backward moves the weights and the perturbation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distributed_at.config.objective import ObjectiveSection
from distributed_at.lazy import F, torch
from distributed_at.objectives.base import ITSELF, Forward, Needs, Objective, ObjectiveContext, Passes, Terms
from distributed_at.objectives.labels import SmoothingForm, smoothed_cross_entropy

if TYPE_CHECKING:
    from distributed_at.batch import Batch
    from distributed_at.config import RunConfig

Box = Literal["perturbation", "images"]
# What of ``attack`` the algorithm reads, and what it does in any case, which a recipe must then say.
_READ = ("eps", "step_size", "branch", "eps_warmup_epochs", "eps_warmup_form")
_FIXED: dict[str, Any] = {"num_steps": 1, "start": "zero"}


class FreeAt(Objective):
    """Cross-entropy at x + delta, for ``replays`` steps in a row with one batch (Shafahi et al. 2019, algorithm 1).

    The backward of a step gives the gradient to the weights and to delta. The weights move by the gradient at the delta
    that was shown; then delta moves by ``attack.step_size`` times the sign of its own gradient and is projected into the
    ball. The published step is the whole ``attack.eps``, not a fraction of it. Delta is kept by place: row i of the batch
    finds what row i of the batch before left, across batches and epochs; a smaller last batch uses the first rows. It
    begins at zero and is never reset. BN's running statistics see each replay once.

    ``train.epochs`` are passes over the data: m replays make m times as many steps an epoch, and the published "epochs /
    m" is what to write. ``box``: "perturbation" cuts the new delta so that the image it was found for stays in the pixel
    box (Wong et al.'s code; under the next image it may leave it for one replay), "images" keeps delta and cuts the sum
    (Shafahi et al.'s code, where a pixel that is cut gives no gradient).

    ``gradient="own_pass"`` is no published algorithm: delta's gradient comes from a pass of its own in the recipe's
    ``attack.bn_mode``, at the price of that pass; all else stays. It is how rows called "eval" of Pang et al.'s table 10 can
    be read, since one pass cannot be in two modes.
    """

    class Config(ObjectiveSection):
        """Free adversarial training: each batch replayed, one backward for weights and perturbation."""

        name: Literal["free_at"] = "free_at"
        replays: int = Field(default=8, ge=1, description="steps in a row with one batch, m")
        box: Box = Field(
            default="perturbation",
            description="what is kept in the pixel box: the perturbation of the image at hand (Wong et al.'s code), or the images "
            "shown (Shafahi et al.'s code)",
        )
        gradient: Literal["shared", "own_pass"] = Field(
            default="shared",
            description="'shared' = of the backward that trains the weights; 'own_pass' = of another pass, in attack.bn_mode",
        )
        label_smoothing: float = Field(
            default=0.0, ge=0, lt=1, description="of the training loss, and so of a shared gradient"
        )
        label_smoothing_form: SmoothingForm = "uniform"

    config: Config
    title = "Free adversarial training"
    source = "Shafahi et al., Adversarial training for free!, NeurIPS 2019"
    branches = ("adv",)

    @classmethod
    def needs(cls, config: Config) -> Needs:
        own = config.gradient == "own_pass"
        return Needs(attack="own", state=True, repeats=config.replays, itself=own)

    @classmethod
    def passes(cls, config: Config) -> Passes:
        return Passes(trained={"adv": 1.0}, moving=("adv",), attacked=float(config.gradient == "own_pass"))

    @classmethod
    def clean_share(cls, config: Config) -> float | None:
        return 0.0

    @classmethod
    def refuse(cls, run: RunConfig) -> str | None:
        attack = run.attack
        if attack is None:
            return None
        shared = run.objective.gradient == "shared"  # type: ignore[attr-defined]
        if not shared and attack.bn_mode == "train":
            return (
                "attack.bn_mode 'train' is what objective.gradient: shared has for nothing: write it, or bn_mode: eval"
            )
        fixed = {**_FIXED, **({"bn_mode": "train"} if shared else {})}
        read = (*_READ, *(() if shared else ("bn_mode", "dtype", "precision_certificate")))
        for name, field in type(attack).model_fields.items():
            wanted = fixed.get(name, field.get_default(call_default_factory=True))
            if name not in read and getattr(attack, name) != wanted:
                return (
                    f"objective '{run.objective.name}' moves the perturbation that it keeps by one step a replay: "
                    f"attack.{name} is {wanted!r} there, got {getattr(attack, name)!r}"
                )
        return None

    def __init__(self, config: Config, context: ObjectiveContext) -> None:
        super().__init__(config, context)
        size = context.image_size
        self._delta = torch.zeros(context.places, 3, size, size, device=context.device)
        self._leaf: torch.Tensor | None = None  # of the micro-batch whose backward is awaited

    def place_tensors(self) -> dict[str, torch.Tensor]:
        return {"delta": self._delta}

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mean loss over the images with their perturbations, to which a gradient will be there."""
        c = self.config
        delta = torch.zeros_like(batch.images) if batch.place is None else self._rows(batch).clone()
        self._leaf = delta.requires_grad_()
        shown = free_images(batch.images, delta, box=c.box)
        if c.gradient == "own_pass":
            with torch.enable_grad():
                own = F.cross_entropy(self.views[ITSELF](shown), batch.labels, reduction="sum")
            (delta.grad,) = torch.autograd.grad(own, delta)
            shown = shown.detach()
        logits = forward(shown, branch=self.context.attack_branch)
        loss = smoothed_cross_entropy(logits, batch.labels, c.label_smoothing, form=c.label_smoothing_form).mean()
        return Terms(loss, {"adv_loss": loss.detach()}, {"adv": logits.detach()})

    def before_step(self, network: torch.nn.Module, batch: Batch, *, last: bool) -> None:
        """Move the rows of this micro-batch; the weights have their gradient already."""
        attack, eps, leaf = self.context.attack, self.context.eps, self._leaf
        self._leaf = None
        if batch.place is None:
            return
        assert attack is not None
        assert eps is not None
        assert leaf is not None
        assert leaf.grad is not None
        moved = free_update(
            leaf.detach(),
            leaf.grad,
            batch.images,
            eps=eps(batch.step),
            step_size=attack.step_size / 255.0,
            box=self.config.box,
        )
        self._rows(batch).copy_(moved)

    def _rows(self, batch: Batch) -> torch.Tensor:
        assert batch.place is not None
        return self._delta[batch.place : batch.place + len(batch)]


def free_images(images: torch.Tensor, delta: torch.Tensor, *, box: Box = "perturbation") -> torch.Tensor:
    """Return what is shown to the network: images (N, C, H, W) in [0, 1] with their perturbations."""
    total = images + delta
    if box == "perturbation":
        return total
    # at 0 and 1 themselves the gradient passes, as through tf.clip_by_value; through torch's clamp it does not
    return torch.where((total >= 0.0) & (total <= 1.0), total, total.detach().clamp(0.0, 1.0))


def free_update(
    delta: torch.Tensor,
    gradient: torch.Tensor,
    images: torch.Tensor,
    *,
    eps: float,
    step_size: float | None = None,
    box: Box = "perturbation",
) -> torch.Tensor:
    """Return the next perturbations (N, C, H, W) of images in [0, 1].

    A loop of one's own: ``delta.requires_grad_()``, one backward of the loss at ``free_images(x, delta)``, then
    ``delta = free_update(delta.detach(), delta.grad, x, eps=8 / 255)`` and the optimiser's step; m times with each batch,
    and the next batch begins with this delta.

    Args:
        delta: those that were shown.
        gradient: of the loss, to delta; where it is NaN delta stays.
        images: what they were shown with.
        eps, step_size: in [0, 1] units; the step is the whole eps unless one is given.
        box: as in the recipe's section.
    """
    moved = delta + (eps if step_size is None else step_size) * gradient.sign()  # of NaN: 0
    moved = moved.clamp(-eps, eps)
    return moved if box == "images" else torch.maximum(torch.minimum(moved, 1.0 - images), -images)
