"""Times our PGD against other libraries' on the same network and images, after checking that the results are equal.

    python -m benchmarks.peers [--dtype fp32 bf16] [--arch resnet18] [--size 32] [--batch 64] [--steps 3] [--peers FOLDER]

Peers: torchattacks, foolbox, adversarial-robustness-toolbox, pyautoattack's APGD, a plain autograd.grad loop and a
``.backward()`` loop. Those that are not installed (or not in FOLDER) are skipped with a word. 16 bits: peers get the
network under autocast, as their users do it, and the plain loop in fp32 stands beside them. APGD is another algorithm:
its time stands beside, its result is not compared. "convolutions alone" is the floor: the convolutions of one attack and
their input gradients with nothing between them. Writes results/peers_DTYPE_DEVICE.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common, rungs
from benchmarks.rungs import EPS, STEP

Attack = Callable[[], torch.Tensor]
PACKAGES = ("torchattacks", "foolbox", "eagerpy", "adversarial-robustness-toolbox", "pyautoattack")
PLAIN, PLAIN_FP32, FLOOR = "autograd.grad loop", "autograd.grad loop, fp32", "convolutions alone"
OTHER_ALGORITHM = ("pyautoattack APGD",)
NOT_A_PEER = (*OTHER_ALGORITHM, PLAIN_FP32, FLOOR)


class _Logits(nn.Module):
    """The network as a module that returns float32 logits, 16 bits by autocast: what each library is given."""

    def __init__(self, model: nn.Module, device: str, dtype: str) -> None:
        super().__init__()
        self.model = model
        self._call = rungs.autocast(model, device, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._call(x).float()


def grad_loop(model: Callable, x: torch.Tensor, y: torch.Tensor, steps: int) -> torch.Tensor:
    """The plain loop that a careful user writes."""
    adv = x
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = adv.detach() + STEP * gradient.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, -EPS, EPS), 0, 1)
    return adv.detach()


def backward_loop(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> torch.Tensor:
    """The plain loop that most training codes have."""
    adv = x
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        F.cross_entropy(model(adv), y).backward()
        adv = adv.detach() + STEP * adv.grad.sign()
        adv = torch.clamp(x + torch.clamp(adv - x, -EPS, EPS), 0, 1)
    model.zero_grad(set_to_none=True)
    return adv.detach()


def _torchattacks(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> Attack:
    import torchattacks

    pgd = torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=False)
    return lambda: pgd(x, y)


def _foolbox(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> Attack:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    pgd = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps, random_start=False)
    return lambda: pgd.run(wrapped, x, y, epsilon=EPS)


def _art(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classes = model(x[:1]).shape[1]
    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=classes, clip_values=(0, 1),
        device_type="gpu" if x.is_cuda else "cpu",
    )  # fmt: skip
    pgd = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=STEP, max_iter=steps, num_random_init=0, batch_size=len(x), verbose=False
    )
    images, labels = x.cpu().contiguous().numpy(), y.cpu().numpy()
    return lambda: torch.from_numpy(pgd.generate(x=images, y=labels)).to(x.device)


def _apgd(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> Attack:
    from pyautoattack.autopgd_base import APGDAttack

    apgd = APGDAttack(model, n_iter=steps, norm="Linf", eps=EPS, loss="ce", n_restarts=1, seed=0, device=str(x.device))

    def run() -> torch.Tensor:
        return apgd.perturb(x, y)

    return run


PEERS = {
    "torchattacks PGD": _torchattacks,
    "foolbox LinfPGD": _foolbox,
    "ART PGD": _art,
    "pyautoattack APGD": _apgd,
}


def contestants(setting: rungs.Setting, steps: int, *, compiled: bool) -> tuple[dict[str, Attack], dict[str, str]]:
    """Return name -> attack, and name -> why it cannot run."""
    # each peer gets a copy: .backward() leaves gradients behind
    import copy

    def live() -> _Logits:
        return _Logits(copy.deepcopy(setting.model), setting.device, setting.dtype).eval()

    x, y = setting.x.contiguous(), setting.y  # contiguous, as those libraries' users have them
    one, two = live(), live()
    found: dict[str, Attack] = {
        PLAIN: lambda: grad_loop(one, x, y, steps),
        ".backward() loop": lambda: backward_loop(two, x, y, steps),
    }
    if setting.dtype != "fp32":
        full = copy.deepcopy(setting.model).eval()
        found[PLAIN_FP32] = lambda: grad_loop(full, x, y, steps)
    skipped: dict[str, str] = {}
    for name, build in PEERS.items():
        try:
            found[name] = build(live(), x, y, steps)
        except ImportError as error:
            skipped[name] = f"not installed ({error})"
    ours = ["folded", *(["compiled"] if compiled else []), *(["graphed"] if setting.x.is_cuda else [])]
    for rung in ours:
        iteration = setting.iteration(rung)
        found[f"ours, {rung}"] = lambda iteration=iteration: setting.perturb(iteration, steps)
    return found, skipped


def measure(setting: rungs.Setting, *, steps: int, rounds: int, compiled: bool) -> dict[str, object]:
    """Check all results against the plain loop's, then time; a contestant that is not equal stops the benchmark."""
    found, skipped = contestants(setting, steps, compiled=compiled)
    expected = setting.loss(found[PLAIN]())
    losses = {}
    for name, run in found.items():
        adv = run()
        losses[name] = setting.loss(adv)
        # the peers' projection is float arithmetic around x: a last bit outside is theirs
        wrong = rungs.check(setting, adv, expected, slack=0.0 if name.startswith("ours") else 1e-6)
        if wrong and name not in OTHER_ALGORITHM:
            raise SystemExit(f"{name}: {wrong}; nothing is measured")
    timed: dict[str, Callable[[], object]] = {**found, FLOOR: setting.convolutions_alone(steps)}
    comparison = common.compare(timed, baseline=PLAIN, rounds=rounds, warm_up=1, cuda=setting.device == "cuda")
    peers = {n: t for n, t in comparison.timings.items() if not n.startswith("ours") and n not in NOT_A_PEER}
    best = min(peers, key=lambda name: peers[name].median)
    ours = {name: timing.median for name, timing in comparison.timings.items() if name.startswith("ours")}
    floor = comparison.timings[FLOOR].median
    result = {
        "losses_reached": losses,
        "skipped": skipped,
        "comparison": comparison,
        "fastest_peer": best,
        "ours_over_fastest_peer": {name: round(peers[best].median / seconds, 3) for name, seconds in ours.items()},
        "floor_over_fastest_peer": round(peers[best].median / floor, 3),
        "share_of_ours_in_convolutions": {name: round(floor / seconds, 3) for name, seconds in ours.items()},
    }
    if PLAIN_FP32 in comparison.timings:
        full = comparison.timings[PLAIN_FP32].median
        result["ours_over_fp32_loop"] = {name: round(full / seconds, 3) for name, seconds in ours.items()}
    return result


def show(result: dict, dtype: str) -> None:
    """Print one precision's table."""
    comparison = result["comparison"]
    trusted = "" if comparison.trusted else "  NOT TRUSTED: the machine was too busy"
    print(f"\n{dtype}: A/A control {comparison.control}{trusted}")

    def reached(name: str) -> str:
        loss = result["losses_reached"].get(name)
        return "" if loss is None else f"   loss {loss:.4f}"

    for name, timing in sorted(comparison.timings.items(), key=lambda item: item[1].median):
        ratio = comparison.ratios.get(name, [1.0, 1.0, 1.0])
        print(
            f"  {name:24s} {timing.median * 1e3:9.1f} ms (best {timing.fastest * 1e3:8.1f})   "
            f"x{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]{reached(name)}"
        )
    for name, reason in result["skipped"].items():
        print(f"  {name:24s} skipped: {reason}")
    print(f"  over the fastest peer ({result['fastest_peer']}): {result['ours_over_fastest_peer']}")
    print(f"  the convolutions alone would be x{result['floor_over_fastest_peer']} of it")
    if "ours_over_fp32_loop" in result:
        print(f"  over the same loop in fp32: {result['ours_over_fp32_loop']}")


def versions() -> dict[str, str]:
    """Return the installed version of each peer."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def main() -> None:
    """Check, measure, print tables and write the JSON records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave out our compiled form")
    parser.add_argument("--peers", help="folder of peers installed with pip install --target FOLDER --no-deps")
    arguments = parser.parse_args()
    if arguments.peers:
        sys.path.append(arguments.peers)
    before = common.environment()
    model = rungs.network(arguments.arch, size=arguments.size, device=arguments.device, width=arguments.width)
    x, y = rungs.batch(model, arguments.batch, arguments.size, arguments.device)
    for dtype in arguments.dtype:
        setting = rungs.Setting(model, x, y, dtype, arguments.device)
        result = measure(setting, steps=arguments.steps, rounds=arguments.rounds, compiled=not arguments.no_compile)
        show(result, dtype)
        name = f"peers_{arguments.arch}_{arguments.size}_{dtype}_{arguments.device}"
        content = {"versions": versions(), "setting": vars(arguments) | {"dtype": dtype}, **result}
        print(common.write_result(name, content, before=before))


if __name__ == "__main__":
    main()
