"""Evaluation of the package's own networks: branches, BN modes and twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distributed_at.config import AttackConfig, DataConfig, ModelConfig, evaluation_entry
from distributed_at.data.sources import open_split
from distributed_at.evaluation import weights_hash
from distributed_at.models import build_model, on_branch
from distributed_at.models.norm import BatchNorm, set_bn_mode
from tests.evaluation_kit import measure

CLEAN = evaluation_entry(kind="clean")


def network(norm: str = "bn") -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(arch="resnet18", stem="cifar", base_width=4, norm=norm), num_classes=10)


@pytest.fixture(scope="module")
def data():
    return open_split(DataConfig(dataset="digits", image_size=8), "test", seed=0)


def test_branches_of_a_mixture_norm_are_evaluated_apart_and_named(data) -> None:
    model = network("mbn")
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("clean.running_mean"):
                buffer.add_(torch.randn_like(buffer))
    ids = data.sample_ids[:24]
    adv, clean = (measure(model, data, CLEAN, ids=ids, branch=branch) for branch in ("adv", "clean"))
    assert (adv.protocol.branch, clean.protocol.branch) == ("adv", "clean")
    assert adv.protocol.hash != clean.protocol.hash
    assert not np.allclose(adv.rows.loss, clean.rows.loss)
    with torch.no_grad(), on_branch(model, "clean"):
        images, labels = data.read(ids, epoch=0, train=False)
        logits = model.eval()(images.float() / 255)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(clean.rows.loss, expected.numpy(), rtol=1e-4)


def test_bn_modes_that_a_trainer_set_are_given_back(data) -> None:
    model = network().train()
    layers = [m for m in model.modules() if isinstance(m, BatchNorm)]
    set_bn_mode(model, "batch")
    layers[0].mode = "eval"
    modes = [layer.mode for layer in layers]
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    attack = AttackConfig(eps=16.0, num_steps=2, step_size=8.0)
    result = measure(model, data, evaluation_entry(kind="pgd", attack=attack), ids=data.sample_ids[:16])
    assert result.total == 16
    assert [layer.mode for layer in layers] == modes
    assert model.training
    assert all(torch.equal(buffers[k], v) for k, v in model.named_buffers())


def test_pixels_and_split_of_the_data_are_in_the_protocol(data) -> None:
    protocol = measure(network(), data, CLEAN, ids=data.sample_ids[:4]).protocol
    assert (protocol.dataset, protocol.split, protocol.num_classes) == ("digits", "test", 10)
    assert '"content"' in protocol.preprocessing
    assert protocol.weights == weights_hash(network())
