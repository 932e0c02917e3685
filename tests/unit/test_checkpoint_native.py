"""Files in the layout of DeepSpeed's ZeRO 1: the parts of many ranks come together in the order of ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from distributed_at.engine.checkpoint.native import read_native
from distributed_at.errors import CheckpointError

RANKS = 11  # by name, rank 10 stands before rank 2
WEIGHT = torch.arange(44.0).view(4, 11)
MOMENTUM = WEIGHT * 10


def write(folder, ranks=RANKS, claimed=RANKS):
    for rank in range(ranks):
        own = slice(4 * rank, 4 * rank + 4)
        state = {"momentum_buffer": MOMENTUM.view(-1)[own].clone(), "step": torch.tensor(3.0)}
        content = {
            "single_partition_of_fp32_groups": [WEIGHT.view(-1)[own].clone()],
            "partition_count": [claimed],
            "base_optimizer_state": {"param_groups": [{"params": [0]}], "state": {0: state}},
            "param_slice_mappings": [{"conv.weight": SimpleNamespace(start=0, numel=4)}],
        }
        torch.save({"optimizer_state_dict": content}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    model = {
        "param_shapes": [{"conv.weight": torch.Size([4, 11])}],
        "module": {
            "conv.weight": torch.full((4, 11), -1.0),
            "frozen.bias": torch.tensor([5.0, 6.0]),
            "bn.running_mean": torch.tensor([0.5]),
        },
        "buffer_names": ["bn.running_mean"],
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")


def test_parts_of_more_than_ten_ranks_keep_their_order(tmp_path):
    write(tmp_path)
    found = read_native(tmp_path)
    expected = {
        "model.conv.weight": WEIGHT,
        "optimizer.momentum_buffer.conv.weight": MOMENTUM,
        "optimizer.step.conv.weight": torch.tensor(3.0),
        "model.frozen.bias": torch.tensor([5.0, 6.0]),
        "buffer.bn.running_mean": torch.tensor([0.5]),
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_missing_ranks_are_counted(tmp_path):
    write(tmp_path, ranks=RANKS - 1)
    with pytest.raises(CheckpointError, match="written by 11 ranks; 10 files are here"):
        read_native(tmp_path)
    write(tmp_path, ranks=RANKS - 1, claimed=RANKS - 1)
    with pytest.raises(CheckpointError, match="hold only a part of model"):
        read_native(tmp_path)
