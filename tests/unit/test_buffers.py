"""BN statistics of a step: the weighted mean over its groups, from the same start, whatever the order."""

import torch
from torch import nn

from distributed_at.engine.buffers import BufferMerger
from distributed_at.engine.parallel import World
from distributed_at.models.norm import BatchNorm

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def network():
    torch.manual_seed(0)
    layer = BatchNorm(3).train()
    return nn.ModuleList([layer]), layer


def after(layer, merger, groups):
    """Run groups of (images, weight) as one step and return the running mean."""
    merger.begin_step()
    for x, weight in groups:
        merger.begin_group()
        layer(x, "adv")
        merger.end_group(weight)
    merger.finish_step()
    return layer.running_mean.clone()


def test_two_groups_give_the_mean_of_what_each_alone_would_have_given():
    first, second = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2) + 1
    alone = []
    for x in (first, second):
        module, layer = network()
        alone.append(after(layer, BufferMerger(module, ALONE), [(x, 1.0)]))
    module, layer = network()
    merged = after(layer, BufferMerger(module, ALONE), [(first, 0.5), (second, 0.5)])
    torch.testing.assert_close(merged, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-7)


def test_the_order_of_groups_does_not_matter():
    first, second = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2) + 1
    results = []
    for groups in ([(first, 0.25), (second, 0.75)], [(second, 0.75), (first, 0.25)]):
        module, layer = network()
        results.append(after(layer, BufferMerger(module, ALONE), groups))
    assert torch.equal(*results)


def test_a_group_of_weight_zero_leaves_no_trace():
    x, stand_in = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2) + 9
    module, layer = network()
    expected = after(layer, BufferMerger(module, ALONE), [(x, 1.0)])
    module, layer = network()
    found = after(layer, BufferMerger(module, ALONE), [(x, 1.0), (stand_in, 0.0)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_frozen_statistics_stay_bitwise():
    module, layer = network()
    layer.eval()
    layer.running_mean.uniform_()
    before = layer.running_mean.clone()
    assert torch.equal(after(layer, BufferMerger(module, ALONE), [(torch.randn(4, 3, 2, 2), 0.5)] * 2), before)


def test_counters_of_batches_count_the_step_once():
    module, layer = network()
    after(layer, BufferMerger(module, ALONE), [(torch.randn(4, 3, 2, 2), 0.5)] * 2)
    assert layer.num_batches_tracked.item() == 1
