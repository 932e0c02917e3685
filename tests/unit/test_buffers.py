"""BN statistics of a step: the weighted mean over its groups, from the same start, whatever the order."""

import torch
from torch import nn

from distributed_at.engine.buffers import BufferMerger
from distributed_at.engine.processes.world import World
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
        layer(x)
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


def test_the_only_group_of_a_step_is_kept_to_the_bit():
    module, layer = network()
    merger = BufferMerger(module, ALONE)
    layer.running_mean.fill_(1e30)
    merger.begin_step()
    merger.begin_group()
    layer.running_mean.fill_(1.0)  # so small beside the start that a sum of increments would lose it
    merger.end_group(1.0)
    merger.finish_step()
    assert layer.running_mean.tolist() == [1.0] * 3


def test_every_group_starts_from_the_steps_buffers_and_a_bad_step_is_taken_back():
    module, layer = network()
    merger = BufferMerger(module, ALONE)
    layer.running_var.fill_(2.0)
    layer.num_batches_tracked.fill_(7)
    start = {name: value.clone() for name, value in layer.named_buffers()}
    merger.begin_step()
    for _ in range(2):
        merger.begin_group()
        assert all(torch.equal(value, start[name]) for name, value in layer.named_buffers())
        layer(torch.randn(4, 3, 2, 2))
        merger.end_group(0.5)
    merger.restore()
    assert all(torch.equal(value, start[name]) for name, value in layer.named_buffers())
    merger.begin_step()  # nothing of the step that was taken back is left
    merger.begin_group()
    layer.running_mean.fill_(4.0)
    merger.end_group(1.0)
    merger.finish_step()
    assert layer.running_mean.tolist() == [4.0] * 3


def test_a_resumed_group_goes_on_where_it_ended_and_replaces_what_it_was():
    module, layer = network()
    merger = BufferMerger(module, ALONE)
    merger.begin_step()
    for value, weight in ((1.0, 0.25), (5.0, 0.75)):
        merger.begin_group()
        layer.running_mean.fill_(value)
        merger.end_group(weight)
    merger.resume_group(0)
    assert layer.running_mean.tolist() == [1.0] * 3
    layer.running_mean.fill_(9.0)
    merger.update_group(0)
    merger.resume_group(1)
    assert layer.running_mean.tolist() == [5.0] * 3
    merger.finish_step()
    assert layer.running_mean.tolist() == [0.25 * 9 + 0.75 * 5] * 3


def test_groups_of_other_ranks_are_added_to_this_ones(monkeypatch):
    """The other rank's groups made 5.0 of a start of 1.0, at a weight of a quarter; this one has three quarters."""

    def add_the_other(world, total):
        assert world.world_size == 2
        total += 0.25 * torch.tensor(
            [5.0 - 1.0] * 3 + [0.0] * 3 + [0.0], dtype=torch.float64
        )  # means, variances, counts

    monkeypatch.setattr("distributed_at.engine.buffers.sum_over_ranks", add_the_other)
    module, layer = network()
    merger = BufferMerger(module, World(rank=0, world_size=2, local_rank=0, device=torch.device("cpu")))
    layer.running_mean.fill_(1.0)
    merger.begin_step()
    merger.begin_group()
    layer.running_mean.fill_(3.0)
    merger.end_group(0.75)
    merger.finish_step()
    assert layer.running_mean.tolist() == [1.0 + 0.75 * 2 + 0.25 * 4] * 3
    assert layer.running_var.tolist() == [1.0] * 3


def test_a_network_without_batch_norm_has_nothing_to_merge():
    merger = BufferMerger(nn.Linear(2, 2), ALONE)
    merger.begin_step()
    for _ in range(2):
        merger.begin_group()
        merger.end_group(0.5)
    merger.resume_group(1)
    merger.update_group(1)
    merger.restore()
    merger.finish_step()


def test_forwards_after_the_optimiser_step_are_counted_once_too():
    module, layer = network()
    merger, x = BufferMerger(module, ALONE), torch.randn(4, 3, 2, 2)
    merger.begin_step()
    for _ in range(2):
        merger.begin_group()
        layer(x)
        merger.end_group(0.5)
    for index in range(2):
        merger.resume_group(index)
        layer(x)
        merger.update_group(index)
    merger.finish_step()
    assert layer.num_batches_tracked.item() == 2
