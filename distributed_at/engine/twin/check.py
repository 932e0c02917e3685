"""A debug mode: at every attack the twin is compared with the live network in eval mode, and a difference ends the run.

``DISTRIBUTED_AT_CHECK_TWIN=on`` turns it on, on every rank. The live network is judged through a copy of its own that
shares nothing with the twin: made before the engine, never folded, never cast, filled from the live state each time.
It changes no number of a run and multiplies the time of the attack; off, nothing of it exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from distributed_at.attacks.balls import Bounds as Box
from distributed_at.attacks.iteration import Iteration
from distributed_at.attacks.losses import Goal
from distributed_at.batch import Batch
from distributed_at.config import AttackConfig
from distributed_at.engine.twin.twin import DTYPES, Twin
from distributed_at.errors import ConfigError
from distributed_at.models.branches import set_branch
from distributed_at.models.norm import BatchNorm, MixtureBatchNorm, set_bn_mode, set_group_size

VARIABLE = "DISTRIBUTED_AT_CHECK_TWIN"
# The twin's tensors are compared element by element: what is a view or a cast, exactly; what is folded, within this many
# roundings of the live dtype on each term, before the one rounding to the attack's dtype. So a stale weight is seen
# where it would change the attack at all.
FOLD_ROUNDINGS = 16
_ROOT = "network."  # where the twin holds the network


class Bounds(NamedTuple):
    """Largest relative errors: of a batch's logits (Frobenius norm), and of the input gradient (median over images).

    A median, because one ReLU whose input rounds to the other side of zero changes its image's gradient at once.
    """

    logits: float
    gradient: float


# By the attack's dtype. 16 bits round every activation; the tensors' own comparison sees what hides behind that.
BOUNDS = {"fp32": Bounds(1e-4, 1e-3), "bf16": Bounds(0.1, 0.5), "fp16": Bounds(0.02, 0.1)}


class TwinMismatchError(RuntimeError):
    """What an attack, or an objective, sees of a network is not that network.

    Attributes:
        step: optimiser steps done.
        what: the tensor, layer or output that differs.
        difference: how much; ``bound`` is what rounding explains.
    """

    def __init__(self, step: int, what: str, difference: float, bound: float, name: str = "the network") -> None:
        super().__init__(
            f"step {step}: {name} is not to the attack what it is: {what} differs by {difference:.3g}, "
            f"rounding explains {bound:.3g} ({VARIABLE})"
        )
        self.step, self.what, self.difference, self.bound = step, what, difference, bound


def wanted() -> bool:
    """Whether the environment asks for the comparison: ``on`` or ``off``, the default."""
    value = os.environ.get(VARIABLE, "").strip().lower() or "off"
    if value not in ("on", "off"):
        raise ConfigError(f"{VARIABLE}={value!r}: allowed are on, off")
    return value == "on"


class TwinCheck:
    """Compares a twin with the live network, and the live network with what the last step left.

    Args:
        spare: a copy of the network as it was before the engine took it; kept and overwritten.
        live: the network that is trained.
        twin: what attacks it.
        attack: the recipe's, which says what the twin has to be.
        group_size: of the attack's batch statistics; None = whole batches.
        name: of the network, for the error.

    Attributes:
        count: comparisons made.
    """

    def __init__(
        self,
        spare: nn.Module,
        live: nn.Module,
        twin: Twin,
        attack: AttackConfig,
        group_size: int | None = None,
        name: str = "the network",
    ) -> None:
        self._spare, self._live, self._twin = spare.requires_grad_(False).eval(), live, twin
        set_bn_mode(spare, attack.bn_mode)
        set_branch(spare, attack.branch)
        if group_size is not None:
            set_group_size(spare, group_size)
        self._branch, self._bn_mode, self._name = attack.branch, attack.bn_mode, name
        self._dtype = DTYPES[attack.dtype]
        self._bounds = BOUNDS[attack.dtype]
        self._behind: dict[str, str] | None = None
        self._left: dict[str, torch.Tensor] = {}
        self._left_by = -1
        self.count = 0

    def stepped(self, step: int) -> None:
        """Remember the weights and statistics that step ``step`` left; the next attack must find them."""
        self._left, self._left_by = {n: t.detach().clone() for n, t in self._state().items()}, step

    def _state(self) -> dict[str, torch.Tensor]:
        return {**dict(self._live.named_parameters()), **dict(self._live.named_buffers())}

    def compare(self, step: int, batch: Batch) -> None:
        """Compare now, before the attack of optimiser step ``step`` on ``batch``.

        Raises:
            TwinMismatchError: for the first difference, in the order: live state, the twin's tensors, logits, gradient.
        """
        self._untouched(step)
        images = batch.images.detach()
        if self._behind is None:
            self._behind = _norms_behind(self._spare, images)
        self._spare.load_state_dict(self._live.state_dict())
        self._tensors(step)
        logits, gradient = _outputs(self._reference, images, batch.labels)
        with self._statistics_kept():
            found, found_gradient = _outputs(self._twin, images, batch.labels)
        self._judge_logits(step, images, found, logits)
        error = _relative(found_gradient.flatten(1), gradient.flatten(1)).median().item() if len(images) else 0.0
        if not error <= self._bounds.gradient:
            raise self._mismatch(step, "the input gradient", error, self._bounds.gradient)
        self.count += 1

    def watching(self, step: int, iteration: Iteration) -> Iteration:
        """Return the iteration, whichever form it has, with its logits compared each time that it runs."""

        def watched(
            adv: torch.Tensor, step_size: torch.Tensor, bounds: Box, goal: Goal
        ) -> tuple[torch.Tensor, torch.Tensor]:
            following, logits = iteration(adv, step_size, bounds, goal)
            with torch.no_grad():
                self._judge_logits(step, adv, logits, self._reference(adv))
            return following, logits

        return watched

    def _mismatch(self, step: int, what: str, difference: float, bound: float) -> TwinMismatchError:
        return TwinMismatchError(step, what, difference, bound, self._name)

    def _reference(self, x: torch.Tensor) -> torch.Tensor:
        return self._spare(x)

    def _untouched(self, step: int) -> None:
        if self._left_by != step - 1:  # resumed, gone back, or the step before moved nothing
            return
        now = self._state()
        for name, before in self._left.items():
            if not torch.equal(now[name], before):
                what = f"{name}, written to since the step,"
                raise self._mismatch(step, what, _largest(now[name], before), 0.0)

    def _tensors(self, step: int) -> None:
        live = {**dict(self._spare.named_parameters()), **dict(self._spare.named_buffers())}
        own = {**dict(self._twin.module.named_parameters()), **dict(self._twin.module.named_buffers())}
        layers = dict(self._spare.named_modules())
        present = {name.removeprefix(_ROOT) for name, _ in self._twin.module.named_modules()}
        assert self._behind is not None
        for full, found in own.items():
            name = full.removeprefix(_ROOT)
            layer, _, leaf = name.rpartition(".")
            norm = self._behind.get(layer)
            if norm is not None and _without_branch(layers, norm) not in present:
                low, high, exact = _folded(layers[layer], layers[norm], leaf)
                outside = (found < low.to(found.dtype)) | (found > high.to(found.dtype)) | ~torch.isfinite(found)
                if bool(outside.any()):
                    bound = _largest(high.to(found.dtype), low.to(found.dtype))
                    raise self._mismatch(step, f"{name}, folded with {norm},", _largest(found, exact), bound)
                continue
            expected = live.get(name, live.get(f"{layer}.{self._branch}.{leaf}"))
            if expected is None or not torch.equal(found, expected.to(found.dtype)):
                difference = torch.inf if expected is None else _largest(found, expected.to(found.dtype))
                raise self._mismatch(step, name, difference, 0.0)

    def _judge_logits(self, step: int, images: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> None:
        error = _relative(found.flatten(), expected.flatten()).item() if found.numel() else 0.0
        if not error <= self._bounds.logits:
            layer = self._first_layer(images)
            raise self._mismatch(step, f"the logits (from {layer} on)", error, self._bounds.logits)

    def _first_layer(self, images: torch.Tensor) -> str:
        """Return the first layer whose output differs by more than rounding, in the order in which layers run."""
        assert self._behind is not None
        with torch.no_grad(), self._statistics_kept(), _recorded(self._twin.module) as found:
            self._twin(images)
        with torch.no_grad(), _recorded(self._spare) as expected:
            self._reference(images)
        ours = {name.removeprefix(_ROOT): value for name, value in found.items()}
        layers = dict(self._spare.named_modules())
        for name, value in expected.items():
            place, norm = _without_branch(layers, name), self._behind.get(name)
            if norm is not None and _without_branch(layers, norm) not in ours:  # folded: it does the norm's work
                value = expected[norm]
            if place in ours and ours[place].shape == value.shape:
                error = _relative(ours[place].float().flatten(), value.float().flatten()).item()
                if not error <= self._bounds.logits:
                    return place
        return "the images"

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """An attack in BN mode 'train' moves the live statistics; a comparison must not."""
        kept = [(b, b.clone()) for b in self._live.buffers()] if self._bn_mode == "train" else []
        yield
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


def _outputs(
    network: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, and the gradient of each image's true logit above the mean; it is linear, so it never vanishes."""
    with torch.enable_grad():
        image = images.clone().requires_grad_()
        logits = network(image)
        margins = logits.gather(1, labels[:, None])[:, 0] - logits.mean(dim=1)
        (gradient,) = torch.autograd.grad(margins.sum(), image)
    return logits.detach(), gradient


def _relative(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return |found - expected| / |expected| along the last dimension; NaN where either is not finite."""
    expected = expected.double()
    return (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def _folded(conv: nn.Module, norm: nn.Module, leaf: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (least, most, exact) of a frozen norm inside its convolution: gamma (W x + b - mean) / sd + beta, float64."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, BatchNorm)
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    if leaf == "weight":
        exact = torch.einsum("o...,o->o...", conv.weight.double(), scale)
        terms = exact.abs()
    else:
        centre = norm.running_mean.double() - (0.0 if conv.bias is None else conv.bias.double())
        exact = norm.bias.double() - centre * scale
        largest = norm.running_mean.double().abs() + (0.0 if conv.bias is None else conv.bias.double().abs())
        terms = norm.bias.double().abs() + largest * scale.abs()
    slack = FOLD_ROUNDINGS * torch.finfo(conv.weight.dtype).eps * terms
    return exact - slack, exact + slack, exact


def _without_branch(layers: dict[str, nn.Module], name: str) -> str:
    """Return the name under which the twin holds a layer: a mixture's side takes the mixture's place."""
    outer = name.rpartition(".")[0]
    return outer if isinstance(layers.get(outer), MixtureBatchNorm) else name


@contextmanager
def _recorded(network: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the output of every layer without layers of its own, by name, in the order in which they run."""
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: outputs.__setitem__(name, output)

    leaves = [(name, layer) for name, layer in network.named_modules() if not any(True for _ in layer.children())]
    handles = [layer.register_forward_hook(keep(name)) for name, layer in leaves]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _norms_behind(network: nn.Module, images: torch.Tensor) -> dict[str, str]:
    """Return convolution -> the batch norm that reads its output, by name, as one forward shows it."""
    made: dict[int, str] = {}
    behind: dict[str, str] = {}
    alive: list[torch.Tensor] = []  # so that no id is given twice

    def made_by(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            alive.append(output)
            made[id(output)] = name

        return hook

    def read_by(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if id(inputs[0]) in made:
                behind[made[id(inputs[0])]] = name

        return hook

    handles = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            handles.append(layer.register_forward_hook(made_by(name)))
        elif isinstance(layer, BatchNorm):
            handles.append(layer.register_forward_pre_hook(read_by(name)))
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return behind
