"""Optimisers as a recipe names them; NVIDIA apex's, through a stand-in with its signature, and the package that has its name."""

import importlib.machinery
import sys
import types

import pytest
import torch

from distributed_at.config import OptimizerConfig
from distributed_at.engine.optimizers import build_optimizer
from distributed_at.errors import ConfigError


class FusedSGD(torch.optim.SGD):
    """The signature of NVIDIA apex's ``apex.optimizers.FusedSGD``; like it, it takes no momentum by position alone."""

    def __init__(
        self,
        params,
        lr,
        momentum=0.0,
        dampening=0.0,
        weight_decay=0.0,
        nesterov=False,
        wd_after_momentum=False,
        materialize_master_grads=True,
        set_grad_none=False,
    ):
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        assert not wd_after_momentum, "weight decay is added to the gradient, before the momentum"
        assert materialize_master_grads
        assert not set_grad_none
        super().__init__(
            params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov
        )


@pytest.fixture
def nvidia_apex(monkeypatch):
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    package.__spec__ = importlib.machinery.ModuleSpec("apex", None)
    optimizers.FusedSGD = FusedSGD
    package.optimizers = optimizers
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def _network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    )


def _config(backend, **options):
    values = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2} | options
    return OptimizerConfig(backend=backend, weight_decay_rule="kernels", **values)


def _trained(backend, steps=4):
    network = _network()
    optimizer = build_optimizer(_config(backend), network, lr=0.05)
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.05 / (step + 1)  # as schedules.py does
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
    return optimizer, network.state_dict()


def test_apex_is_built_from_the_recipe_and_steps_like_torch(nvidia_apex):
    optimizer, weights = _trained("apex")
    assert type(optimizer) is FusedSGD
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]  # kernels, and the rest
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    assert all(group["nesterov"] for group in optimizer.param_groups)
    expected_optimizer, expected = _trained("torch")
    assert type(expected_optimizer) is torch.optim.SGD
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_absent_apex_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ConfigError, match=r"needs NVIDIA apex built from source.*or write optimizer\.backend: torch"):
        build_optimizer(_config("apex"), _network(), lr=0.1)


def test_the_other_package_named_apex_is_named_in_the_error(monkeypatch, tmp_path):
    """The one on the Python package index, for the web framework Pyramid, which is rarely installed beside it."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("import pyramid_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("apex", "apex.optimizers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError) as caught:
        build_optimizer(_config("apex"), _network(), lr=0.1)
    sys.modules.pop("apex", None)
    message = str(caught.value)
    assert str(tmp_path / "apex" / "__init__.py") in message
    assert "is not NVIDIA apex: the package of that name on the Python index is unrelated" in message
    assert "pip uninstall apex" in message


def test_apex_offers_sgd_alone():
    with pytest.raises(ValueError, match="backend apex offers sgd, got adam"):
        _config("apex", name="adam", nesterov=False)


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"name": "sgd", "momentum": 0.8, "nesterov": False}, torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
        ({"name": "sgd", "momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"nesterov": True, "dampening": 0}),
        (
            {"name": "rmsprop", "momentum": 0.7, "rmsprop_decay": 0.95, "eps": 1e-3, "nesterov": False},
            torch.optim.RMSprop,
            {"momentum": 0.7, "alpha": 0.95, "eps": 1e-3, "centered": False},
        ),
        ({"name": "adam", "eps": 1e-4, "nesterov": False}, torch.optim.Adam, {"eps": 1e-4, "betas": (0.9, 0.999)}),
        ({"name": "adamw", "eps": 1e-4, "nesterov": False}, torch.optim.AdamW, {"eps": 1e-4, "betas": (0.9, 0.999)}),
    ],
    ids=str,
)
def test_every_optimiser_gets_the_recipes_numbers_and_decay_where_the_rule_says(options, kind, expected):
    network = _network()
    network[0].bias.requires_grad_(False)
    optimizer = build_optimizer(_config("torch", **options), network, lr=0.03)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group["lr"] == 0.03
        assert {name: group[name] for name in expected} == expected
    names = {id(p): name for name, p in network.named_parameters()}
    groups = {g["weight_decay"]: [names[id(p)] for p in g["params"]] for g in optimizer.param_groups}
    assert groups == {1e-2: ["0.weight", "3.weight"], 0.0: ["1.weight", "1.bias", "3.bias"]}  # the frozen bias in none


def test_weight_decay_is_added_to_the_gradient_for_all_but_adamw():
    for name, coupled in (("sgd", True), ("rmsprop", True), ("adam", True), ("adamw", False)):
        layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(layer.weight, 2.0)
        options = {"name": name, "nesterov": False, "momentum": 0.0, "weight_decay": 0.5}
        options |= {} if name == "sgd" else {"eps": 1e-12}
        options |= {"momentum": 0.9} if name.startswith("adam") else {}  # which they do not read
        optimizer = build_optimizer(_config("torch", **options), layer, lr=0.1)
        layer.weight.grad = torch.zeros(1, 1)
        optimizer.step()
        scale = {"sgd": 1.0, "rmsprop": 1.0 / (1 - optimizer.defaults.get("alpha", 0)) ** 0.5, "adam": 1.0}
        moved = 2.0 - layer.weight.item()
        gradient = 0.5 * 2.0  # the decay alone; adaptive ones divide it by its own size
        assert moved == pytest.approx(0.1 * (gradient * scale[name] if coupled else 0.5 * 2.0), rel=1e-5)


def test_a_network_without_anything_to_train_is_refused():
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        build_optimizer(_config("torch"), _network().requires_grad_(False), lr=0.1)


def test_a_network_whose_parameters_are_all_of_one_kind_has_one_group():
    layer = torch.nn.Linear(2, 2, bias=False)
    assert len(build_optimizer(_config("torch"), layer, lr=0.1).param_groups) == 1
