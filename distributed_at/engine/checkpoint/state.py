"""Turns a DeepSpeed engine (ZeRO 0, 1, 2) or a plain module with its optimiser into named fragments, and back.

Names and shapes are those of parameters, never of DeepSpeed's flat partitions, so a state saved at any stage and world
size opens at any other. This is the one place that touches DeepSpeed's private attributes; a test guards each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distributed_at.engine.checkpoint.shards import FlatShard
from distributed_at.errors import CheckpointError, did_you_mean

MODEL, OPTIMIZER, EMA, BUFFER, OBJECTIVE = "model.", "optimizer.", "ema.", "buffer.", "objective."
NETWORK = "network."  # of an objective's own tensors: those of its other networks

# Optimisers whose state before the first step equals zeros: class -> keys of a group's state, "step" a scalar.
_ZERO_START = {
    "SGD": lambda g: ("momentum_buffer",) if g["momentum"] else (),
    "FusedSGD": lambda g: ("momentum_buffer",) if g["momentum"] else (),
    "Adam": lambda g: ("exp_avg", "exp_avg_sq", "step", *(("max_exp_avg_sq",) if g.get("amsgrad") else ())),
    "AdamW": lambda g: ("exp_avg", "exp_avg_sq", "step", *(("max_exp_avg_sq",) if g.get("amsgrad") else ())),
    "RMSprop": lambda g: (
        "square_avg",
        "step",
        *(("momentum_buffer",) if g["momentum"] else ()),
        *(("grad_avg",) if g["centered"] else ()),
    ),
    "TensorFlowRMSprop": lambda g: ("square_less_one", "momentum_buffer"),
}

# What this module needs of DeepSpeed's ZeRO 1/2 optimiser and of its parameters; see the tripwire test.
ZERO_ATTRIBUTES = ("single_partition_of_fp32_groups", "bit16_groups", "optimizer", "update_lp_params")
MAPPING_ATTRIBUTES = ("hp_fragment", "hp_fragment_address", "lp_fragment_address")


@dataclass(frozen=True)
class _Fragment:
    """This rank's part of one parameter: its weights, and the optimiser's state tensors of the same extent."""

    name: str
    weights: torch.Tensor  # (n,), aliases
    start: int
    shape: tuple[int, ...]
    states: dict[str, torch.Tensor]  # key -> (n,), aliases


def training_tensors(
    engine: Any,
    ema: Mapping[str, torch.Tensor] | None = None,
    buffers: Mapping[str, torch.Tensor] | None = None,
    objective: Mapping[str, FlatShard] | None = None,
) -> dict[str, FlatShard]:
    """Return the whole training state by name: weights, optimiser state, averaged weights, buffers, the objective's own.

    ``engine``: DeepSpeed's, or anything with ``module`` and ``optimizer``. ``ema`` and ``buffers``: name -> tensor, equal
    on all ranks at a step boundary. ``objective``: see ``shard_places`` and ``whole_networks``. The fragments alias live storage wherever they can: saving reads and loading writes
    the training state itself. Call it afresh for each save and load, on all ranks; after a load call ``after_load``.
    Optimiser state that does not exist before the first step is created as zeros, which is what the first step assumes.
    """
    tensors: dict[str, FlatShard] = {}
    zero = zero_optimizer(engine)
    covered: set[str] = set()
    if zero is not None:
        tensors.update(_zero_tensors(engine, zero, covered))
    elif getattr(engine, "optimizer", None) is not None:
        tensors.update(_plain_tensors(engine, covered))
    for name, parameter in engine.module.named_parameters():
        if name not in covered:  # frozen, or unknown to the optimiser: equal on all ranks
            tensors[MODEL + name] = FlatShard.whole(parameter)
    for prefix, named in ((EMA, ema), (BUFFER, buffers)):
        for name, tensor in (named or {}).items():
            tensors[prefix + name] = FlatShard.whole(tensor)
    for name, shard in (objective or {}).items():
        tensors[OBJECTIVE + name] = shard
    return tensors


def shard_places(tensors: Mapping[str, torch.Tensor], *, rank: int, world_size: int) -> dict[str, FlatShard]:
    """Return tensors (B / W, ...) with a row for each place of this rank's share as fragments of (B, ...) ones.

    Raises:
        ValueError: a tensor is not contiguous, so that a load could not write into it.
    """
    shards = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        whole = (tensor.shape[0] * world_size, *tensor.shape[1:])
        shards[name] = FlatShard(tensor.detach().view(-1), rank * tensor.numel(), whole)
    return shards


def whole_networks(networks: Mapping[str, torch.nn.Module]) -> dict[str, FlatShard]:
    """Return an objective's own networks, weights and statistics, as tensors that are equal on all ranks."""
    return {
        f"{NETWORK}{name}.{key}": FlatShard.whole(tensor)
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }


def after_load(engine: Any) -> None:
    """Carry loaded fp32 weights into the network on every rank (an all-gather under ZeRO); call it on all ranks."""
    zero = zero_optimizer(engine)
    if zero is None:
        return
    zero.update_lp_params()
    # DeepSpeed links optimiser state to parameters once, after the first parameter group's first step, and so never for
    # the other groups. Unlinking here makes it do so anew with the state that now exists for every group.
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def zero_optimizer(engine: Any) -> Any | None:
    """Return DeepSpeed's ZeRO 1/2 optimiser, or None where the optimiser is a plain one; refuses everything else."""
    optimizer = getattr(engine, "optimizer", None)
    if optimizer is None or type(optimizer).__module__.split(".")[0] != "deepspeed":
        return None
    missing = [name for name in ZERO_ATTRIBUTES if not hasattr(optimizer, name)]
    if missing:
        raise CheckpointError(
            f"cannot save the state of {type(optimizer).__name__}: parallel.zero_stage 0, 1 and 2 with fp32 weights are "
            f"supported (it lacks {', '.join(missing)})"
        )
    return optimizer


def state_keys(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], states: list[dict[str, Any]]
) -> tuple[str, ...]:
    """Keys of the optimiser's state for one parameter group: from its class, or from the state that it already has."""
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _ZERO_START:
            if group.get("dampening"):
                raise CheckpointError(
                    f"optimizer dampening is {group['dampening']}; its first step differs from later ones, so only 0 can "
                    "be saved and resumed exactly"
                )
            return tuple(_ZERO_START[cls.__name__](group))
    live = [tuple(sorted(k for k, v in s.items() if v is not None)) for s in states]
    if live and live[0] and all(keys == live[0] for keys in live):
        return live[0]
    found = _keys_of_a_first_step(optimizer, group)
    if found is None:
        raise CheckpointError(
            f"optimizer {type(optimizer).__name__} keeps something that is not zero before its first step, so a run could "
            f"not be resumed exactly; known ones: {', '.join(sorted(_ZERO_START))}."
            f"{did_you_mean(type(optimizer).__name__, _ZERO_START)}"
        )
    return found


def _keys_of_a_first_step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[str, ...] | None:
    """Ask an optimiser that is not known here what it keeps, by a step of its own class on zeros; None = not only zeros."""
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.zeros(2)
    try:
        another = type(optimizer)([weight], **{key: group[key] for key in optimizer.defaults if key in group})
        another.step()
    except Exception:  # whatever a user's class does not allow
        return None
    kept = {key: value for key, value in another.state[weight].items() if value is not None}
    zeros = all(
        key == "step" or (isinstance(value, torch.Tensor) and value.shape == weight.shape and not value.any())
        for key, value in kept.items()
    )
    return tuple(sorted(kept)) if zeros else None


def _materialise(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, keys: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """Return the optimiser's state of ``parameter``, creating as zeros what the first step would create."""
    state = optimizer.state[parameter]
    for key in keys:
        if state.get(key) is None:
            if key == "step":
                fused = any(g.get("capturable") or g.get("fused") for g in optimizer.param_groups)
                state[key] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
            else:
                state[key] = torch.zeros_like(parameter, requires_grad=False)
        elif not isinstance(state[key], torch.Tensor):
            state[key] = torch.tensor(float(state[key]))
    return {key: state[key] for key in keys}


def _plain_tensors(engine: Any, covered: set[str]) -> Iterator[tuple[str, FlatShard]]:
    """Stage 0 or no DeepSpeed: every rank holds everything and saves its share."""
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for group in optimizer.param_groups:
        keys = state_keys(optimizer, group, [optimizer.state[p] for p in group["params"]])
        for parameter in group["params"]:
            name = names.get(parameter)
            if name is None:
                raise CheckpointError("the optimizer holds a parameter that is not one of the network's")
            covered.add(name)
            yield MODEL + name, FlatShard.whole(parameter)
            for key, value in _materialise(optimizer, parameter, keys).items():
                yield f"{OPTIMIZER}{key}.{name}", FlatShard.whole(value)


def _zero_tensors(engine: Any, zero: Any, covered: set[str]) -> Iterator[tuple[str, FlatShard]]:
    """Stages 1 and 2: this rank's part of each parameter, read straight from its flat partitions.

    DeepSpeed's own per-parameter links to optimiser state are not used: it sets them after the first parameter group's
    first step and never for the other groups.
    """
    inner: torch.optim.Optimizer = zero.optimizer
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        keys = state_keys(inner, inner.param_groups[index], [inner.state[flat]])
        state = _materialise(inner, flat, keys)
        vectors = {k: v for k, v in state.items() if v.shape == flat.shape}
        scalars = {k: v for k, v in state.items() if v.ndim == 0}
        if odd := sorted(state.keys() - vectors.keys() - scalars.keys()):
            raise CheckpointError(
                f"optimizer state {odd} is neither a value per weight nor one number; it cannot be saved"
            )
        members = zero.bit16_groups[index]
        copies = {key: torch.empty(len(members), dtype=value.dtype) for key, value in scalars.items()}
        for place, parameter in enumerate(members):
            name, shape = names[parameter], tuple(parameter.shape)
            covered.add(name)
            part = _fragment(name, parameter, flat, vectors)
            yield MODEL + name, FlatShard(part.weights, part.start, shape)
            for key, values in part.states.items():
                yield f"{OPTIMIZER}{key}.{name}", FlatShard(values, part.start, shape)
            for key, value in scalars.items():
                copies[key][place] = value
                last = place == len(members) - 1
                merge = _merge_into(value, copies[key]) if last else None
                yield (
                    f"{OPTIMIZER}{key}.{name}",
                    FlatShard(copies[key][place : place + 1], 0, (), merge, replicated=True),
                )


def _merge_into(value: torch.Tensor, copies: torch.Tensor) -> Any:
    """After loading: one number for the whole group, the largest (a parameter that never had a gradient has fewer)."""

    def merge() -> None:
        value.fill_(copies.max())

    return merge


def _fragment(name: str, parameter: torch.Tensor, flat: torch.Tensor, vectors: dict[str, torch.Tensor]) -> _Fragment:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    shape = tuple(parameter.shape)
    if mapping is None:  # another rank's
        nothing = {key: value[:0] for key, value in vectors.items()}
        return _Fragment(name, flat.detach()[:0], 0, shape, nothing)
    offset, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
    weights = flat.detach().narrow(0, offset, count)
    states = {key: value.narrow(0, offset, count) for key, value in vectors.items()}
    return _Fragment(name, weights, mapping.lp_fragment_address.start, shape, states)
