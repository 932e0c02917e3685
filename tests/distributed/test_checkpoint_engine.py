"""A training state saved at any ZeRO stage and world size opens at any other, bit for bit, and training goes on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from distributed_at.engine.checkpoint.manager import CheckpointManager
from tests.distributed import checkpoint_worker as worker


def save_after(root, stage, optimizer, steps):
    engine = worker.build(stage, optimizer)
    worker.train(engine, range(steps))
    manager = CheckpointManager(root)
    state = worker.tensors(engine, 0.25)
    result = manager.save(steps, state, {"steps": steps}, asynchronous=True) or manager.close()
    assert result.ok, result.failures
    return worker.digests(state)


def load_and_go_on(root, stage, optimizer, more):
    from distributed_at.engine.checkpoint.state import after_load

    engine = worker.build(stage, optimizer)
    manager = CheckpointManager(root)
    state = worker.tensors(engine, 0.0)
    steps = manager.load(manager.latest_good(), state)["steps"]
    after_load(engine)
    found = worker.digests(worker.tensors(engine, 0.25))
    found.update({k: v for k, v in worker.digests(state).items() if k.startswith("ema.")})
    matches = worker.module_matches(engine, state)
    worker.train(engine, range(steps, steps + more))
    return found, matches, worker.digests(worker.tensors(engine, 0.25))


def in_turn(jobs):
    """Run several jobs in one set of processes, because starting DeepSpeed takes longer than any of them."""
    return {name: function(*args) for name, (function, args) in jobs.items()}


CASES = [
    # optimizer, (stage, world) saved, (stage, world) loaded
    ("sgd", (1, 2), (1, 1)),
    ("sgd", (1, 2), (1, 3)),
    ("sgd", (2, 2), (1, 3)),
    ("sgd", (0, 2), (2, 3)),
    ("sgd", (1, 3), (0, 1)),
    ("sgd", (1, 3), (2, 2)),
    ("adam", (2, 2), (0, 1)),
    ("adam", (0, 2), (1, 3)),
    ("rmsprop", (1, 2), (2, 1)),
    ("plain", (1, 2), (0, 1)),
]
KEYS = {
    "sgd": {"momentum_buffer"},
    "plain": set(),
    "adam": {"exp_avg", "exp_avg_sq", "step"},
    "rmsprop": {"square_avg", "momentum_buffer", "step"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every rank's result of every job: all saves first, by world size, then all loads."""
    root = tmp_path_factory.mktemp("engine")
    saves: dict[int, dict] = {1: {}, 2: {}, 3: {}}
    loads: dict[int, dict] = {1: {}, 2: {}, 3: {}}
    for optimizer, saved, loaded in CASES:
        folder = root / f"{optimizer}-{saved[0]}-{saved[1]}"
        saves[saved[1]][optimizer, saved] = (save_after, (folder, saved[0], optimizer, 3))
        loads[loaded[1]][optimizer, saved, loaded] = (load_and_go_on, (folder, loaded[0], optimizer, 1))
    for optimizer in ("sgd", "adam"):
        saves[2]["straight", optimizer] = (save_after, (root / f"{optimizer}-5", 1, optimizer, 5))
        saves[2]["cut", optimizer] = (save_after, (root / f"{optimizer}-3", 1, optimizer, 3))
        loads[2]["resumed", optimizer] = (load_and_go_on, (root / f"{optimizer}-3", 1, optimizer, 2))
    saves[2]["unstarted"] = (save_after, (root / "unstarted", 1, "adam", 0))
    loads[1]["unstarted"] = (load_and_go_on, (root / "unstarted", 2, "adam", 1))
    saves[2]["attributes"] = (deepspeed_attributes, ())
    saves[2]["links"] = (every_group_is_linked, ())
    found: dict = {}
    for phase, jobs_by_world in (("saves", saves), ("loads", loads)):
        for world, jobs in jobs_by_world.items():
            if jobs:
                by_rank = worker.run(root / f"{phase}-{world}", world, in_turn, jobs)
                found.update({(phase, name): [result[name] for result in by_rank] for name in jobs})
    return found


@pytest.mark.parametrize(("optimizer", "saved", "loaded"), CASES)
def test_state_opens_bit_equal_at_another_stage_and_world_size(results, optimizer, saved, loaded):
    written = results["saves", (optimizer, saved)]
    read = results["loads", (optimizer, saved, loaded)]
    keys = {name.split(".")[1] for name in written[0] if name.startswith("optimizer.")}
    assert keys == KEYS[optimizer]
    for found, matches, later in read:
        assert found == written[0]
        assert matches
        assert later == read[0][2]
        assert later != found


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resumed_training_continues_bitwise_at_the_same_world_size(results, optimizer):
    assert results["loads", ("resumed", optimizer)][0][2] == results["saves", ("straight", optimizer)][0]


def test_a_state_before_the_first_step_is_saved_and_loaded(results):
    assert results["loads", "unstarted"][0][0] == results["saves", "unstarted"][0]


def deepspeed_attributes():
    from distributed_at.engine.checkpoint import state

    engine = worker.build(1, "sgd")
    worker.train(engine, range(1))
    zero = state.zero_optimizer(engine)
    lacking = [name for name in state.ZERO_ATTRIBUTES if not hasattr(zero, name)]
    lacking += [
        name
        for name in ("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state")
        if not hasattr(zero, name)
    ]
    owned = 0
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            mapping = parameter._hp_mapping
            if mapping is not None:
                owned += mapping.hp_fragment.numel()
                lacking += [name for name in state.MAPPING_ATTRIBUTES if not hasattr(mapping, name)]
                assert mapping.hp_fragment.numel() == mapping.hp_fragment_address.numel
    total = [None] * dist.get_world_size()
    dist.all_gather_object(total, owned)
    assert sum(total) == sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    return lacking


def test_the_private_deepspeed_attributes_that_checkpoints_need_are_there(results):
    assert results["saves", "attributes"] == [[], []]


def every_group_is_linked():
    from deepspeed.utils import safe_get_full_optimizer_state

    from distributed_at.engine.checkpoint import state

    engine = worker.build(1, "sgd")
    worker.train(engine, range(1))
    worker.tensors(engine, 0.0)
    state.after_load(engine)
    return [
        float(safe_get_full_optimizer_state(p, "momentum_buffer").abs().sum())
        for p in engine.module.parameters()
        if p.requires_grad
    ]


def test_deepspeed_finds_the_optimiser_state_of_every_parameter_group_after_a_load(results):
    sums = results["saves", "links"]
    assert sums[0] == sums[1]
    assert all(value > 0 for value in sums[0])


def unsupported(dampening):
    from distributed_at.engine.checkpoint.state import training_tensors
    from distributed_at.errors import CheckpointError

    engine = type("Engine", (), {})()
    engine.module = torch.nn.Linear(2, 2)
    if dampening:
        engine.optimizer = torch.optim.SGD(engine.module.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    else:
        engine.optimizer = torch.optim.NAdam(engine.module.parameters(), lr=0.1)
    with pytest.raises(CheckpointError) as caught:
        training_tensors(engine)
    return str(caught.value)


def test_optimisers_that_cannot_be_resumed_exactly_are_refused_by_name():
    assert "dampening is 0.5" in unsupported(True)
    assert "NAdam" in unsupported(False)
