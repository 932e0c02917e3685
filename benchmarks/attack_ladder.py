"""Times one attack iteration from a ``.backward()`` loop up to a captured graph: what each technique gives.

    python -m benchmarks.attack_ladder [--arch resnet18 ...] [--size 32] [--batch 64] [--dtype fp32 bf16] [--device cpu]

Checks first that every rung reaches the same loss in ``--check-steps`` steps, with ball and box exact. Prints seconds,
images/s of iterations, what PGD-30 training would make of it, and memory (CUDA: peak of an iteration; CPU: what autograd
keeps). Writes results/ladder_ARCH_SIZE_DTYPE_DEVICE.json.
"""

from __future__ import annotations

import argparse
import functools

import torch

from benchmarks import common, rungs
from distributed_at.attacks.losses import Goal


def saved_bytes(setting: rungs.Setting, rung: str) -> int | None:
    """Return the bytes an image's forward keeps for its input gradient; None where a rung's inside cannot be seen."""
    if rung in ("compiled", "graphed"):
        return None
    kept: dict[int, torch.UntypedStorage] = {}
    iteration = setting.iteration(rung)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() and tensor.shape[0] == len(setting.x):  # what belongs to images; weights have other first sizes
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        setting.perturb(iteration, 1)
    return sum(storage.nbytes() for storage in kept.values()) // len(setting.x)


def peak_bytes(run) -> int | None:
    """Return the peak of CUDA memory of one call above what was there before; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    setting: rungs.Setting, names: list[str], *, rounds: int, check_steps: int, target_seconds: float = 0.02
) -> dict[str, object]:
    """Check and time the rungs; one that fails or is not equal is left out with its reason."""
    skipped: dict[str, str] = {}
    ready = {}
    expected: float | None = None
    losses = {}
    pgd = rungs.attack(1, dtype=setting.dtype)
    bounds = pgd.threat.bounds(setting.x)
    step = torch.full((), rungs.STEP, device=setting.x.device)
    goal = Goal(labels=setting.y)
    memory = {}
    for name in names:
        iteration = setting.iteration(name)
        adv = setting.perturb(iteration, check_steps)
        failed = getattr(iteration, "failed", "")
        losses[name] = setting.loss(adv)
        expected = losses[name] if expected is None else expected
        wrong = failed or rungs.check(setting, adv, expected)
        if wrong:
            skipped[name] = wrong
            continue

        def once(iteration=iteration) -> object:
            with torch.no_grad():
                return iteration(setting.x, step, bounds, goal)

        ready[name] = once
        memory[name] = {"saved_bytes_per_image": saved_bytes(setting, name), "peak_bytes": peak_bytes(once)}
    baseline = "grad" if "grad" in ready else next(iter(ready))
    cuda = setting.device == "cuda"
    comparison = common.compare(
        ready, baseline=baseline, rounds=rounds, warm_up=1, cuda=cuda, target_seconds=target_seconds
    )
    count = len(setting.x)
    return {
        "losses_reached": losses,
        "skipped": skipped,
        "baseline": baseline,
        "comparison": comparison,
        "images_per_second": {n: round(count / t.median, 2) for n, t in comparison.timings.items()},
        # attack alone: the training step adds 3 forward-equivalents to its 60
        "pgd30_images_per_second": {
            n: round(count / t.median / 30 * 60 / 63, 3) for n, t in comparison.timings.items()
        },
        "memory": memory,
    }


def show(title: str, result: dict) -> None:
    """Print one ladder."""
    comparison = result["comparison"]
    note = "" if comparison.trusted else "  NOT TRUSTED: the machine was too busy"
    print(f"\n{title}: A/A control {comparison.control}{note}")
    for name, timing in comparison.timings.items():
        ratio = comparison.ratios.get(name, [1.0, 1.0, 1.0])
        memory = result["memory"][name]
        size = memory["peak_bytes"] or memory["saved_bytes_per_image"]
        unit = "MB peak" if memory["peak_bytes"] else "MB/img kept"
        print(
            f"  {name:9s} {timing.median * 1e3:9.2f} ms  {result['images_per_second'][name]:9.1f} img/s  "
            f"x{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]  "
            + (f"{size / 1e6:8.2f} {unit}" if size else "")
            + f"   {rungs.DESCRIPTIONS[name]}"
        )
    for name, reason in result["skipped"].items():
        print(f"  {name:9s} skipped: {reason}")


def main() -> None:
    """Check, measure, print and write the JSON records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet18"])
    parser.add_argument("--norm", default="bn", choices=("bn", "mbn", "gn"))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rungs", nargs="+", choices=rungs.RUNGS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check-steps", type=int, default=3)
    arguments = parser.parse_args()
    before = common.environment()
    names = arguments.rungs or [r for r in rungs.RUNGS if r != "graphed" or arguments.device == "cuda"]
    build = functools.partial(
        rungs.network, norm=arguments.norm, size=arguments.size, device=arguments.device, width=arguments.width
    )
    for arch in arguments.arch:
        model = build(arch)
        x, y = rungs.batch(model, arguments.batch, arguments.size, arguments.device)
        for dtype in arguments.dtype:
            setting = rungs.Setting(model, x, y, dtype, arguments.device)
            result = measure(setting, names, rounds=arguments.rounds, check_steps=arguments.check_steps)
            show(f"{arch} {arguments.norm} {arguments.size}² batch {arguments.batch} {dtype}", result)
            name = f"ladder_{arch}_{arguments.norm}_{arguments.size}_{dtype}_{arguments.device}"
            content = {"setting": vars(arguments) | {"arch": arch, "dtype": dtype}, **result}
            print(common.write_result(name, content, before=before))


if __name__ == "__main__":
    main()
