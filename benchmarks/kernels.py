"""Times the fused attack operations against eager torch and against a copy on the same machine, after checking bits.

    python -m benchmarks.kernels [--device cpu|cuda] [--batch 32] [--size 224] [--rounds 61]

Writes results/kernels_DEVICE.json. GB/s counts the bytes that the operation must move, not those that a chain moves; the
copy moves as many as the fused step, into memory that is there already. Every other operation allocates its result.
These are ratios of one operation, not of training: at 224 pixels the step is 1 to 4 % of an attack iteration.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks import common
from distributed_at import ops
from distributed_at.attacks.threat import Threat
from distributed_at.ops import reference

EPS, STEP = 8 / 255, 2 / 255


def eager_chain(x_adv: torch.Tensor, clean: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The usual seven-operation step: sign, multiply, add, subtract, clamp, add, clamp."""
    moved = x_adv + STEP * grad.sign()
    return torch.clamp(clean + torch.clamp(moved - clean, min=-EPS, max=EPS), 0.0, 1.0)


def precomputed_chain(
    x_adv: torch.Tensor, grad: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor
) -> torch.Tensor:
    """A good eager step: bounds computed once an attack, results in place."""
    return grad.sign().mul_(STEP).add_(x_adv).clamp_(lower, upper)


def eager_l2(x_adv: torch.Tensor, clean: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The usual l2 step with float32 norms."""
    norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta = x_adv + STEP * grad / (norm + 1e-10) - clean
    return torch.clamp(clean + delta.renorm(p=2, dim=0, maxnorm=EPS), 0.0, 1.0)


def measure(device: str, batch: int, size: int, rounds: int) -> dict[str, object]:
    """Return the measurements of all operations on (batch, 3, size, size) channels-last images."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, size, size)

    def image(x: torch.Tensor) -> torch.Tensor:
        return x.to(device).contiguous(memory_format=torch.channels_last)

    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    clean_bytes, clean = image(pixels), image(pixels / 255)
    x_adv = image((pixels / 255 + 0.02 * torch.randn(shape, generator=generator)).clamp(0, 1))
    grad = image(torch.randn(shape, generator=generator))
    grad16 = grad.bfloat16()
    ids = torch.arange(batch, device=device)
    eps, step = (torch.tensor(v, device=device) for v in (EPS, STEP))
    named = {"eps": eps, "step": step, "direction": -1}
    lower, upper = torch.clamp(clean - eps, min=0), torch.clamp(clean + eps, max=1)
    threat = Threat(norm="linf", eps=EPS)
    bounds = threat.bounds(clean)

    want = reference.linf_step(x_adv, clean, grad, eps, step, -1, (0.0, 1.0))
    if not torch.equal(ops.linf_step(x_adv, clean, grad, **named), want):
        raise SystemExit("the fused step differs from its reference: nothing is measured")
    start = {"eps": eps, "seed": 1, "epoch": 0}
    if not torch.equal(
        ops.random_start(clean, ids, **start),
        reference.random_start(
            clean, ids, ids, eps, draw=0, clean_probability=0.0, clip=True, box=(0.0, 1.0), seed=1, epoch=0
        ),
    ):
        raise SystemExit("the fused start differs from its reference: nothing is measured")

    count, settings = x_adv.numel(), {"rounds": rounds, "cuda": device == "cuda"}
    # 8 bytes read and 8 written for each element of the images: a fused step's traffic
    twice = torch.cat([x_adv, clean])
    target = torch.empty_like(twice)

    def compare(contestants: dict[str, Callable[[], object]]) -> common.Comparison:
        return common.compare({"copy": lambda: target.copy_(twice), **contestants}, baseline="copy", **settings)

    compiled_chain = torch.compile(eager_chain)
    runs: dict[str, tuple[common.Comparison, dict[str, int]]] = {}
    runs["linf_step"] = (
        compare(
            {
                "copy, allocating": twice.clone,
                "eager chain": lambda: eager_chain(x_adv, clean, grad),
                "eager, precomputed bounds": lambda: precomputed_chain(x_adv, grad, lower, upper),
                "compiled chain": lambda: compiled_chain(x_adv, clean, grad),
                "exact bounds, eager": lambda: threat.stepper()(x_adv, grad, step, bounds),
                "fused": lambda: ops.linf_step(x_adv, clean, grad, **named),
                "fused, uint8 clean, bf16 gradient": lambda: ops.linf_step(x_adv, clean_bytes, grad16, **named),
            }
        ),
        {"copy, allocating": 16, "eager chain": 16, "eager, precomputed bounds": 20, "compiled chain": 16,
         "exact bounds, eager": 20, "fused": 16, "fused, uint8 clean, bf16 gradient": 11},
    )  # fmt: skip
    runs["l2_step"] = (
        compare(
            {
                "eager": lambda: eager_l2(x_adv, clean, grad),
                "fused": lambda: ops.l2_step(x_adv, clean, grad, **named),
            }
        ),
        {"eager": 32, "fused": 32},
    )
    runs["random_start"] = (
        compare(
            {
                "torch.rand": lambda: (clean + eps * (2 * torch.rand_like(clean) - 1)).clamp_(0, 1),
                "fused, by counters": lambda: ops.random_start(clean, ids, **start),
            }
        ),
        {"torch.rand": 8, "fused, by counters": 8},
    )
    report = {}
    for name, (comparison, traffic) in runs.items():
        bytes_each = {"copy": 16, **traffic}
        rate = {
            who: round(bytes_each[who] * count / timing.median / 1e9, 2) for who, timing in comparison.timings.items()
        }
        report[name] = {"gigabytes_per_second_at_median": rate, "bytes_per_element": bytes_each, "run": comparison}
    return {"shape": list(shape), "layout": "channels_last", "served_by": ops.describe(), "operations": report}


def main() -> None:
    """Measure, print a table and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=61)
    arguments = parser.parse_args()
    before = common.environment()
    content = measure(arguments.device, arguments.batch, arguments.size, arguments.rounds)
    for name, operation in content["operations"].items():
        run = operation["run"]
        print(f"{name}: control {run.control}, {'trusted' if run.trusted else 'NOT TRUSTED: the machine was too busy'}")
        for who, timing in run.timings.items():
            rates = operation["gigabytes_per_second_at_median"]
            chain = next(timing for name, timing in run.timings.items() if not name.startswith("copy"))
            print(
                f"  {who:36s} {timing.median * 1e3:8.2f} ms (best {timing.fastest * 1e3:.2f})  {rates[who]:7.2f} GB/s, "
                f"{rates[who] / rates['copy']:4.0%} of the copy   x{chain.median / timing.median:.2f} the chain's speed"
            )
    print(common.write_result(f"kernels_{arguments.device}", content, before=before))


if __name__ == "__main__":
    main()
