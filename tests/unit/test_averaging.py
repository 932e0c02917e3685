"""The moving average of weights against its formula."""

import pytest
import torch
from torch import nn

from distributed_at.config import EmaConfig
from distributed_at.engine.averaging import WeightAverage


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
