"""The moving average of weights against its formula."""

import pytest
import torch
from torch import nn

from distributed_at.config import EmaConfig
from distributed_at.engine.averaging import WeightAverage
from distributed_at.models.norm import BatchNorm


@pytest.mark.parametrize("dynamic", [False, True])
def test_average_follows_its_formula(dynamic):
    module = nn.Linear(3, 2)
    average = WeightAverage(module, EmaConfig(decay=0.9, dynamic=dynamic))
    expected = module.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        decay = min(0.9, (1 + step) / (10 + step)) if dynamic else 0.9
        expected = decay * expected + (1 - decay) * module.weight.detach()
        average.update(step)
    torch.testing.assert_close(average.tensors["weight"], expected)


def test_live_weights_are_not_touched_by_the_average_or_its_copy():
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    before = module.weight.detach().clone()
    average = WeightAverage(module, EmaConfig(decay=0.5))
    average.tensors["weight"].zero_()
    average.copy_into(other)
    assert torch.equal(module.weight, before)
    assert not other.weight.any()


@pytest.mark.parametrize("buffers", ["copy_live", "average"])
def test_statistics_are_averaged_only_where_the_recipe_says_so(buffers):
    layer = BatchNorm(2)
    average = WeightAverage(layer, EmaConfig(decay=0.75, buffers=buffers))
    for step in range(3):
        layer.running_mean += 1.0
        layer.running_var *= 2.0
        layer.num_batches_tracked += 1
        average.update(step)
    names = {"weight", "bias"} | ({"running_mean", "running_var"} if buffers == "average" else set())
    assert set(average.tensors) == names  # never the counter, which is a whole number
    other = BatchNorm(2)
    average.copy_into(other)
    if buffers == "average":  # 0, 1, 2, 3 and 1, 2, 4, 8, each newest one weighing a quarter
        assert other.running_mean.tolist() == [0.25 * 3 + 0.1875 * 2 + 0.140625 * 1] * 2
        assert other.running_var.tolist() == [0.25 * 8 + 0.1875 * 4 + 0.140625 * 2 + 0.421875] * 2
    else:
        assert (other.running_mean.tolist(), other.running_var.tolist()) == ([0.0] * 2, [1.0] * 2)


def test_dynamic_decay_warms_up_and_stops_at_the_recipes():
    average = WeightAverage(nn.Linear(1, 1), EmaConfig(decay=0.5, dynamic=True))
    assert [average.decay_at(t) for t in (0, 1, 7, 8, 9, 1000)] == [0.1, 2 / 11, 8 / 17, 0.5, 0.5, 0.5]
    assert WeightAverage(nn.Linear(1, 1), EmaConfig(decay=0.5)).decay_at(0) == 0.5
