"""Times our PGD on other libraries' networks against a plain autograd.grad loop on the network as they give it.

    python -m benchmarks.foreign_networks [--size 64] [--batch 8] [--steps 2] [--rounds 9] [--compile] [ARCH ...]

The plain loop runs on the untouched network; ours on its twin (batch norms folded where they stand behind a convolution,
channels-last), and with ``--compile`` also through torch.compile. Before anything is timed the results are compared: the
attack's loss, and the gradient in float64. Writes results/foreign_networks_DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import common
from benchmarks.peers import grad_loop
from benchmarks.rungs import EPS, LOSS_TOLERANCE, STEP
from distributed_at.attacks import PGD, Threat
from distributed_at.config import ModelConfig
from distributed_at.engine.twin.compiled_attack import StaticIteration
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import build_model
from distributed_at.models.norm import BatchNorm

ARCHS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:convnext_tiny",
    "torchvision:vit_b_16",
    "timm:convnext_tiny",
    "timm:vit_small_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
)


def raw_network(arch: str, size: int) -> nn.Module:
    """Return the network as its library builds it, with ten classes and in eval mode."""
    library, name = arch.split(":")
    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        sized = {"image_size": size} if name.startswith("vit") else {}
        network: nn.Module = torchvision.models.get_model(name, num_classes=10, **sized)
    else:
        import timm

        sized = {} if name.startswith("convnext") else {"img_size": size}
        network = timm.create_model(name, num_classes=10, **sized)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Linear) and layer.out_features == 10:
                layer.weight.normal_(0, 0.02)  # torchvision's transformer begins with zeros: no gradient
    return network.eval()


def ours(arch: str, raw: nn.Module, size: int) -> nn.Module:
    """Return the same network as a recipe opens it, with the same weights."""
    model = build_model(ModelConfig(arch=arch), num_classes=10, image_size=size)
    own, values = model.state_dict(), list(raw.state_dict().values())
    if [t.shape for t in own.values()] != [t.shape for t in values]:
        raise ValueError(f"{arch}: the recipe's network has other tensors than the library's")
    model.load_state_dict(dict(zip(own, values, strict=True)))
    return model.eval()


def measure(arch: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of one network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raw = raw_network(arch, args.size).to(device)
    network = ours(arch, raw, args.size).to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(args.batch, 3, args.size, args.size, generator=generator).to(device)
    y = torch.randint(0, 10, (args.batch,), generator=generator).to(device)
    twin = Twin(network, bn_mode="eval")
    attack = PGD(
        threat=Threat("linf", EPS), num_steps=args.steps, step_size=STEP, start="zero", check_input=False, fused=True
    )
    contestants = {
        "autograd.grad loop": lambda: grad_loop(raw, x, y, args.steps),
        "ours": lambda: attack.perturb(twin, x, y),
    }
    failed = ""
    if args.compile:
        static = StaticIteration(attack, twin, batch_size=args.batch, use_compiler=True)
        contestants["ours, compiled"] = lambda: attack.perturb(twin, x, y, iteration=static)
        contestants["ours, compiled"]()
        failed = static.failed
    losses = {name: F.cross_entropy(raw(run()), y).item() for name, run in contestants.items()}
    plain = losses["autograd.grad loop"]
    if any(abs(value - plain) > LOSS_TOLERANCE * abs(plain) for value in losses.values()):
        raise ValueError(f"{arch}: the attacks do not agree: {losses}")
    found = common.compare(
        contestants, baseline="autograd.grad loop", rounds=args.rounds, target_seconds=0.2, cuda=device.type == "cuda"
    )
    norms = [m for m in network.modules() if isinstance(m, BatchNorm)]
    left = [m for m in twin.module.modules() if isinstance(m, BatchNorm)]
    return {
        "batch_norms": len(norms),
        "folded": len(norms) - len(left),
        "gradient_error_float64": gradient_error(raw, network, x[:2].cpu(), y[:2].cpu()),
        "loss": losses,
        "compiler": failed or ("worked" if args.compile else "not tried"),
        "ratios": found.ratios,
        "control": found.control,
        "trusted": found.trusted,
    }


def gradient_error(raw: nn.Module, network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return how far the twin's gradient is from the library's network's, relative, in float64."""
    gradients = []
    for model in (copy.deepcopy(raw).cpu().double(), Twin(copy.deepcopy(network).cpu().double(), bn_mode="eval")):
        image = x.double().requires_grad_()
        gradients.append(torch.autograd.grad(F.cross_entropy(model(image), y), image)[0])
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archs", nargs="*", default=ARCHS)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    before, results = common.environment(), {}
    for arch in args.archs:
        results[arch] = measure(arch, args)
        row = results[arch]
        print(
            f"{arch:36} folded {row['folded']}/{row['batch_norms']}  gradient {row['gradient_error_float64']:.1e}  "
            f"{row['ratios']}  control {row['control']}  compiler {row['compiler']}",
            flush=True,
        )
    settings = {name: getattr(args, name) for name in ("size", "batch", "steps", "rounds")}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(common.write_result(f"foreign_networks_{device}", {"settings": settings, "networks": results}, before=before))


if __name__ == "__main__":
    main()
