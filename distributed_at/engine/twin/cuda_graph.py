"""Replays one attack iteration as a CUDA graph over static buffers, so that the host launches once instead of hundreds
of times. It knows nothing of what the iteration computes, and never waits for the device after the capture."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.iteration import Iteration
from distributed_at.attacks.losses import Goal

Outputs = tuple[torch.Tensor, torch.Tensor]
# (function) -> (replay, the static outputs that replay rewrites)
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

_WARM_UP = 3  # cuDNN's trials and the lazy set-up of libraries must not happen inside a capture


def capture_cuda(function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Record ``function`` into a graph with a memory pool of its own, after warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


class GraphedIteration:
    """``iteration`` with fixed shapes, captured at its first call and replayed at all later ones.

    The graph reads the network's weights where they were at the capture: they must change in place only. Its memory
    pool holds the iteration's activations until the object goes; ``pool_bytes`` says how much that is.

    Args:
        iteration: without host synchronisation, collectives or random draws.
        moves: tensors that the iteration changes in place, as running statistics; a capture, which runs it several
            times, leaves them as they were.
        capture: records a function; the tests' one runs it again instead.
    """

    def __init__(
        self, iteration: Iteration, *, moves: Iterable[torch.Tensor] = (), capture: Capture = capture_cuda
    ) -> None:
        self._iteration = iteration
        self._moves = tuple(moves)
        self._capture = capture
        self._replay: Callable[[], None] | None = None
        self._last: tuple[Bounds, Goal] | None = None
        self.pool_bytes = 0

    def __call__(self, adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal) -> Outputs:
        """Return copies of (next adv, logits at adv); the graph's own buffers never leave."""
        if self._replay is None:
            self._record(adv, step_size, bounds, goal)
        assert self._replay is not None
        self._adv.copy_(adv)
        self._step_size.copy_(step_size)
        if self._last is None or self._last[0] is not bounds or self._last[1] is not goal:
            for static, value in zip((*self._bounds, *self._goal), (*bounds, *goal), strict=True):
                if static is not None and value is not None:
                    static.copy_(value)
            self._last = (bounds, goal)  # held, so that no later tuple can take their identity
        self._replay()
        following, logits = self._outputs
        return following.clone(), logits.clone()

    def _record(self, adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal) -> None:
        self._adv, self._step_size = adv.clone(), step_size.clone()
        self._bounds = Bounds(*(t.clone() for t in bounds))
        self._goal = Goal(*(None if t is None else t.clone() for t in goal))  # type: ignore[arg-type]
        before = torch.cuda.memory_reserved() if adv.is_cuda else 0
        held = [tensor.clone() for tensor in self._moves]
        try:
            self._replay, self._outputs = self._capture(
                lambda: self._iteration(self._adv, self._step_size, self._bounds, self._goal)
            )
        finally:  # also where the capture fails, since the plain form then goes on from here
            for tensor, value in zip(self._moves, held, strict=True):
                tensor.copy_(value)
        self.pool_bytes = torch.cuda.memory_reserved() - before if adv.is_cuda else 0
