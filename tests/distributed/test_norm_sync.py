"""Synchronised batch norm over gloo ranks equals one process that holds the union of their samples."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from distributed_at.config import ModelConfig
from distributed_at.models import BatchNorm, bn_buffers, build_model, set_bn_mode, set_group_size, set_process_group
from tests.distributed.launch import run_ranks

COUNT = 6
UNEVEN = (4, 2)
EMPTY = (6, 0)


def union() -> torch.Tensor:
    return torch.randn(COUNT, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 1


def layer_of(mode: str) -> BatchNorm:
    layer = BatchNorm(4, momentum=0.3).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(4, generator=generator) + 0.5)
    set_bn_mode(layer, mode)
    return layer


def loss_of(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # different for every sample, so that the statistics' own gradient does not vanish
    return (out.pow(3) * (x.detach() + 0.3)).sum()


def initialise() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def run_layer(sizes: tuple[int, ...], mode: str, transform: bool) -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    layer = layer_of(mode)
    set_process_group(layer, dist.group.WORLD)
    x = union().split(list(sizes))[rank].clone().requires_grad_()
    if transform:
        grad = torch.func.grad(lambda z: loss_of(layer(z), x))(x.detach())
        return {"grad": grad, **layer.state_dict()}
    out = layer(x)
    loss_of(out, x).backward()
    return {
        "out": out.detach(),
        "grad": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        **layer.state_dict(),
    }


CASES = [(sizes, mode, False) for sizes in ((3, 3), UNEVEN, EMPTY) for mode in ("train", "batch")]
CASES.append((UNEVEN, "train", True))


def run_cases() -> list[dict[str, torch.Tensor]]:
    initialise()
    return [run_layer(*case) for case in CASES]


@pytest.fixture(scope="module")
def by_case() -> dict[tuple, list[dict[str, torch.Tensor]]]:
    """The results of both ranks for every case, from one start of two processes."""
    first, second = run_ranks(run_cases, 2)
    return {case: [a, b] for case, a, b in zip(CASES, first, second, strict=True)}


@pytest.mark.parametrize("sizes", [(3, 3), UNEVEN, EMPTY])
@pytest.mark.parametrize("mode", ["train", "batch"])
def test_two_ranks_equal_one_process_on_the_union(by_case: dict, sizes: tuple[int, ...], mode: str) -> None:
    reference = layer_of(mode)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    x = union().requires_grad_()
    out = reference(x)
    loss_of(out, x).backward()
    ranks = by_case[sizes, mode, False]
    torch.testing.assert_close(torch.cat([r["out"] for r in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([r["grad"] for r in ranks]), x.grad)
    torch.testing.assert_close(sum(r["grad_weight"] for r in ranks), reference.weight.grad)
    torch.testing.assert_close(sum(r["grad_bias"] for r in ranks), reference.bias.grad)
    for name, tensor in reference.state_dict().items():
        for result in ranks:
            torch.testing.assert_close(result[name], tensor)
            assert torch.equal(result[name], ranks[0][name]), f"ranks disagree on {name}"
            if mode == "batch":
                assert torch.equal(result[name], before[name]), f"{name} moved in batch mode"


def test_synchronised_statistics_work_under_a_function_transform(by_case: dict) -> None:
    reference = layer_of("train")
    x = union().requires_grad_()
    loss_of(reference(x), x).backward()
    ranks = by_case[UNEVEN, "train", True]
    torch.testing.assert_close(torch.cat([r["grad"] for r in ranks]), x.grad)
    for result in ranks:
        torch.testing.assert_close(result["running_var"], reference.running_var)
        assert result["num_batches_tracked"] == 1


def network(norm: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(
        arch="resnet",
        blocks=(1, 1),
        block="basic",
        base_width=4,
        stem="cifar",
        norm=norm,
        activation_checkpointing=True,
    )
    return build_model(config, num_classes=3).double()


def pictures() -> torch.Tensor:
    return torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def train_network(norm: str, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    rank = dist.get_rank()
    model = network(norm)
    set_process_group(model, group)
    duplicate = copy.deepcopy(model)  # what the attack makes of a live network
    x = pictures()[2 * rank : 2 * rank + 2]
    assert torch.equal(duplicate(x), copy.deepcopy(model)(x))
    torch.nn.functional.cross_entropy(model(x), torch.arange(2) % 3, reduction="sum").backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grad in grads.values():
        dist.all_reduce(grad)
    return {**grads, **bn_buffers(model)}


def train_networks() -> dict[str, dict[str, torch.Tensor]]:
    rank = initialise()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {norm: train_network(norm, groups[rank // 2]) for norm in ("bn", "mbn")}


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, dict[str, torch.Tensor]]]:
    """What four ranks in two groups made of the networks."""
    return run_ranks(train_networks, 4)


@pytest.mark.parametrize("norm", ["bn", "mbn"])
def test_groups_that_span_ranks_equal_groups_cut_from_one_batch(four_ranks: list, norm: str) -> None:
    ranks = [result[norm] for result in four_ranks]
    reference = network(norm)
    set_group_size(reference, 4)
    labels = (torch.arange(8) % 2) % 3
    torch.nn.functional.cross_entropy(reference(pictures()), labels, reduction="sum").backward()
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ranks[0][name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in bn_buffers(reference).items():
        merged = (ranks[0][name] + ranks[2][name]) / 2
        torch.testing.assert_close(merged.to(buffer.dtype), buffer)
        assert torch.equal(ranks[0][name], ranks[1][name])
