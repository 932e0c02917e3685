"""What a checkpoint costs: bytes a rank, seconds that training stands still, seconds until durable, seconds to read.

    python -m benchmarks.checkpoint_cost [--architectures resnet152 resnet638] [--folder /scratch]

The states are those of a recipe under DeepSpeed ZeRO 1 on gloo: fp32 weights, momentum, averaged weights and BN
statistics, built and saved by the engine's own code, every element a number that depends on its tensor's name and its
place alone. After reading on another world size each rank compares every element with that number. No step is trained:
what a step leaves in the tensors does not change what copying, writing and reading them costs.
Writes results/checkpoint_cost.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import common
from distributed_at.engine.averaging import WeightAverage
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.builder import build_network
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.shards import FlatShard
from distributed_at.engine.checkpoint.state import after_load, training_tensors
from distributed_at.engine.optimizers import build_optimizer
from distributed_at.engine.parallel import TrainingEngine
from distributed_at.engine.processes.launch import free_port
from distributed_at.engine.processes.world import initialise_world, shutdown_world
from distributed_at.models.norm import bn_buffers
from distributed_at.recipes import load_recipe

RECIPE = "imagenet/xie_yuille/base.yaml"
CLASSES = 1000
WRITERS = 2
READERS = (1, 2, 3)
SAVES = 4  # the first one also takes the memory for the copy


def build(architecture: str) -> tuple[TrainingEngine, dict[str, FlatShard]]:
    """Return the engine of the recipe on this rank and its whole state by name."""
    overrides = [
        f"model.arch={architecture}",
        "train.ema={decay: 0.999}",
        "train.batch_size=12",
        "train.bn_group_size=null",
    ]
    config = load_recipe(RECIPE, [*overrides, "train.micro_batch_size=null"]).config
    world = initialise_world()
    plan = BatchPlan.resolve(
        batch_size=config.train.batch_size, world_size=world.world_size, micro_batch_size=None, bn_group_size=None
    )
    network = build_network(config, CLASSES)
    optimizer = build_optimizer(config.optimizer, network, lr=config.optimizer.lr)
    engine = TrainingEngine(network, optimizer, plan=plan, parallel=config.parallel, train=config.train, world=world)
    assert config.train.ema is not None
    average = WeightAverage(engine.module, config.train.ema)
    return engine, training_tensors(engine.engine, ema=average.tensors, buffers=bn_buffers(engine.module))


def expected(name: str, shard: FlatShard) -> torch.Tensor:
    """Return the numbers that belong into a fragment, whichever rank holds it; exact in fp32 and int64."""
    places = torch.arange(shard.start, shard.start + shard.local.numel(), dtype=torch.int64)
    values = (places * 2654435761 + zlib.crc32(name.encode())) % 16777213
    return values.to(shard.local.dtype)


def copy_seconds(part: int) -> float:
    """Return the seconds of one plain copy of so many bytes, all ranks at once, memory already taken."""
    source, target = torch.ones(part, dtype=torch.uint8), torch.zeros(part, dtype=torch.uint8)
    dist.barrier()
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


def write(architecture: str, root: Path) -> dict[str, Any]:
    """Fill the state, save it ``SAVES`` times in the background and once in the foreground."""
    engine, state = build(architecture)
    with torch.no_grad():
        for name, shard in state.items():
            shard.local.copy_(expected(name, shard))
    after_load(engine.engine)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    part = sum(shard.share(name, rank, world_size).local.nbytes for name, shard in state.items())
    plain = copy_seconds(part)
    manager = CheckpointManager(root)
    results = []
    for step in range(1, SAVES + 1):
        dist.barrier()
        manager.save(step, state, {"step": step}, asynchronous=True)
        results.append(manager.wait())
    dist.barrier()
    results.append(manager.save(SAVES + 1, state, {"step": SAVES + 1}))
    manager.close()
    assert all(result is not None and result.ok for result in results), results
    path = root / f"step_{SAVES + 1:08d}"
    own = sum(file.stat().st_size for file in path.glob(f"__{rank}_*"))
    blocked, durable = ([getattr(result, key) for result in results] for key in ("seconds_blocked", "seconds_durable"))
    return {
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "tensors": len(state),
        "bytes_copied": part,
        "bytes_written": own,
        "plain_copy": plain,
        "blocked_first": blocked[0],
        "blocked": sorted(blocked[1:-1])[len(blocked[1:-1]) // 2],
        "durable": sorted(durable[1:-1])[len(durable[1:-1]) // 2],
        "blocked_in_foreground": blocked[-1],
    }


def read(architecture: str, root: Path) -> dict[str, Any]:
    """Find, verify and load the newest checkpoint on this world size and compare every element."""
    engine, state = build(architecture)
    manager = CheckpointManager(root)
    dist.barrier()
    began = time.perf_counter()
    path = manager.latest_good()
    verified = time.perf_counter()
    assert path is not None
    manager.load(path, state)
    after_load(engine.engine)
    loaded = time.perf_counter()
    manager.close()
    same = all(torch.equal(shard.local, expected(name, shard)) for name, shard in state.items())
    named = dict(engine.module.named_parameters())
    for name in state:  # and the network computes with them, on every rank the whole of it
        if name.startswith("model."):
            parameter = named[name.removeprefix("model.")]
            same &= torch.equal(parameter.detach().reshape(-1), expected(name, FlatShard.whole(parameter)))
    return {"verify": verified - began, "load": loaded - verified, "equal": same}


def _entry(rank: int, world_size: int, port: int, work: Any, architecture: str, root: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    result = work(architecture, Path(root))
    torch.save(result, f"{root}/../result-{rank}")
    shutdown_world()


def on_ranks(world_size: int, work: Any, architecture: str, root: Path) -> list[dict[str, Any]]:
    """Run ``work(architecture, root)`` on so many gloo ranks; return their results."""
    mp.spawn(_entry, (world_size, free_port(), work, architecture, str(root)), nprocs=world_size)
    return [torch.load(root.parent / f"result-{rank}") for rank in range(world_size)]


def measure(architecture: str, folder: Path) -> dict[str, Any]:
    """Write on ``WRITERS`` ranks, read on each of ``READERS``; seconds are those of the slowest rank."""
    root = folder / "checkpoints"
    ranks = on_ranks(WRITERS, write, architecture, root)
    found: dict[str, Any] = {key: ranks[0][key] for key in ("parameters", "tensors")}
    found["bytes_a_rank"] = [rank["bytes_written"] for rank in ranks]
    found["bytes_copied_a_rank"] = [rank["bytes_copied"] for rank in ranks]
    seconds = ("plain_copy", "blocked_first", "blocked", "durable", "blocked_in_foreground")
    found["seconds"] = {key: max(rank[key] for rank in ranks) for key in seconds}
    found["reading"] = {}
    for world_size in READERS:
        ranks = on_ranks(world_size, read, architecture, root)
        slowest = {key: max(rank[key] for rank in ranks) for key in ("verify", "load")}
        found["reading"][world_size] = {**slowest, "equal": all(rank["equal"] for rank in ranks)}
    return found


def main() -> None:
    """Measure, print and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["resnet152", "resnet638"])
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    arguments = parser.parse_args()
    before = common.environment()
    measured = {}
    for architecture in arguments.architectures:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=arguments.folder))
        (folder / "checkpoints").mkdir()
        try:
            found = measured[architecture] = measure(architecture, folder)
        finally:
            shutil.rmtree(folder)
        print(f"{architecture}: {found['parameters'] / 1e6:.1f} M parameters, {found['tensors']} tensors")
        print(f"  bytes a rank {found['bytes_a_rank']}, copied {found['bytes_copied_a_rank']}")
        for key, seconds in found["seconds"].items():
            print(f"  {key:22s} {seconds:7.2f} s")
        for world_size, row in found["reading"].items():
            print(
                f"  on {world_size} ranks: verify {row['verify']:.2f} s, load {row['load']:.2f} s, equal: {row['equal']}"
            )
        if not all(row["equal"] for row in found["reading"].values()):
            raise SystemExit("what was read is not what was written")
    content = {"recipe": RECIPE, "zero_stage": 1, "writers": WRITERS, "states": measured}
    print(common.write_result("checkpoint_cost", content, before=before))


if __name__ == "__main__":
    main()
