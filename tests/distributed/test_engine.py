"""DeepSpeed training against plain torch: the same weights, for every ZeRO stage, world size and accumulation."""

from __future__ import annotations

import pytest
import torch

from distributed_at.config import ParallelConfig, TrainConfig
from distributed_at.engine import parallel
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.buffers import BufferMerger
from distributed_at.engine.processes.world import import_deepspeed, initialise_world, shutdown_world
from distributed_at.engine.twin.twin import Twin
from distributed_at.models.norm import BatchNorm, bn_buffers
from tests.distributed.launch import run_ranks

STEPS, BATCH, GROUP = 4, 16, 4


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = BatchNorm(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def optimizer_of(module):
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-2}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def train(stage: int, micro: int | None, use_deepspeed: bool) -> dict[str, torch.Tensor]:
    """Train for a few steps on counters' images with a large update (no silent clipping may pass)."""
    import_deepspeed()
    world = initialise_world()
    if not use_deepspeed:
        parallel.deepspeed_available = lambda: False
    torch.manual_seed(0)
    module = Net().train()
    module.norm.group_size = GROUP
    plan = BatchPlan.resolve(batch_size=BATCH, world_size=world.world_size, micro_batch_size=micro, bn_group_size=GROUP)
    engine = parallel.TrainingEngine(
        module,
        optimizer_of(module),
        plan=plan,
        parallel=ParallelConfig(zero_stage=stage),
        train=TrainConfig(epochs=1, batch_size=BATCH),
        world=world,
    )
    merger = BufferMerger(engine.module, world)
    twin = Twin(engine.module, bn_mode="eval")
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x = torch.randn(BATCH, 3, 6, 6, generator=generator)
        y = torch.randint(0, 5, (BATCH,), generator=generator)
        engine.set_learning_rate(0.1 / (step + 1))
        merger.begin_step()
        for low, high in plan.micro_bounds(world.rank):
            merger.begin_group()
            part = x[low:high].requires_grad_()
            # an attack on the twin in the middle of accumulation must not change anything
            (grad,) = torch.autograd.grad(
                torch.nn.functional.cross_entropy(twin(part), y[low:high], reduction="sum"), part
            )
            assert torch.isfinite(grad).all()
            loss = 30.0 * torch.nn.functional.cross_entropy(engine.forward(part.detach()), y[low:high])
            engine.backward(loss)
            engine.step()
            merger.end_group((high - low) / BATCH)
        merger.finish_step()
    result = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    result.update({n: b.clone() for n, b in bn_buffers(engine.module).items()})
    shutdown_world()
    return result


@pytest.fixture(scope="module")
def reference():
    return run_ranks(train, 1, 1, None, False)[0]


@pytest.mark.parametrize(
    ("stage", "world_size", "micro"), [(0, 2, None), (1, 1, 8), (1, 2, None), (1, 4, None), (2, 2, None), (2, 2, 4)]
)
def test_deepspeed_trains_the_same_weights_as_plain_torch(reference, stage, world_size, micro):
    ranks = run_ranks(train, world_size, stage, micro, True)
    for found in ranks:
        for name, value in reference.items():
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(found[name], ranks[0][name]), f"{name} differs between ranks"


def test_every_mathematical_choice_is_written_out_for_deepspeed():
    plan = BatchPlan.resolve(batch_size=BATCH, world_size=2, micro_batch_size=4, bn_group_size=None)
    config = parallel.deepspeed_config(plan, ParallelConfig())
    assert config["gradient_clipping"] == 0.0  # its silent default is 1.0
    assert config["train_batch_size"] == BATCH
    assert config["gradient_accumulation_steps"] == 2
    assert config["bf16"] == config["fp16"] == {"enabled": False}
