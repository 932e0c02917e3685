"""One attack iteration in its fastest form: compiled, whole or region by region; captured as a CUDA graph; or plain.

Chooses the form from the recipe and the work ahead, keeps shapes static and falls back to the plain form with one
warning. What an iteration computes is ``attacks/iteration.py``; when it runs is ``attacks/pgd.py``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from distributed_at.attacks import PGD
from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.iteration import Iteration
from distributed_at.attacks.losses import Goal
from distributed_at.config import AttackConfig
from distributed_at.engine.twin.cuda_graph import Capture, GraphedIteration, capture_cuda
from distributed_at.engine.twin.regions import CompiledRegions, count_convolutions, count_distinct_convolutions, cut
from distributed_at.engine.twin.twin import Twin
from distributed_at.models.norm import BatchNorm
from distributed_at.ops.build import cache_folder

_LOG = logging.getLogger(__name__)

# What the 'auto' decisions assume. They decide from the recipe alone and never from a measured time, so that all ranks
# of a run, and the same run resumed, decide alike.
_RATES = {"cpu": 2e11, "cuda": 6e13}  # sustained FLOP/s of the plain form
_SAVED_SHARE = 0.15  # of the attack's time, by compilation
_COMPILE_SECONDS = (15.0, 1.5)  # once, and for each convolution that the compiler sees
_LAUNCH_SECONDS = 8e-6 * 7  # host time for each convolution with what surrounds it
_GROUP_NORM_SECONDS = (
    5e-4  # and for each fused group norm, whose six kernels Python launches; an H200's host took 480 us
)
# A network of more convolutions is compiled region by region. ResNet-50 has 53 and is compiled whole, ResNet-101 has 104.
REGIONAL_CONVOLUTIONS = 64


@dataclass(frozen=True, kw_only=True)
class IterationWork:
    """How much attacking a run holds, for one worker.

    Attributes:
        macs: multiply-accumulates of one forward of one image.
        convolutions: convolutions of the network.
        compiled_convolutions: those that the compiler sees, ``convolutions_to_compile``.
        fused_norms: group norms that run as one operation.
        batch_size: images of one forward.
        images: images that this worker attacks in the whole run, resumed or not.
        num_steps: iterations an image.
        device_type: 'cpu' or 'cuda'.
    """

    macs: int
    convolutions: int
    compiled_convolutions: int
    fused_norms: int
    batch_size: int
    images: int
    num_steps: int
    device_type: str

    @property
    def seconds(self) -> float:
        """Rough time of the run's attacks in the plain form: a forward and an input gradient an iteration."""
        return 4.0 * self.macs * self.images * self.num_steps / _RATES.get(self.device_type, _RATES["cpu"])

    @property
    def compilation_pays(self) -> bool:
        """Whether compiling saves at least twice the time that it takes."""
        once, each = _COMPILE_SECONDS
        return _SAVED_SHARE * self.seconds > 2.0 * (once + each * self.compiled_convolutions)

    @property
    def graph_pays(self) -> bool:
        """Whether the host may be the slower side, so that one launch in place of hundreds helps."""
        computing = 4.0 * self.macs * self.batch_size / _RATES["cuda"]
        host = 5.0 * _LAUNCH_SECONDS * self.convolutions + _GROUP_NORM_SECONDS * self.fused_norms
        return self.device_type == "cuda" and computing < host


def build_iteration(config: AttackConfig, attack: PGD, twin: Twin, work: IterationWork) -> Iteration | None:
    """Return the form of the attack's iteration that the recipe asks for; None = the plain one.

    'auto' compiles where it saves more than it costs, and captures where the host would be the bottleneck. An attack
    that updates running statistics is captured and not compiled; one that synchronises statistics over ranks runs
    plain, since no collective belongs in a graph.
    """
    wants_compiler = config.compile == "on" or (config.compile == "auto" and work.compilation_pays)
    wants_graph = config.cuda_graph == "on" or (config.cuda_graph == "auto" and work.graph_pays)
    if config.num_steps == 0 or not (wants_compiler or wants_graph):
        return None
    if twin.bn_mode != "eval" and _is_synchronised(twin):
        if "on" in (config.compile, config.cuda_graph):
            _LOG.warning(
                "attack.compile and attack.cuda_graph have no effect: batch statistics of the attack are synchronised "
                "over ranks"
            )
        return None
    if wants_compiler and twin.bn_mode == "train":
        if config.compile == "on":
            _LOG.warning(
                "attack.compile: on has no effect: attack.bn_mode is train, whose forwards update running statistics"
            )
        wants_compiler = False
    if wants_graph and work.device_type != "cuda":
        if config.cuda_graph == "on":
            _LOG.warning("attack.cuda_graph: on has no effect: the attack runs on %s, not on CUDA", work.device_type)
        wants_graph = False
    if not (wants_compiler or wants_graph):
        return None
    return StaticIteration(attack, twin, batch_size=work.batch_size, use_compiler=wants_compiler, use_graph=wants_graph)


def _is_synchronised(twin: Twin) -> bool:
    return any(isinstance(m, BatchNorm) and m.process_group is not None for m in twin.module.modules())


def convolutions_to_compile(twin: Twin) -> int:
    """Return how many convolutions the compiler sees: all, or in a deep network those of the distinct regions."""
    if not is_regional(twin):
        return count_convolutions(twin.module)
    return count_distinct_convolutions(cut(cast(fx.GraphModule, twin.module)))


def is_regional(twin: Twin) -> bool:
    """Return whether the network is deep enough to be compiled region by region, and could be traced."""
    return isinstance(twin.module, fx.GraphModule) and count_convolutions(twin.module) > REGIONAL_CONVOLUTIONS


class StaticIteration:
    """An iteration that a compiler or a CUDA graph sees with one batch size, one layout and no Python numbers.

    Smaller batches are padded by repeating their first image where samples do not see each other (frozen statistics,
    group norm), and run plain where they do. A form that fails at its first call is replaced by the plain one.

    Args:
        attack, twin: what to run; the twin's tensors must stay at their addresses.
        batch_size: images of a full batch.
        use_compiler, use_graph: which forms; both = a graph of the compiled iteration.
        regional: compile region by region (``regions.py``); None = where ``is_regional``.
        backend: of ``torch.compile``.
        capture: records a function into a replayable graph.

    Attributes:
        plain: the iteration that both forms replace.
        failed: why a form was given up, '' while none was.
    """

    def __init__(
        self,
        attack: PGD,
        twin: Twin,
        *,
        batch_size: int,
        use_compiler: bool,
        use_graph: bool = False,
        regional: bool | None = None,
        backend: str | Callable[..., Any] = "inductor",
        capture: Capture = capture_cuda,
    ) -> None:
        self.plain = attack.iteration(twin)
        self.failed = ""
        self._batch_size = batch_size
        self._independent = twin.bn_mode == "eval"
        self._forms: list[tuple[str, Iteration]] = [("", self.plain)]
        iteration = self.plain
        if use_compiler:
            by_region = is_regional(twin) if regional is None else regional
            iteration = (_compile_regions if by_region else _compile)(attack, twin, backend)
            self._forms.append(("torch.compile", iteration))
        if use_graph:
            moves = twin.module.buffers() if twin.bn_mode == "train" else ()
            self._forms.append(("CUDA graph", GraphedIteration(iteration, moves=moves, capture=capture)))
        self._worked = False
        self._seen: tuple[Bounds, Goal] | None = None
        self._shaped: tuple[Bounds, Goal] | None = None

    def __call__(
        self, adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (next adv, logits at adv) for a batch of any size up to ``batch_size``, as the plain iteration does."""
        count = adv.shape[0]
        fits = 0 < count <= self._batch_size and (self._independent or count == self._batch_size)
        if not fits or len(self._forms) == 1:
            return self.plain(adv, step_size, bounds, goal)
        shaped_bounds, shaped_goal = self._shape(bounds, goal)
        padded = _fill(_channels_last(adv), self._batch_size)
        while len(self._forms) > 1:
            name, form = self._forms[-1]
            try:
                following, logits = form(padded, step_size, shaped_bounds, shaped_goal)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler may fail in any way that its thousand parts can
                if self._worked:
                    raise
                self._give_up(name, error)
                continue
            self._worked = True
            return (following, logits) if count == self._batch_size else (following[:count], logits[:count])
        return self.plain(adv, step_size, bounds, goal)

    def _shape(self, bounds: Bounds, goal: Goal) -> tuple[Bounds, Goal]:
        """Pad and lay out what stays the same over all iterations of an attack, once an attack."""
        if self._seen is None or self._seen[0] is not bounds or self._seen[1] is not goal:
            self._seen = (bounds, goal)
            shaped = Bounds(*(_fill(_channels_last(t), self._batch_size) for t in bounds))
            self._shaped = (shaped, Goal(*(None if t is None else _fill(t, self._batch_size) for t in goal)))  # type: ignore[arg-type]
        assert self._shaped is not None
        return self._shaped

    def _give_up(self, name: str, error: Exception) -> None:
        self._forms.pop()
        why = " ".join(str(error).split("\n\n")[0].split())[:300]
        self.failed = f"{name}: {type(error).__name__}: {why}"
        _LOG.warning("the attack runs without %s, which failed here: %s: %s", name, type(error).__name__, why)


def _compile(attack: PGD, twin: Twin, backend: str | Callable[..., Any]) -> Iteration:
    _share_cache()
    # The compiler fuses step and projection into what surrounds them; a ready kernel would be opaque to it.
    iteration = replace(attack, fused=False).iteration(twin.module, functional=True)
    compiled: Callable[..., Any] = torch.compile(iteration, fullgraph=True, dynamic=False, backend=backend)
    return compiled


def _compile_regions(attack: PGD, twin: Twin, backend: str | Callable[..., Any]) -> Iteration:
    _share_cache()
    return attack.iteration(CompiledRegions(cast(fx.GraphModule, twin.module), backend=backend))


def _share_cache() -> None:
    """Let ranks of a node, and a resumed run, find each other's results. A user's own choice stands."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder().parent / "inductor"))


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _fill(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return x with its first row repeated up to ``count`` rows; what has no rows stays."""
    if x.dim() == 0 or x.shape[0] == count:
        return x
    return torch.cat([x, x[:1].expand(count - x.shape[0], *x.shape[1:])]).contiguous(
        memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format
    )
