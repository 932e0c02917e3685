"""Cuts a traced network at its residual blocks, so that a compiler compiles each distinct block once.

A deep ResNet repeats a handful of blocks. Compiled whole, its compile time grows with its depth; cut here, with the
number of distinct blocks (ResNet-152 has 53 regions of ten kinds, ResNet-638 as many kinds). The cuts follow from the
graph alone, not from names. Which form an attack takes is ``compiled_attack.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

_PLAIN = (bool, int, float, str, bytes, tuple, torch.dtype, torch.device, type(None))


class Region(NamedTuple):
    """A stretch of a network that one tensor enters and one tensor leaves.

    Attributes:
        module: (tensor) -> tensor, over the network's own layers.
        kind: equal for regions that compute the same function of (input, tensors).
        tensors: its parameters and buffers, in an order that regions of one kind share.
    """

    module: fx.GraphModule
    kind: tuple[object, ...]
    tensors: list[torch.Tensor]


def cut(network: fx.GraphModule) -> list[Region]:
    """Return the regions of a network of one input and one output, in the order in which they run.

    A region ends at a tensor that alone is still needed and that several operations read: the input of a residual
    block. A network without such tensors is one region.
    """
    nodes = [node for node in network.graph.nodes if node.op not in ("placeholder", "output")]
    (entry,) = (node for node in network.graph.nodes if node.op == "placeholder")
    (result,) = (node for node in network.graph.nodes if node.op == "output")
    place = {node: index for index, node in enumerate([*nodes, result])}
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in [entry, *nodes]}
    regions: list[Region] = []
    stretch: list[fx.Node] = []
    needed = last_use[entry]  # where the last reader of anything before this node stands
    for index, node in enumerate(nodes):
        stretch.append(node)
        alone = needed <= index
        needed = max(needed, last_use[node])
        if (alone and len(node.users) > 1) or node is nodes[-1]:
            regions.append(_region(network, entry, stretch))
            entry, stretch = node, []
    return regions


def _region(network: fx.GraphModule, entry: fx.Node, stretch: list[fx.Node]) -> Region:
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x")}
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[stretch[-1]])
    module = fx.GraphModule(network, graph)
    return Region(module, _kind(module), [_named(module)[name] for name in _tensor_names(module)])


def _named(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _tensor_names(module: fx.GraphModule) -> list[str]:
    """Return the names of a region's tensors in the order of their first use, each once."""
    names: dict[str, None] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            names[str(node.target)] = None
        elif node.op == "call_module":
            names.update(
                dict.fromkeys(f"{node.target}.{name}" for name in _named(module.get_submodule(str(node.target))))
            )
    return list(names)


def _kind(module: fx.GraphModule) -> tuple[object, ...]:
    """Describe a region's computation without its names and values: two equal descriptions may share compiled code."""
    numbers: dict[fx.Node, int] = {}
    owners: dict[str, int] = {}  # a layer that is called twice is not two layers
    described: list[object] = []
    for node in module.graph.nodes:
        target: object = node.target if node.op in ("call_function", "call_method") else None
        if node.op in ("call_module", "get_attr"):
            target = owners.setdefault(str(node.target), len(owners))
        layer = _layer(module.get_submodule(str(node.target))) if node.op == "call_module" else None
        arguments = fx.map_arg((node.args, node.kwargs), lambda used: ("node", numbers[used]))
        described.append((node.op, target, layer, repr(arguments)))
        numbers[node] = len(numbers)
    tensors = _named(module)
    shapes = [_tensor(tensors[name]) for name in _tensor_names(module)]
    return (*described, *shapes)


def _tensor(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


def _layer(layer: nn.Module) -> tuple[object, ...]:
    """Describe a layer by its class and settings; a setting that is an object of its own is equal to itself alone."""
    return tuple(
        (
            name,
            type(part),
            tuple(
                (key, repr(value) if isinstance(value, _PLAIN) else id(value))
                for key, value in sorted(vars(part).items())
                if not key.startswith("_")
            ),
        )
        for name, part in layer.named_modules()
    )


def count_convolutions(module: nn.Module) -> int:
    """Return how many convolutions a network holds."""
    return sum(isinstance(layer, nn.Conv2d) for layer in module.modules())


def count_distinct_convolutions(regions: list[Region]) -> int:
    """Return how many convolutions the distinct regions hold: what a compiler sees."""
    return sum(count_convolutions(module) for module in {region.kind: region.module for region in regions}.values())


class CompiledRegions:
    """A network run region by region, each kind compiled once at its first call.

    Args:
        network: as ``cut`` takes it; its tensors are read where they are at every call.
        backend: of ``torch.compile``.

    Attributes:
        regions: in the order in which they run.
    """

    def __init__(self, network: fx.GraphModule, *, backend: str | Callable[..., Any] = "inductor") -> None:
        self.regions = cut(network)
        self._backend = backend
        numbers: dict[tuple[object, ...], int] = {}
        self._numbers = [numbers.setdefault(region.kind, len(numbers)) for region in self.regions]
        self._compiled: dict[tuple[object, ...], Callable[..., Any]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the network returns."""
        for number, region in zip(self._numbers, self.regions, strict=True):
            # shapes become constants of the compiled code
            kind = (number, x.shape, x.stride(), x.dtype)
            if kind not in self._compiled:
                self._compiled[kind] = self._compile(region, x)
            x = self._compiled[kind](x, *region.tensors)
        return x

    def _compile(self, region: Region, x: torch.Tensor) -> Callable[..., Any]:
        """Compile a region as a function of (x, *tensors), free of layers: tensors alone are checked at each call."""
        names = _tensor_names(region.module)

        def run(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(region.module, dict(zip(names, tensors, strict=True)), (x,))

        with torch.no_grad():
            function = make_fx(run, pre_dispatch=True)(x.detach(), *region.tensors)
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self._backend)
