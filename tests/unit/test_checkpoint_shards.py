"""What all ranks hold alike is saved once, by all of them together; what one rank alone holds, by that one."""

import pytest
import torch

from distributed_at.engine.checkpoint.shards import FlatShard


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 128])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (65_536 * 2 - 1,), (65_536, 3), (512, 1024)])
def test_shares_of_all_ranks_are_every_element_once(world_size, shape):
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    shares = [FlatShard.whole(tensor).share("ema.weight", rank, world_size) for rank in range(world_size)]
    held = sorted((s for s in shares if s.local.numel()), key=lambda s: s.start)
    found = torch.cat([s.local for s in held]) if held else torch.zeros(0)
    assert torch.equal(found, tensor.view(-1))
    assert all(s.shape == shape for s in shares)
    assert len(held) <= max(1, tensor.numel() // 65_536), "more containers than the size is worth"


def test_ranks_copy_and_write_alike():
    names = {f"ema.layer{i}.weight": FlatShard.whole(torch.zeros(1000 * (i % 200))) for i in range(600)}
    for world_size in (2, 8):
        totals = [sum(s.share(n, r, world_size).local.numel() for n, s in names.items()) for r in range(world_size)]
        assert max(totals) < 1.2 * sum(totals) / world_size


def test_a_rank_saves_all_of_what_it_alone_holds():
    own = FlatShard(torch.arange(8.0), 0, (8,))
    assert own.share("model.weight", 1, 2) is own
