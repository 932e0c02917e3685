"""Data parallelism: the DeepSpeed engine around the network, and one for a process alone.

Everything that DeepSpeed would decide silently is said here explicitly. The attack never sees this module: it works on
the twin (``twin.py``), because an ``autograd.grad`` through the engine would fire its gradient reduction.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from distributed_at.batch import Batch
from distributed_at.config import ParallelConfig, TrainConfig
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.processes.world import World, deepspeed_available
from distributed_at.errors import ConfigError
from distributed_at.logits import checked_logits
from distributed_at.models.branches import on_branch
from distributed_at.models.dropout import Draw, drawing, dropping_layers
from distributed_at.models.norm import group_shares, set_bn_mode

FORWARDS_A_STEP = 64  # of one sample; each draws masks of its own


def deepspeed_config(plan: BatchPlan, parallel: ParallelConfig, clip_norm: float | None = None) -> dict[str, Any]:
    """Return DeepSpeed's JSON with every value that matters to the mathematics written out.

    ``gradient_clipping`` has a silent default of 1.0 (0 = none), and unknown top-level keys are accepted silently; so nothing of
    a user's ever reaches this dictionary unchecked.
    """
    return {
        "train_batch_size": plan.micro_batch * plan.accumulation * plan.world_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": parallel.zero_stage,
            "overlap_comm": parallel.overlap_comm and torch.cuda.is_available(),
            "reduce_bucket_size": parallel.reduce_bucket_size,
            "allgather_bucket_size": parallel.reduce_bucket_size,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
        },
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "prescale_gradients": False,
    }


class SingleProcessEngine:
    """What one process needs of an engine where DeepSpeed is absent: the same calls, plain torch underneath."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int, clip_norm: float | None
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self._accumulation = accumulation
        self._clip_norm = clip_norm
        self._micro_step = 0
        self._step_applied = True

    def was_step_applied(self) -> bool:
        return self._step_applied

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._micro_step += 1
        if self._micro_step % self._accumulation:
            return
        weights = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # as ZeRO 1 and 2: a non-finite gradient skips the step
        self._step_applied = all(bool(torch.isfinite(p.grad).all()) for p in weights if p.grad is not None)
        if self._step_applied:
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(weights, self._clip_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class TrainingEngine:
    """The network behind data parallelism: forward by branch and BN mode, one backward a micro-step, one step."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plan: BatchPlan,
        parallel: ParallelConfig,
        train: TrainConfig,
        world: World,
        clip_norm: float | None = None,
    ) -> None:
        """``clip_norm``: largest norm of the whole batch's gradient, None = any."""
        self.world = world
        self.engine = _wrap(module, optimizer, plan, parallel, world, clip_norm)
        self.module: nn.Module = self.engine.module
        self.optimizer = self.engine.optimizer
        self.frozen_bn = False
        self._drops = bool(dropping_layers(self.module))
        self._draw: Draw | None = None
        self._autocast_dtype = torch.bfloat16 if train.precision == "bf16" else None

    def begin_batch(self, batch: Batch, seed: int, *, forward: int = 0) -> None:
        """Name the images of the forwards that follow: dropout's masks belong to them.

        ``forward``: number of the first one, so that no two forwards of a sample in one step share their masks.
        """
        self._draw = Draw(batch.ids, batch.epoch, seed, batch.repeat * FORWARDS_A_STEP + forward)

    def _next_draw(self, x: torch.Tensor, ids: torch.Tensor | None) -> Draw | None:
        """Return what the masks of the next forward are drawn from; None for a network without dropout."""
        if not self._drops or self._draw is None:
            return None
        draw = self._draw if ids is None else replace(self._draw, ids=ids)
        if len(draw.ids) != len(x):
            raise ConfigError(
                f"a forward of {len(x)} images in a batch of {len(draw.ids)}: a network with dropout needs to know whose "
                "they are; the objective says it by forward(x, ids=batch.ids[rows])"
            )
        self._draw = replace(self._draw, forward=self._draw.forward + 1)
        return draw

    def freeze_bn(self) -> None:
        """From now on BN normalises with its running statistics; affine parameters go on training (Xie & Yuille, rows marked '*')."""
        self.frozen_bn = True
        set_bn_mode(self.module, "eval")

    def unfreeze_bn(self) -> None:
        """Undo ``freeze_bn``: the run went back to a step before it."""
        self.frozen_bn = False
        set_bn_mode(self.module, "train")

    def state_dict(self) -> bool:
        """Return what is kept between steps beside tensors: whether statistics are frozen."""
        return self.frozen_bn

    def load_state_dict(self, state: bool) -> None:
        """Freeze statistics, or let them move again, as they did when ``state_dict`` was called."""
        if state:
            self.freeze_bn()
        elif self.frozen_bn:
            self.unfreeze_bn()

    @property
    def step_applied(self) -> bool:
        """Whether the last step moved the weights: ZeRO 1 and 2, and one process, skip a gradient that is not finite."""
        return bool(self.engine.was_step_applied())

    def set_learning_rate(self, lr: float, momentum: float | None = None) -> None:
        """Set the rate of the next step, and its momentum where a schedule moves that."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if momentum is not None:
                group["momentum"] = momentum

    @contextlib.contextmanager
    def _bn(self, mode: Literal["train", "batch"]) -> Iterator[None]:
        if self.frozen_bn or mode == "train":
            yield
            return
        set_bn_mode(self.module, mode)
        try:
            yield
        finally:
            set_bn_mode(self.module, "train")

    def forward(
        self,
        x: torch.Tensor,
        branch: str = "adv",
        bn: Literal["train", "batch"] = "train",
        grad: bool = True,
        shares: tuple[float, ...] | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits (N, K) in float32; the arguments are those of ``objectives.Forward``."""
        with (
            on_branch(self.module, branch),
            self._bn(bn),
            group_shares(self.module, shares),
            drawing(self.module, self._next_draw(x, ids)),
            self._autocast(),
        ):
            if grad:
                logits = self.engine(x)
            else:
                with torch.no_grad():  # past the engine: nothing may wait for a backward that never comes
                    logits = self.module(x)
        return checked_logits(logits, x).float()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=self._autocast_dtype)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters; they would keep the engine and its process groups alive."""
        if hasattr(self.engine, "destroy"):
            self.engine.destroy()


def _wrap(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: BatchPlan,
    parallel: ParallelConfig,
    world: World,
    clip_norm: float | None,
) -> Any:
    if not deepspeed_available():
        if world.world_size > 1:
            raise ConfigError(
                f"{world.world_size} workers need DeepSpeed, which is not installed here: pip install deepspeed"
            )
        return SingleProcessEngine(module, optimizer, plan.accumulation, clip_norm)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it sets its own level when imported

    if world.device.type == "cpu":
        # Its shared-memory all-reduce serves inference alone, and building it would ask every user for a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_config(plan, parallel, clip_norm),
        dist_init_required=False,
    )
    if world.device.type == "cpu" and world.world_size > 1:  # its group's ring meets while a lost rank is noticed
        dist.all_reduce(torch.zeros(1), group=engine.seq_data_parallel_group)
    return engine
