"""Every network with every norm, activation and branch: runs, differentiates, and refuses what makes no sense."""

from __future__ import annotations

import ast
import copy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from distributed_at.catalogue.networks import NETWORKS
from distributed_at.catalogue.norms import NORMS as NORMS_BY_NAME
from distributed_at.config import Activation, ModelConfig
from distributed_at.errors import ConfigError
from distributed_at.models import LAYOUTS, build_model, on_branch, set_bn_mode, set_branch
from distributed_at.models.activations import build_activation
from distributed_at.models.base import SubsampledConv2d, conv1x1
from distributed_at.models.norm import MixtureBatchNorm, norm_layers

PACKAGE = Path(__file__).parents[2] / "distributed_at"
NORMS = tuple(NORMS_BY_NAME.builtin)
BRANCHES = ("clean", "adv")
CLASSES = 5


def tiny(arch: str, **fields: object) -> ModelConfig:
    """A narrow net of the architecture for 16-pixel images."""
    fields = {"stem": "cifar", "groups": 4, "base_width": 4, **fields}
    if arch == "wide_resnet":
        fields = {"depth": 10, "widen": 1, **fields}
    if arch in ("resnet", "preact_resnet"):
        fields = {"blocks": (1, 1), "block": "basic", **fields}
    return ModelConfig(arch=arch, **fields)


FAMILIES = {
    "resnet-basic": tiny("resnet"),
    "resnet-bottleneck": tiny("resnet", block="bottleneck"),
    "resnet-imagenet-stem": tiny("resnet", stem="imagenet"),
    "preact-basic": tiny("preact_resnet"),
    "preact-bottleneck-raw": tiny("preact_resnet", block="bottleneck", preact_shortcut="raw"),
    "wide": tiny("wide_resnet"),
}


def images(count: int = 4, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def check_network(config: ModelConfig, branch: str) -> None:
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES)
    x = images().requires_grad_()
    with on_branch(model, branch):
        logits = model(x)
    assert logits.shape == (4, CLASSES)
    (grad,) = torch.autograd.grad(logits[:, 0].sum(), x, retain_graph=True)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    other = {"clean": ".adv.", "adv": ".clean."}[branch]
    for name, parameter in model.named_parameters():
        if other in name:
            assert parameter.grad is None, f"{name} belongs to the other branch"
        else:
            assert parameter.grad is not None, f"{name} takes no part"
            assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("arch", LAYOUTS)
def test_every_architecture_trains_with_every_norm_and_branch(arch: str, norm: str, branch: str) -> None:
    if arch in ("resnet338", "resnet518", "resnet638") and (norm, branch) != ("mbn", "adv"):
        pytest.skip("the deepest nets differ from resnet200 in their block counts alone; one combination each")
    check_network(tiny(arch, norm=norm), branch)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_every_activation(family: str, norm: str, activation: str, branch: str) -> None:
    check_network(FAMILIES[family].model_copy(update={"norm": norm, "activation": activation}), branch)


def test_registry_holds_exactly_the_architectures_of_the_schema() -> None:
    assert set(NETWORKS) == set(LAYOUTS)
    assert ModelConfig.model_fields["arch"].metadata[0].registry is NETWORKS


@pytest.mark.parametrize(
    ("activation", "fields", "reference"),
    [
        ("leaky_relu", {"leaky_slope": 0.1}, lambda x: torch.where(x > 0, x, 0.1 * x)),
        ("celu", {}, lambda x: torch.where(x > 0, x, 1.2 * (torch.exp(x / 1.2) - 1))),
        ("softplus", {"softplus_beta": 10.0}, lambda x: torch.log1p(torch.exp(10 * x)) / 10),
        ("silu", {}, lambda x: x * torch.sigmoid(x)),
        ("elu", {}, lambda x: torch.where(x > 0, x, torch.exp(x) - 1)),
    ],
)
def test_activation_has_its_parameter(activation: str, fields: dict, reference) -> None:
    x = torch.linspace(-3, 1.5, 31, dtype=torch.float64)
    layer = build_activation(tiny("resnet", activation=activation, **fields))
    torch.testing.assert_close(layer(x), reference(x))


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activation_never_works_in_place(activation: str) -> None:
    x = torch.linspace(-3, 3, 31)
    before = x.clone()
    assert not torch.equal(build_activation(tiny("resnet", activation=activation))(x), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            tiny("wide_resnet", depth=16, widen=2),
            ("block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.running_mean", "bn1.weight", "fc.bias"),
        ),
        (tiny("preact_resnet18"), ("layer2.0.shortcut.0.weight", "layer4.1.bn2.weight", "bn.weight", "linear.bias")),
    ],
)
def test_parameter_names_are_those_under_which_robust_networks_are_published(config: ModelConfig, names: tuple) -> None:
    with torch.device("meta"):
        state = build_model(config, num_classes=CLASSES).state_dict()
    assert set(names) <= set(state)
    assert not [name for name in state if name.startswith(("sub_block", "pixels"))]


@pytest.mark.parametrize("family", FAMILIES)
def test_misspelt_branch_is_refused_by_every_norm(family: str) -> None:
    for norm in NORMS:
        model = build_model(FAMILIES[family].model_copy(update={"norm": norm}), num_classes=CLASSES)
        with pytest.raises(ConfigError, match="'clean'"):
            set_branch(model, "cleen")


@pytest.mark.parametrize("family", FAMILIES)
def test_pixel_normalisation_is_part_of_the_model(family: str) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    torch.manual_seed(0)
    plain = build_model(FAMILIES[family], num_classes=CLASSES).eval()
    normalising = build_model(
        FAMILIES[family].model_copy(update={"pixel_mean": mean, "pixel_std": std}), num_classes=CLASSES
    ).eval()
    normalising.load_state_dict(plain.state_dict())  # pixel constants are no part of it
    x = images()
    shifted = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    torch.testing.assert_close(normalising(x), plain(shifted))


@pytest.mark.parametrize("field", ["pixel_mean", "pixel_std"])
def test_pixel_constants_of_wrong_length_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        build_model(tiny("resnet", **{field: (1.0,)}), num_classes=CLASSES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "resnet50", "blocks": (3, 4, 6, 4)}, "model.blocks"),
        ({"arch": "resnet50", "block": "basic"}, "model.block "),
        ({"arch": "resnet18", "depth": 34}, "wide_resnet"),
        ({"arch": "resnet", "blocks": (), "block": "basic"}, "model.blocks"),
        ({"arch": "resnet", "blocks": (1, 0), "block": "basic"}, "model.blocks"),
        ({"arch": "wide_resnet", "depth": 10, "widen": 1, "block": "basic"}, "depth and widen"),
        ({"arch": "preact_resnet18", "zero_init_gamma": True}, "zero_init_gamma"),
    ],
)
def test_fields_that_do_not_belong_to_an_architecture_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        build_model(ModelConfig(**fields), num_classes=CLASSES)


@pytest.mark.parametrize("family", FAMILIES)
def test_group_norm_names_the_field_and_what_is_allowed(family: str) -> None:
    config = FAMILIES[family].model_copy(update={"norm": "gn", "groups": 32})
    with pytest.raises(ConfigError, match=r"model\.groups 32 .*allowed for it: 1, 2, 4"):
        build_model(config, num_classes=CLASSES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_activation_checkpointing_changes_nothing_but_memory(family: str, norm: str) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = FAMILIES[family].model_copy(update={"norm": norm, "activation_checkpointing": recompute})
        model = build_model(config, num_classes=CLASSES)
        blocks = [m for m in model.modules() if type(m).__name__.endswith(("Block", "Bottleneck"))]
        calls = []
        blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.nn.functional.cross_entropy(model(images()), torch.arange(4)).backward()
        assert len(calls) == (2 if recompute else 1)
        model(images()).sum().backward()  # a later step moves running statistics again
        model.eval()
        calls.clear()
        x = images().requires_grad_()
        torch.autograd.grad(model(x).sum(), x)
        assert len(calls) == 1, "the attack's forward, in eval(), is never recomputed"
        results.append((model.state_dict(), [p.grad for p in model.parameters()]))
    (state, grads), (other_state, other_grads) = results
    for name in state:
        assert torch.equal(state[name], other_state[name]), name
    for grad, other_grad in zip(grads, other_grads, strict=True):
        assert (grad is None) == (other_grad is None)
        assert grad is None or torch.equal(grad, other_grad)


@pytest.mark.parametrize("last", BRANCHES)
def test_a_recomputed_forward_runs_on_its_own_branch_whatever_came_after(last: str) -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        config = tiny("resnet", norm="mbn", activation_checkpointing=recompute)
        model = build_model(config, num_classes=CLASSES)
        for number, layer in enumerate(norm_layers(model)):
            torch.nn.init.constant_(layer.weight, 0.5 + 0.1 * number)
        with on_branch(model, "clean"):
            clean = model(images())
        with on_branch(model, "adv"):
            adv = model(1.0 - images())
        set_branch(model, last)
        (clean.square().sum() + adv[:, 0].sum()).backward()
        assert all(layer.branch == last for layer in model.modules() if isinstance(layer, MixtureBatchNorm))
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_meta_device_double_precision_deepcopy_and_channels_last(family: str, norm: str) -> None:
    config = FAMILIES[family].model_copy(update={"norm": norm, "pixel_mean": (0.5, 0.4, 0.3)})
    with torch.device("meta"):
        meta = build_model(config, num_classes=CLASSES)
        assert meta(torch.empty(2, 3, 16, 16)).shape == (2, CLASSES)
    assert all(t.is_meta for t in meta.state_dict().values())
    model = build_model(config, num_classes=CLASSES).double().eval()
    x = images().double()
    logits = model(x)
    assert logits.dtype == torch.float64
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(x), logits)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in duplicate.parameters()}
    strided = duplicate.to(memory_format=torch.channels_last)
    torch.testing.assert_close(strided(x.contiguous(memory_format=torch.channels_last)), logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_float64_input_gradient_is_the_derivative(family: str, norm: str) -> None:
    config = FAMILIES[family].model_copy(update={"norm": norm, "activation": "silu"})
    torch.manual_seed(0)
    model = build_model(config, num_classes=CLASSES).double()
    set_bn_mode(model, "batch")
    x = images(3, 8).double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(model(x.requires_grad_())[:, 1].sum(), x)
    step = 1e-6
    with torch.no_grad():
        numeric = (model(x + step * direction)[:, 1].sum() - model(x - step * direction)[:, 1].sum()) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", NORMS)
def test_function_transform_gives_the_same_input_gradient_and_buffers(family: str, norm: str, mode: str) -> None:
    torch.manual_seed(0)
    model = build_model(FAMILIES[family].model_copy(update={"norm": norm}), num_classes=CLASSES)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        set_bn_mode(each, mode)
        for layer in norm_layers(each):
            layer.group_size = 2
    x = images()
    transformed = torch.func.grad(lambda z: model(z).square().sum())(x)
    (plain,) = torch.autograd.grad(twin(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(transformed, plain)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("norm", NORMS)
def test_network_traces_into_one_graph(norm: str) -> None:
    torch.manual_seed(0)
    model = build_model(tiny("resnet", norm=norm), num_classes=CLASSES)
    for mode in ("eval",) if norm == "gn" else ("eval", "batch", "train"):
        set_bn_mode(model, mode)
        torch._dynamo.reset()
        eager = copy.deepcopy(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for branch in BRANCHES:
            with on_branch(model, branch), on_branch(eager, branch):
                torch.testing.assert_close(compiled(images()), eager(images()))
        for name, tensor in eager.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor)


@pytest.mark.parametrize("mode", ["eval", "batch"])
@pytest.mark.parametrize("norm", NORMS)
def test_attack_gradient_traces_into_one_graph(norm: str, mode: str) -> None:
    torch.manual_seed(0)
    model = build_model(tiny("resnet", norm=norm), num_classes=CLASSES).requires_grad_(False)
    set_bn_mode(model, mode)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda z: model(z).square().sum())(x)

    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), gradient(images()))


def test_preact_shortcut_takes_the_input_that_the_recipe_names() -> None:
    torch.manual_seed(0)
    activated = build_model(tiny("preact_resnet", blocks=(1, 1)), num_classes=CLASSES).eval()
    raw = build_model(tiny("preact_resnet", blocks=(1, 1), preact_shortcut="raw"), num_classes=CLASSES).eval()
    raw.load_state_dict(activated.state_dict())
    assert not torch.equal(activated(images()), raw(images()))
    seen = []
    for model in (activated, raw):
        block = model.layer2[0]
        block.shortcut.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(images())
    entered, into_shortcut, entered_raw, into_raw_shortcut = seen
    assert into_shortcut.min() >= 0
    assert entered.min() < 0
    assert torch.equal(entered_raw, into_raw_shortcut)


@pytest.mark.parametrize("channels", [1, 3, 7, 8])
@pytest.mark.parametrize("size", [8, 9])
def test_a_strided_projection_is_torchs_convolution(channels: int, size: int) -> None:
    """Narrow ones in a form of their own, whose gradients and output are the same."""
    conv = conv1x1(channels, 5, stride=2).double()
    assert isinstance(conv, SubsampledConv2d) == (channels < 8)
    x = torch.rand(2, channels, size, size, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.conv2d(x, conv.weight, stride=2)
    weights = torch.rand_like(expected)
    ours = torch.autograd.grad((conv(x) * weights).sum(), (x, conv.weight))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, conv.weight))
    torch.testing.assert_close((conv(x), *ours), (expected, *theirs), rtol=1e-12, atol=1e-12)


_BACKWARDS = """
import torch
from distributed_at.models.base import conv1x1
for channels in range(1, 9):
    conv = conv1x1(channels, 8, stride=2)
    for _ in range(10):
        x = torch.rand(24, channels, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        conv(x).relu().square().sum().backward()
        kept = [torch.empty(size) for size in range(100, 4000, 100)]
"""


def test_a_narrow_strided_projection_stays_in_its_memory() -> None:
    """torch's own form ends such a process on CPUs without AVX-512; elsewhere this says nothing."""
    done = subprocess.run([sys.executable, "-c", _BACKWARDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_nothing_but_its_entry_knows_a_norm_by_name() -> None:
    """What a norm is stands in norms.py; everything else asks it."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare):
                continue
            said = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not said & set(NORMS_BY_NAME.builtin), f"{path.relative_to(PACKAGE)}:{node.lineno}"
