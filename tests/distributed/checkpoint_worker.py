"""Worker of the checkpoint tests: a tiny net with two parameter groups behind DeepSpeed, and a digest of its state."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

GLOBAL_BATCH = 12
OPTIMIZERS: dict[str, Callable[[list], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "plain": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.9, eps=1.0),
}


def build(stage: int, optimizer: str) -> Any:
    """Return a DeepSpeed engine around a BN net with decay and no-decay groups and one frozen parameter."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7), nn.Linear(7, 3)
    )
    net[5].bias.requires_grad_(False)
    trainable = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 1e-3},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=OPTIMIZERS[optimizer](groups), config=config, dist_init_required=False
    )
    return engine


def train(engine: Any, steps: range) -> None:
    share = GLOBAL_BATCH // dist.get_world_size()
    first = dist.get_rank() * share
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(GLOBAL_BATCH, 3, 6, 6, generator=generator)[first : first + share]
        y = torch.randint(0, 3, (GLOBAL_BATCH,), generator=generator)[first : first + share]
        engine.backward(nn.functional.cross_entropy(engine(x), y))
        engine.step()
    for buffer in engine.module.buffers():
        dist.broadcast(buffer, 0)


def tensors(engine: Any, ema: float) -> dict[str, Any]:
    from distributed_at.engine.checkpoint.state import training_tensors

    average = {n: torch.full_like(p, ema) for n, p in engine.module.named_parameters()}
    return training_tensors(engine, average, dict(engine.module.named_buffers()))


def digests(state: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every whole tensor, put together from all ranks' fragments."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {k: (s.start, s.local.clone(), s.shape) for k, s in state.items()})
    found = {}
    for name, shard in state.items():
        whole = torch.full((shard.numel,), 7, dtype=shard.local.dtype)
        for part in parts:
            start, local, shape = part[name]
            assert shape == shard.shape
            whole[start : start + local.numel()] = local
        found[name] = hashlib.sha256(whole.numpy().tobytes()).hexdigest()
    return found


def module_matches(engine: Any, state: dict[str, Any]) -> bool:
    """Whether the weights that the network computes with are those of the state, on this rank's part."""
    named = dict(engine.module.named_parameters())
    for name, shard in state.items():
        if name.startswith("model."):
            live = named[name.removeprefix("model.")].detach().reshape(-1)
            if not torch.equal(live[shard.start : shard.start + shard.local.numel()], shard.local):
                return False
    return True


def _entry(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = function(*args)
    torch.save(result, f"{folder}/result-{rank}")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # the engines made by hand above hold their process groups, whose threads must not see the end


def run(folder: Path, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``function(*args)`` on ``world`` ranks and return their results."""
    folder.mkdir(parents=True)
    mp.spawn(_entry, (world, str(folder), function, args), nprocs=world)
    return [torch.load(folder / f"result-{rank}", weights_only=False) for rank in range(world)]
