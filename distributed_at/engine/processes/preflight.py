"""Checks all ranks of a job together before an hour is wasted: devices, network, clocks, shared files, versions, recipe.

It measures what it finds and changes nothing but a folder of its own, which it removes. It does not train.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distributed_at.engine.processes.open_files import files_allowed, files_needed
from distributed_at.engine.processes.world import World, from_main, gather_all
from distributed_at.findings import BROKEN, OK, SLOW, Finding

SLOWER = 1.5  # times the median: then a rank is named
LARGEST_SKEW = 1.0  # seconds; certificates, lock heartbeats and logs suffer beyond
LEAST_FREE = 20 * 2**30  # bytes
VISIBLE_WITHIN = 15.0  # seconds until another node's new file must be seen


def examine_ranks(
    world: World, folder: Path, *, recipe: str | None = None, megabytes: int | None = None
) -> list[Finding]:
    """Run every check on all ranks together; all get the same findings.

    Args:
        folder: where the run will live; it must be on a file system that all ranks share.
        recipe: the resolved recipe's text, to be equal on all ranks.
        megabytes: size of the all-reduce and of each rank's test file (256 on GPUs, 16 on CPUs).
    """
    size = (megabytes or (256 if world.device.type == "cuda" else 16)) * 2**20
    hosts = gather_all(socket.gethostname(), world)
    return [
        _devices(world, hosts),
        _speed(world, hosts),
        _bandwidth(world, size),
        _clocks(world, hosts),
        _open_files(world, hosts),
        *_files(world, hosts, folder, size),
        _same(world, hosts, "versions", _versions(), "install the same environment on all nodes"),
        _same(world, hosts, "code", {"sources": _source_hash()}, "use one checkout or one image on all nodes"),
        _same(
            world,
            hosts,
            "recipe",
            {"recipe": hashlib.sha256(recipe.encode()).hexdigest()[:16] if recipe is not None else "none given"},
            "start all ranks with one command",
        ),
    ]


def _where(rank: int, hosts: list[str]) -> str:
    return f"rank {rank} on {hosts[rank]}"


def _devices(world: World, hosts: list[str]) -> Finding:
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        own = (str(getattr(properties, "uuid", world.local_rank)), properties.name, properties.total_memory)
    else:
        own = (f"cpu-{world.rank}", "cpu", 0)
    found = gather_all(own, world)
    owners: dict[tuple[str, str], int] = {}
    for rank, (identity, _, _) in enumerate(found):
        if (hosts[rank], identity) in owners:
            first = owners[hosts[rank], identity]
            return Finding(
                "devices",
                BROKEN,
                f"ranks {first} and {rank} share one GPU on {hosts[rank]}",
                "one task a GPU: --ntasks-per-node equal to --gpus-per-node",
            )
        owners[hosts[rank], identity] = rank
    kinds = sorted({(name, memory) for _, name, memory in found})
    told = ", ".join(name + (f" {memory / 2**30:.0f} GiB" if memory else "") for name, memory in kinds)
    detail = f"{world.world_size} ranks on {len(set(hosts))} hosts, one device each: {told}"
    if len(kinds) > 1:
        return Finding("devices", SLOW, detail, "nodes of one kind: the slowest device sets the pace")
    return Finding("devices", OK, detail)


def _speed(world: World, hosts: list[str]) -> Finding:
    """Time a matrix product of this rank alone, and name ranks that are slow."""
    n = 4096 if world.device.type == "cuda" else 384
    a = torch.ones(n, n, device=world.device)
    best = float("inf")
    for _ in range(5):
        _synchronise(world)
        begin = time.perf_counter()
        for _ in range(3):
            a @ a
        _synchronise(world)
        best = min(best, (time.perf_counter() - begin) / 3)
    seconds = gather_all(best, world)
    rates = f"{2 * n**3 / max(seconds) / 1e9:.0f} to {2 * n**3 / min(seconds) / 1e9:.0f} GFLOP/s in fp32"
    slow = [r for r, s in enumerate(seconds) if s > SLOWER * statistics.median_low(seconds)]
    if slow:
        told = ", ".join(f"{_where(r, hosts)} ({seconds[r] / statistics.median_low(seconds):.1f} x)" for r in slow)
        return Finding("compute", SLOW, f"{rates}; slow: {told}", "exclude the node: sbatch --exclude")
    return Finding("compute", OK, rates)


def _bandwidth(world: World, size: int) -> Finding:
    if world.world_size == 1:
        return Finding("all-reduce", OK, "one rank: nothing to reduce")
    data = torch.ones(size // 4, device=world.device)
    dist.all_reduce(data)  # connections are made now
    times = []
    for _ in range(3):
        data.fill_(1.0)
        dist.barrier()
        _synchronise(world)
        begin = time.perf_counter()
        dist.all_reduce(data)
        _synchronise(world)
        times.append(time.perf_counter() - begin)
    wrong = gather_all(bool((data != world.world_size).any()), world)
    if any(wrong):
        return Finding("all-reduce", BROKEN, "sums are wrong", "test the network and the GPUs' memory")
    seconds = max(gather_all(statistics.median(times), world))
    bus = 2 * (world.world_size - 1) / world.world_size * size / seconds
    return Finding("all-reduce", OK, f"{size / 2**20:.0f} MiB in {seconds * 1e3:.1f} ms, bus {bus / 1e9:.2f} GB/s")


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def clock_offsets(world: World, rounds: int = 7) -> list[float]:
    """Return every rank's clock minus rank 0's in seconds, right to about the time of a barrier."""
    readings = []
    for _ in range(rounds):
        if world.world_size > 1:
            dist.barrier(group=world.control)
        readings.append(gather_all(time.time(), world))
    return [statistics.median(row[r] - row[0] for row in readings) for r in range(world.world_size)]


def _clocks(world: World, hosts: list[str]) -> Finding:
    offsets = clock_offsets(world)
    skew = max(offsets) - min(offsets)
    if skew > LARGEST_SKEW:
        worst = max(range(len(offsets)), key=lambda r: abs(offsets[r] - statistics.median_low(offsets)))
        return Finding("clocks", SLOW, f"apart by {skew:.1f} s: {_where(worst, hosts)}", "start chrony or ntpd there")
    return Finding("clocks", OK, f"within {skew * 1e3:.0f} ms")


def _open_files(world: World, hosts: list[str]) -> Finding:
    size, device = world.world_size, world.device.type
    needed = [files_needed(size, device, rank=r) for r in range(size)]
    allowed = gather_all(files_allowed(), world)
    low = [r for r, limit in enumerate(allowed) if limit < 2 * needed[r]]
    others = f", {needed[-1]} on the others" if size > 1 else ""
    told = f"up to {needed[0]} on rank 0{others}; {min(allowed)} are allowed"
    if low:
        fix = "raise ulimit -Hn, e.g. LimitNOFILE of the scheduler's daemon"
        return Finding("open files", SLOW, f"{told}, which leaves little: {_where(low[0], hosts)}", fix)
    return Finding("open files", OK, told)


def _files(world: World, hosts: list[str], folder: Path, size: int) -> list[Finding]:
    """Write a file a rank, read another rank's, and tell the speed and what is free."""
    token = from_main(f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}", world)
    probe = folder / f".preflight-{token}"
    failure: str | None = None
    if world.is_main:
        try:
            probe.mkdir(parents=True)
        except OSError as error:
            failure = f"{folder}: {error.strerror}"
    failure = from_main(failure, world)
    if failure is not None:
        return [Finding("files", BROKEN, failure, "a folder that the job may write: --run-folder or RUNS")]
    try:
        results = gather_all(_write_and_see(world, probe, size), world)
    finally:
        if world.is_main:
            shutil.rmtree(probe, ignore_errors=True)
    failures = [f"{_where(r, hosts)}: {why}" for r, (why, _) in enumerate(results) if why]
    if failures:
        fix = "put the run folder on a file system that all nodes share, with space"
        return [Finding("files", BROKEN, "; ".join(failures[:4]), fix)]
    speeds = [speed for _, speed in results]
    free = shutil.disk_usage(folder).free
    detail = f"each rank writes {min(speeds) / 1e6:.0f} to {max(speeds) / 1e6:.0f} MB/s, all see each other's files"
    state = SLOW if free < LEAST_FREE else OK
    return [Finding("files", OK, detail), Finding("space", state, f"{free / 2**30:.0f} GiB free in {folder}")]


def _write_and_see(world: World, probe: Path, size: int) -> tuple[str | None, float]:
    speed = 0.0
    why: str | None = None
    try:
        block = os.urandom(2**20)
        begin = time.perf_counter()
        with open(probe / f"rank{world.rank}", "wb") as file:
            for _ in range(size // 2**20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = size / (time.perf_counter() - begin)
    except OSError as error:
        why = f"{error.strerror} ({probe})"
    gather_all(None, world)
    other = probe / f"rank{(world.rank + 1) % world.world_size}"
    deadline = time.monotonic() + VISIBLE_WITHIN
    while why is None and _size(other) != size // 2**20 * 2**20:
        if time.monotonic() > deadline:
            why = f"does not see {other}, which another rank wrote"
        time.sleep(0.05)
    gather_all(None, world)  # nothing is removed while someone looks
    return why, speed


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _versions() -> dict[str, str]:
    from distributed_at.observe.environment import package_versions

    versions = package_versions()
    versions["cuda"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _source_hash() -> str:
    """SHA-256 over this package's Python files, so that two checkouts of one version are told apart."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _same(world: World, hosts: list[str], part: str, own: dict[str, Any], fix: str) -> Finding:
    found = gather_all(own, world)
    names = sorted({name for each in found for name in each})
    for name in names:
        values = [each.get(name, "absent") for each in found]
        usual = statistics.mode(values)
        odd = [r for r, value in enumerate(values) if value != usual]
        if odd:
            told = ", ".join(f"{_where(r, hosts)} has {values[r]}" for r in odd[:4])
            return Finding(part, BROKEN, f"{name} is {usual}, but {told}", fix)
    shown = ", ".join(f"{name} {found[0][name]}" for name in names if name in ("distributed-at", "torch", "deepspeed"))
    return Finding(part, OK, f"the same on all ranks: {shown or next(iter(found[0].values()))}")
