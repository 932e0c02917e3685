"""Checkpoints can be listed, verified, compared and turned into plain weight files and back."""

from __future__ import annotations

import pytest
import torch

from distributed_at.engine.checkpoint import tools
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.state import state_keys
from distributed_at.errors import CheckpointError, ConfigError


@pytest.fixture
def run(tmp_path):
    """A run folder with two checkpoints that differ in one element of one tensor."""
    torch.manual_seed(0)
    state = {
        "model.net.weight": torch.randn(3, 4),
        "optimizer.momentum_buffer.net.weight": torch.randn(3, 4),
        "ema.net.weight": torch.randn(3, 4),
        "buffer.bn.running_mean": torch.randn(4),
        "buffer.bn.num_batches_tracked": torch.tensor(7),
    }
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    manager.save(1, state, {"epoch": 0.5})
    state["model.net.weight"][1, 2] += 0.25
    manager.save(2, state, {"epoch": 1.0})
    manager.mark_best(1, 0.3)
    return tmp_path / "run", state


def test_list_names_epochs_the_best_and_what_is_wrong(run):
    folder, _ = run
    newest, oldest = tools.checkpoint_ls(folder)
    assert (newest["checkpoint"], newest["epoch"], newest["best"]) == ("step_00000002", 1.0, False)
    assert (oldest["checkpoint"], oldest["epoch"], oldest["best"]) == ("step_00000001", 0.5, True)
    assert [row["state"] for row in tools.checkpoint_verify(folder)] == ["good", "good"]
    path = folder / "checkpoints" / "step_00000002" / "__0_0.distcp"
    raw = bytearray(path.read_bytes())
    raw[500] ^= 255
    path.write_bytes(raw)
    assert [row["state"] for row in tools.checkpoint_ls(folder)] == ["complete", "complete"]
    assert "SHA-256" in tools.checkpoint_verify(folder)[0]["state"]
    assert tools.resolve(folder).name == "step_00000001"
    path.unlink()
    assert tools.checkpoint_ls(folder)[0]["state"] == "__0_0.distcp is missing"


def test_diff_names_the_tensor_and_the_size_of_the_difference(run):
    folder, _ = run
    first, second = (folder / "checkpoints" / f"step_0000000{n}" for n in (1, 2))
    assert all(row["equal"] for row in tools.checkpoint_diff(first, first))
    (found,) = [row for row in tools.checkpoint_diff(first, second) if not row["equal"]]
    assert (found["tensor"], found["different_values"]) == ("model.net.weight", 1)
    assert found["largest_difference"] == pytest.approx(0.25)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_plain_weights_come_out_and_go_back_in_bit_equal(run, tmp_path, suffix, weights):
    folder, state = run
    plain = tools.checkpoint_convert(folder, tmp_path / f"weights{suffix}", average=weights == "ema")
    read = tools.read_weights(plain)
    assert sorted(read) == ["bn.num_batches_tracked", "bn.running_mean", "net.weight"]
    assert torch.equal(read["net.weight"], state[f"{weights}.net.weight"])
    assert read["bn.num_batches_tracked"].shape == ()
    back = tools.checkpoint_convert(plain, tmp_path / "imported")
    tensors, manifest = tools.read_checkpoint(back)
    assert sorted(tensors) == ["buffer.bn.num_batches_tracked", "buffer.bn.running_mean", "model.net.weight"]
    assert manifest.step == 0
    assert all(torch.equal(value, read[name.split(".", 1)[1]]) for name, value in tensors.items())


def test_missing_and_unknown_things_are_named(run, tmp_path):
    folder, _ = run
    with pytest.raises(CheckpointError, match="there is none"):
        tools.resolve(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="Did you mean 'ema'"):
        tools.read_weights(folder, weights="emma")
    (tmp_path / "x.bin").write_text("")
    with pytest.raises(ConfigError, match="end in"):
        tools.read_weights(tmp_path / "x.bin")


def test_an_optimiser_that_is_not_known_is_asked_by_a_step_on_zeros_and_refused_where_it_does_not_begin_so() -> None:
    weight = torch.zeros(3, requires_grad=True)

    def keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        return state_keys(optimizer, optimizer.param_groups[0], [{}])

    assert keys(torch.optim.RAdam([weight])) == ("exp_avg", "exp_avg_sq", "step")
    assert keys(torch.optim.Adagrad([weight])) == ("step", "sum")
    for other in (torch.optim.NAdam([weight]), torch.optim.Rprop([weight])):  # begin with a one; with step sizes
        with pytest.raises(CheckpointError, match="not zero before its first step"):
            keys(other)
