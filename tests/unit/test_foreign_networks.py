"""Networks of torchvision, timm and users: converted, folded, measured and attacked like ours, and dropout that resumes."""

from __future__ import annotations

import copy
import functools
import importlib.util

import pytest
import torch
import torchvision
from torch import nn

from distributed_at.attacks import PGD, Threat
from distributed_at.config import ModelConfig
from distributed_at.engine.twin.twin import Twin
from distributed_at.errors import ConfigError
from distributed_at.evaluation import Subject, evaluate_entry
from distributed_at.models import BatchNorm, MixtureBatchNorm, build_model, measure, on_branch, weight_decay_groups
from distributed_at.models.base import SubsampledConv2d
from distributed_at.models.convert import convert_batch_norms, convert_dropout
from distributed_at.models.dropout import CounterDropout, Draw, drawing, dropping_layers
from distributed_at.models.foreign import fitted_weights, published_weights
from distributed_at.models.parameters import load_torchvision_state_dict

# (arch, image size, batch norms directly behind a convolution, all batch norms)
FOREIGN = {
    "torchvision:resnet18": (64, 20, 20),
    "torchvision:resnet50": (64, 53, 53),
    "torchvision:convnext_tiny": (64, 0, 0),
    "torchvision:vit_b_16": (32, 0, 0),
    "timm:convnext_tiny": (64, 0, 0),
    "timm:vit_small_patch16_224": (32, 0, 0),
    "timm:swin_tiny_patch4_window7_224": (64, 0, 0),
    "timm:efficientnet_b0": (64, 49, 49),  # batch norm with its activation inside
}
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")
ALL = [pytest.param(arch, marks=needs_timm if arch.startswith("timm:") else ()) for arch in FOREIGN]


@functools.lru_cache(maxsize=1)
def network(arch: str) -> nn.Module:
    """The network in float64 and eval mode, with statistics and a head that no default hides."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch=arch), num_classes=10, image_size=FOREIGN[arch][0]).double().eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.out_features == 10:
                layer.weight.normal_(0, 0.02)  # torchvision's transformer begins with zeros, so without a gradient
    return model


def images(arch: str, count: int = 2) -> torch.Tensor:
    size = FOREIGN[arch][0]
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradient(function, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    logits = function(x)
    return torch.autograd.grad((logits * torch.arange(10, dtype=logits.dtype)).sum(), x)[0].double()


@pytest.mark.parametrize("arch", ALL)
def test_twin_folds_every_batch_norm_and_has_the_plain_networks_gradient(arch: str) -> None:
    model, x = network(arch), images(arch)
    twin = Twin(model, bn_mode="eval")
    assert isinstance(twin.module, torch.fx.GraphModule)
    assert twin.folded == FOREIGN[arch][1]
    plain = gradient(model, x)
    assert (gradient(twin, x) - plain).abs().max() <= 1e-12 * plain.abs().max()
    assert sum(isinstance(layer, BatchNorm) for layer in model.modules()) == FOREIGN[arch][2]


@pytest.mark.parametrize("arch", ALL)
def test_sixteen_bit_twin_runs_and_points_the_same_way(arch: str) -> None:
    model, x = copy.deepcopy(network(arch)).float(), images(arch).float()
    half = gradient(Twin(model, bn_mode="eval", dtype="bf16"), x)
    assert torch.cosine_similarity(half.flatten(), gradient(model, x).flatten(), dim=0) > 0.85


@pytest.mark.parametrize("arch", ALL)
def test_size_and_cost_are_measured_without_memory(arch: str) -> None:
    size, _, norms = FOREIGN[arch]
    found = measure(ModelConfig(arch=arch), num_classes=10, image_size=size)
    assert found.parameters == sum(p.numel() for p in network(arch).parameters())
    assert (found.buffers > 0) == (norms > 0)
    assert found.macs > found.parameters  # each weight of these is used more than once
    assert 0 < found.input_grad_bytes <= found.train_bytes


def test_attention_is_counted_in_the_cost() -> None:
    """ViT-B/16 at 224 pixels: 17.56 GFLOP of multiply-adds by torchvision's own table."""
    found = measure(ModelConfig(arch="torchvision:vit_b_16"), num_classes=1000, image_size=224)
    assert found.macs == pytest.approx(17.56e9, rel=0.005)


@pytest.mark.parametrize("training", [True, False])
def test_converted_network_computes_what_it_computed_before(training: bool) -> None:
    torch.manual_seed(0)
    raw = torchvision.models.resnet18(num_classes=10).train(training)
    converted = convert_batch_norms(copy.deepcopy(raw))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in converted.modules())
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(raw(x), converted(x))
    assert all(
        torch.equal(a, b) for a, b in zip(raw.state_dict().values(), converted.state_dict().values(), strict=True)
    )
    assert list(raw.state_dict()) == list(converted.state_dict())


def test_conversion_keeps_eps_and_momentum() -> None:
    raw = nn.BatchNorm2d(3, eps=0.01, momentum=0.3)
    x = torch.randn(4, 3, 5, 5)
    converted = convert_batch_norms(copy.deepcopy(raw))
    assert torch.equal(raw(x), converted(x))
    assert torch.equal(raw.running_var, converted.running_var)
    assert torch.equal(raw.eval()(x), converted.eval()(x))


def test_conversion_takes_over_the_very_tensors() -> None:
    raw = torchvision.models.resnet18(num_classes=10)
    before = {id(t) for t in [*raw.parameters(), *raw.buffers()]}
    assert {id(t) for t in [*convert_batch_norms(raw).parameters(), *raw.buffers()]} == before


def test_mixture_gives_each_branch_the_networks_own_statistics_to_begin_with() -> None:
    config = ModelConfig(arch="torchvision:resnet18", norm="mbn")
    torch.manual_seed(0)
    mixture = build_model(config, num_classes=10).train()
    torch.manual_seed(0)
    plain = build_model(config.model_copy(update={"norm": "bn"}), num_classes=10).eval()
    assert sum(isinstance(layer, MixtureBatchNorm) for layer in mixture.modules()) == 20
    x = torch.rand(4, 3, 32, 32)
    clean = {n: b.clone() for n, b in mixture.named_buffers() if ".clean." in n}
    with on_branch(mixture, "adv"):
        mixture(x)
    assert all(torch.equal(b, mixture.get_buffer(n)) for n, b in clean.items())
    mixture.eval()
    with on_branch(mixture, "clean"):
        assert torch.equal(mixture(x), plain(x))
    with on_branch(mixture, "adv"):
        assert not torch.allclose(mixture(x), plain(x))


def test_group_norm_takes_the_place_of_batch_norm() -> None:
    model = build_model(ModelConfig(arch="torchvision:resnet18", norm="gn", groups=16), num_classes=10)
    assert sum(isinstance(layer, nn.GroupNorm) for layer in model.modules()) == 20
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


class Odd(nn.BatchNorm2d):
    """A batch norm that does more."""


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.BatchNorm1d(4), r"batch norm over images \(nn.BatchNorm2d\) can be taken over"),
        (nn.BatchNorm2d(4, affine=False), "affine parameters"),
        (nn.BatchNorm2d(4, track_running_stats=False), "running statistics"),
        (nn.BatchNorm2d(4, momentum=None), "fixed momentum"),
        (Odd(4), "more than nn.BatchNorm2d"),
    ],
)
def test_batch_norm_that_cannot_be_taken_over_is_named(layer: nn.Module, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^inner\.norm \({type(layer).__name__}\).*{told}"):
        convert_batch_norms(nn.ModuleDict({"inner": nn.ModuleDict({"norm": layer})}))


def test_mixture_without_batch_norm_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="'mbn' gives batch norm two branches, and VisionTransformer has no batch norm"
    ):
        build_model(ModelConfig(arch="torchvision:vit_b_16", norm="mbn"), num_classes=10, image_size=32)


@pytest.mark.parametrize("bn_mode", ["eval", "batch", "train"])
def test_attack_on_a_raw_module_runs_in_every_mode_and_moves_statistics_in_one(bn_mode: str) -> None:
    torch.manual_seed(0)
    raw = torchvision.models.resnet18(num_classes=10).eval()
    before = {n: b.clone() for n, b in raw.named_buffers()}
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    twin = Twin(raw, bn_mode=bn_mode)
    adv = PGD(threat=Threat("linf", 8 / 255), num_steps=2, step_size=4 / 255).perturb(twin, x, y)
    assert twin.folded == (20 if bn_mode == "eval" else 0)
    assert 0 < (adv - x).abs().max() <= 8 / 255 + 1e-6
    moved = {n for n, b in raw.named_buffers() if not torch.equal(b, before[n])}
    assert moved == (set(before) if bn_mode == "train" else set())
    assert not raw.training


def test_twin_of_a_network_whose_norms_cannot_be_taken_over_runs_in_eval_mode() -> None:
    raw = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(36), nn.Linear(36, 10)).eval()
    x = torch.rand(2, 3, 5, 5)
    assert torch.allclose(Twin(raw, bn_mode="eval")(x), raw(x), atol=1e-6)
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        Twin(raw, bn_mode="train")


def test_plain_sequential_is_evaluated() -> None:
    from distributed_at.config import AttackConfig, evaluation_entry
    from tests.evaluation_kit import source

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    what = evaluation_entry(kind="pgd", attack=AttackConfig(eps=8, num_steps=2, step_size=4), num_samples=20)
    (found,) = evaluate_entry(Subject(network=model), source(), what)
    assert found.total == 20


@pytest.mark.parametrize("arch", ALL)
def test_decay_reaches_kernels_and_no_norm(arch: str) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(arch=arch), num_classes=10, image_size=FOREIGN[arch][0])
    decay, rest = weight_decay_groups(model, "no_norm_bias")
    assert len(decay) + len(rest) == len(list(model.parameters()))
    norms = (BatchNorm, nn.LayerNorm, nn.GroupNorm)
    of_norms = {id(p) for layer in model.modules() if isinstance(layer, norms) for p in layer.parameters()}
    assert of_norms <= {id(p) for _, p in rest}
    kernels = {name for name, _ in weight_decay_groups(model, "kernels")[0]}
    assert kernels <= {name for name, _ in decay}
    assert all(p.dim() >= 2 for name, p in model.named_parameters() if name in kernels)
    if "vit_b_16" in arch:
        assert sum(name.endswith("in_proj_weight") for name in kernels) == 12


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"arch": "torchvision:resnet5"}, "torchvision has no classifier 'resnet5'. Did you mean 'resnet50'?"),
        pytest.param({"arch": "timm:convnext_tny"}, "Did you mean 'convnext_tiny'?", marks=needs_timm),
        ({"arch": "torchvision:resnet18", "options": {"widht_per_group": 128}}, "model.options"),
    ],
)
def test_what_a_library_does_not_have_is_told_with_the_nearest(fields: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(**fields), num_classes=10)
    assert told in str(caught.value)


@pytest.mark.parametrize("fields", [{"depth": 34}, {"activation": "silu"}, {"dropout": 0.1}, {"stem": "cifar"}])
def test_fields_of_our_networks_are_refused_for_others(fields: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} belongs to the networks of this package"):
        ModelConfig(arch="torchvision:resnet18", **fields)
    with pytest.raises(ValueError, match="options belong to networks that are not ours"):
        ModelConfig(arch="resnet18", options={"a": 1})


def raw_state(num_classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return torchvision.models.resnet18(num_classes=num_classes).state_dict()


@pytest.mark.parametrize("norm", ["bn", "mbn"])
def test_published_weights_are_loaded_strictly_but_for_a_new_head(norm: str) -> None:
    model = build_model(ModelConfig(arch="torchvision:resnet18", norm=norm), num_classes=10)
    state, head = raw_state(1000), model.network.fc.weight.clone()
    fitted, dropped = fitted_weights(model, state)
    load_torchvision_state_dict(model, fitted)
    assert dropped == ["network.fc.weight", "network.fc.bias"]
    assert torch.equal(model.network.fc.weight, head)
    assert torch.equal(model.network.conv1.weight, state["conv1.weight"])
    same = build_model(ModelConfig(arch="torchvision:resnet18"), num_classes=1000)
    assert fitted_weights(same, state)[1] == []
    thin = {k: v[:3] if k == "layer1.0.conv1.weight" else v for k, v in state.items()}
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight is \(3, 64, 3, 3\), not"):
        load_torchvision_state_dict(model, fitted_weights(model, thin)[0])
    with pytest.raises(ConfigError, match=r"no network\.conv1\.weight"):
        load_torchvision_state_dict(
            model, fitted_weights(model, {k: v for k, v in state.items() if k != "conv1.weight"})[0]
        )


def test_named_weights_come_from_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, **kwargs: asked.append(url) or raw_state(1000)
    )
    config = ModelConfig(arch="torchvision:resnet18", pretrained="default")
    assert list(published_weights(config, image_size=32)) == list(raw_state(1000))
    assert "resnet18" in asked[0]
    with pytest.raises(ConfigError, match=r"no weights 'IMAGENET1K_V3'\. Did you mean 'IMAGENET1K_V1'\?"):
        published_weights(config.model_copy(update={"pretrained": "IMAGENET1K_V3"}), image_size=32)


# --- dropout by counters


def masked(layer: CounterDropout, x: torch.Tensor, ids: list[int], *, epoch: int = 1, seed: int = 0, forward: int = 0):
    with drawing(layer, Draw(torch.tensor(ids), epoch, seed, forward)):
        return layer(x)


def test_masks_belong_to_samples_whatever_the_batch_and_change_with_every_key() -> None:
    layer, x = CounterDropout(0.3, number=2).train(), torch.ones(4, 3, 5, 5)
    whole = masked(layer, x, [7, 8, 9, 10])
    parts = torch.cat([masked(layer, x[:1], [7]), masked(layer, x[1:], [8, 9, 10])])
    assert torch.equal(whole, parts)
    assert torch.equal(masked(layer, x, [10, 9, 8, 7]), whole.flip(0))
    others = [masked(layer, x, [7, 8, 9, 10], **key) for key in ({"epoch": 2}, {"seed": 1}, {"forward": 1})]
    others.append(masked(CounterDropout(0.3, number=3).train(), x, [7, 8, 9, 10]))
    assert not any(torch.equal(other, whole) for other in others)
    assert torch.equal(layer.eval()(x), x)


@pytest.mark.parametrize(("kept", "shape"), [(None, (3, 5, 5)), (2, (3, 1, 1)), (1, (1, 1, 1))])
def test_mask_is_one_number_an_element_a_channel_or_an_image(kept: int | None, shape: tuple[int, ...]) -> None:
    found = masked(CounterDropout(0.4, kept=kept).train(), torch.ones(200, 3, 5, 5), list(range(200)))
    assert sorted(found.unique().tolist()) == [0.0, pytest.approx(1 / 0.6)]
    assert torch.equal(found, found[:, : shape[0], : shape[1], : shape[2]].expand_as(found))
    count = 200 * shape[0] * shape[1] * shape[2]
    share = (found[:, : shape[0], : shape[1], : shape[2]] == 0).float().mean().item()
    assert abs(share - 0.4) < 5 * (0.24 / count) ** 0.5


def test_dropout_in_training_without_known_images_is_an_error() -> None:
    with pytest.raises(ConfigError, match="needs to know its images"):
        CounterDropout(0.5).train()(torch.ones(2, 3))
    with pytest.raises(ConfigError, match="images must come first"):
        masked(CounterDropout(0.5).train(), torch.ones(3, 2), [1, 2])


def test_layers_that_drop_are_converted_each_with_a_number_of_its_own() -> None:
    depth = torchvision.ops.StochasticDepth
    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0), nn.Dropout2d(0.2), depth(0.3, "row"), depth(0.0, "row"))
    convert_dropout(model)
    found = dropping_layers(model)
    assert [(layer.p, layer.kept, layer.number) for layer in found] == [(0.1, None, 0), (0.2, 2, 1), (0.3, 1, 2)]
    for layer, told in ((depth(0.3, "batch"), "mode 'batch'"), (nn.MultiheadAttention(4, 1, 0.1), "dropout inside")):
        with pytest.raises(ConfigError, match=told):
            convert_dropout(nn.Sequential(layer))


@needs_timm
def test_masks_of_timms_norm_layers_are_kept() -> None:
    """timm puts drop and activation into its norm layer: converted, the network still computes what it did."""
    import timm

    torch.manual_seed(0)
    raw = timm.create_model("efficientnet_b0", num_classes=10).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(convert_batch_norms(copy.deepcopy(raw))(x), raw(x))


@needs_timm
def test_stochastic_depth_of_timm_is_converted() -> None:
    config = ModelConfig(arch="timm:convnext_tiny", options={"drop_path_rate": 0.2})
    with torch.device("meta"):
        model = build_model(config, num_classes=10)
    found = dropping_layers(model)
    assert len(found) == 17  # all blocks but the first, whose rate is 0
    assert {layer.kept for layer in found} == {1}
    assert max(layer.p for layer in found) == pytest.approx(0.2)


def test_wide_resnet_drops_between_its_convolutions() -> None:
    model = build_model(ModelConfig(arch="wide_resnet", depth=10, widen=1, dropout=0.3), num_classes=10).train()
    assert [layer.number for layer in dropping_layers(model)] == [0, 1, 2]
    x = torch.rand(2, 3, 16, 16)
    with drawing(model, Draw(torch.tensor([1, 2]), 0, 0)):
        assert torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    ("arch", "dropped"),
    [
        ("resnet18", {"blocks", "block"}),  # has its own
        ("wide_resnet", {"blocks", "block"}),
        ("resnet", set()),  # of another family of ours, the recipe says them too
        ("torchvision:resnet18", {"blocks", "block", "base_width", "stem", "activation"}),
    ],
)
def test_a_recipe_that_names_another_network_inherits_what_that_one_can_have(arch: str, dropped: set[str]) -> None:
    fields = ("blocks", "block", "base_width", "stem", "activation", "norm", "pixel_mean", "groups")
    assert {name for name in fields if not ModelConfig.survives(name, arch)} == dropped
    assert not ModelConfig.survives("pretrained", arch)


@pytest.mark.parametrize("arch", ["torchvision:vit_b_16", pytest.param("timm:vit_small_patch16_224", marks=needs_timm)])
def test_attention_of_the_twin_multiplies_no_matrix_image_by_image(arch: str) -> None:
    """A frozen matrix behind a transposed view would be expanded over the batch: a third of a ViT's attack."""
    twin = Twin(network(arch), bn_mode="eval")
    image = images(arch, 3).requires_grad_()
    with torch.profiler.profile() as seen:
        (gradient,) = torch.autograd.grad(twin(image).sum(), image)
    assert gradient.abs().max() > 0
    assert "aten::bmm" not in {event.key for event in seen.key_averages()}
    assert all(parameter.grad is None for parameter in twin.module.parameters())


def narrow() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 16, 1, stride=(2, 1)), nn.ReLU(), nn.Conv2d(16, 16, 1, stride=2), nn.Conv2d(16, 8, 3, stride=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def test_a_narrow_strided_projection_is_ours_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own backward of it corrupts the heap on some CPUs (``SubsampledConv2d``)."""
    monkeypatch.setattr("distributed_at.models.foreign.raw_network", lambda *_, **__: narrow())
    model = build_model(ModelConfig(arch="torchvision:resnet18"), num_classes=10).double().eval()
    kinds = [isinstance(layer, SubsampledConv2d) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert kinds == [True, True, False, False]
    twin, plain = Twin(model, bn_mode="eval"), narrow().double().eval()
    assert twin.folded == 1
    x = torch.rand(2, 3, 17, 15, dtype=torch.float64)
    expected = gradient(plain, x)  # pixels go in as they are: mean 0, deviation 1
    for found in (gradient(model, x), gradient(twin, x)):
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
