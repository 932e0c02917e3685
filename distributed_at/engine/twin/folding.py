"""Rewrites a network into what an attack runs: frozen batch norm inside the convolutions, one dtype, channels-last.

It traces the network (torch.fx, norm layers whole) to see which norm follows which convolution directly; nothing is
guessed from names. Keeping the rewritten weights equal to the live ones is ``Sources.refresh``; training is not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from distributed_at import ops
from distributed_at.models.base import PixelNormalisation, SubsampledConv2d
from distributed_at.models.branches import BranchedNorm
from distributed_at.models.norm import BatchNorm, GroupNorm

_NORMS = (BatchNorm, BranchedNorm, GroupNorm)


class _Images(nn.Module):
    """A network as a function of the images alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


class _Tracer(fx.Tracer):
    """Sees through blocks, but takes norm layers and the pixel normalisation whole: their inside depends on a mode."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_NORMS, PixelNormalisation, SubsampledConv2d)) or super().is_leaf_module(
            m, module_qualified_name
        )


class GroupNormReLU(nn.Module):
    """Group norm, with the ReLU behind it where there is one, in one pass (``ops.group_norm_relu``)."""

    def __init__(self, norm: nn.GroupNorm, *, relu: bool) -> None:
        super().__init__()
        self.num_groups, self.eps, self.relu = norm.num_groups, norm.eps, relu
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.group_norm_relu(x, self.num_groups, self.weight, self.bias, eps=self.eps, relu=self.relu)


@dataclass
class Sources:
    """Where the rewritten network's own weights come from.

    Attributes:
        folded: (convolution, its norm, the rewritten convolution); the first two hold the live tensors.
        copied: (live parameter, its copy in another dtype or memory format).
    """

    folded: list[tuple[nn.Conv2d, BatchNorm, nn.Conv2d]] = field(default_factory=list)
    copied: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the live weights and statistics into the rewritten network, in place, by multi-tensor operations.

        W' = W * gamma / sqrt(var + eps) and b' = beta - (mean - b) * gamma / sqrt(var + eps), computed in the live
        dtype and rounded once.
        """
        from_, to = [a for a, _ in self.copied], [b for _, b in self.copied]
        if self.folded:
            convs, norms, targets = zip(*self.folded, strict=True)
            deviations = torch._foreach_add([n.running_var for n in norms], [n.eps for n in norms])
            torch._foreach_sqrt_(deviations)
            scales = torch._foreach_div([n.weight for n in norms], deviations)
            means = [
                n.running_mean if c.bias is None else n.running_mean - c.bias for c, n in zip(convs, norms, strict=True)
            ]
            shifts = torch._foreach_mul(means, scales)
            shifts = torch._foreach_sub([n.bias for n in norms], shifts)
            columns = [s.view(-1, 1, 1, 1) for s in scales]
            from_ += [*torch._foreach_mul([c.weight for c in convs], columns), *shifts]
            to += [*(t.weight for t in targets), *(t.bias for t in targets)]
        if to:
            torch._foreach_copy_(to, from_)


def rewrite(
    network: nn.Module, *, branch: str, fold: bool, dtype: torch.dtype | None, channels_last: bool, group_norm: bool
) -> tuple[fx.GraphModule, Sources]:
    """Return ``network`` on ``branch`` as a graph that maps images to logits, and the sources of its weights.

    Args:
        network: in eval mode, its norm layers in the mode of the attack; its tensors are used, not changed.
        branch: 'adv' or 'clean'; of a mixture batch norm only this side remains.
        fold: put batch norms that stand directly behind a convolution into it; they must be in mode 'eval'. One that
            stands before its convolution stays: zero padding comes after it, so folding would change the borders.
        dtype: bfloat16 or float16 for weights and activations; batch norm that stays keeps its own dtype. Logits are
            float32. None = as the network is.
        channels_last: lay weights and activations out channels-last.
        group_norm: run group norm and a ReLU behind it as one operation.

    Raises:
        Exception: the network's control flow depends on its input, so that it cannot be traced.
    """
    root = _Images(network)
    graph = _Tracer().trace(root)
    module = fx.GraphModule(root, graph)
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(norm := module.get_submodule(node.target), BranchedNorm):
            module.set_submodule(node.target, norm.serving(branch))
    sources = Sources()
    if fold:
        for conv, behind in _foldable(module):
            sources.folded.append(_fold(module, conv, behind, dtype, channels_last))
    if group_norm:
        _fuse_group_norms(module)
    ours = {id(target) for _, _, target in sources.folded}
    for layer in module.modules():
        if id(layer) not in ours and not isinstance(layer, BatchNorm | PixelNormalisation):
            sources.copied += _own_parameters(layer, dtype, channels_last)
    _convert_input(module, dtype, channels_last)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    graph.lint()
    module.recompile()
    sources.refresh()
    return module, sources


def _calls(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Return, per submodule name, the nodes that call it."""
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _foldable(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Return (convolution, batch norm) where the norm alone reads the convolution and both are called once."""
    found = []
    calls = _calls(module)
    for nodes in calls.values():
        norm = nodes[0]
        conv = norm.args[0] if norm.args else None
        if not isinstance(module.get_submodule(str(norm.target)), BatchNorm) or not isinstance(conv, fx.Node):
            continue
        if conv.op != "call_module" or not isinstance(module.get_submodule(str(conv.target)), nn.Conv2d):
            continue
        if len(nodes) == 1 and len(calls[str(conv.target)]) == 1 and len(conv.users) == 1:
            found.append((conv, norm))
    return found


def _empty_like(weight: torch.Tensor, dtype: torch.dtype | None, channels_last: bool) -> nn.Parameter:
    layout = torch.channels_last if channels_last and weight.dim() == 4 else torch.contiguous_format
    empty = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.device, memory_format=layout)
    return nn.Parameter(empty, requires_grad=False)


def _fold(
    module: fx.GraphModule, conv: fx.Node, norm: fx.Node, dtype: torch.dtype | None, channels_last: bool
) -> tuple[nn.Conv2d, BatchNorm, nn.Conv2d]:
    """Put a new convolution with a bias where conv and norm were; its weights are still unwritten."""
    live, layer = module.get_submodule(str(conv.target)), module.get_submodule(str(norm.target))
    assert isinstance(live, nn.Conv2d)
    assert isinstance(layer, BatchNorm)
    if layer.mode != "eval":
        raise ValueError(f"batch norm {norm.target} is in mode {layer.mode!r}; only frozen statistics can be folded")
    form = SubsampledConv2d if isinstance(live, SubsampledConv2d) else nn.Conv2d
    folded = form(
        live.in_channels, live.out_channels, live.kernel_size, live.stride, live.padding, live.dilation,  # type: ignore[arg-type]
        live.groups, True, live.padding_mode, device="meta",
    )  # fmt: skip
    folded.weight = _empty_like(live.weight, dtype, channels_last)
    folded.bias = _empty_like(layer.bias, dtype, channels_last)
    module.set_submodule(str(conv.target), folded.eval())
    norm.replace_all_uses_with(conv)
    module.graph.erase_node(norm)
    return live, layer, folded


def _fuse_group_norms(module: fx.GraphModule) -> None:
    for name, nodes in _calls(module).items():
        norm = module.get_submodule(name)
        if not isinstance(norm, GroupNorm) or len(nodes) != 1:
            continue
        node = nodes[0]
        (reader,) = node.users if len(node.users) == 1 else (None,)
        relu = reader is not None and reader.op == "call_module"
        relu = relu and isinstance(module.get_submodule(str(reader.target)), nn.ReLU)  # type: ignore[union-attr]
        module.set_submodule(name, GroupNormReLU(norm, relu=relu).eval())
        node.args, node.kwargs = node.args[:1], {}
        if relu:
            assert reader is not None
            reader.replace_all_uses_with(node)
            module.graph.erase_node(reader)


def _own_parameters(
    layer: nn.Module, dtype: torch.dtype | None, channels_last: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give ``layer`` its own copies of the tensors whose dtype or layout differs from what the attack wants."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, live in list(layer.named_parameters(recurse=False)):
        moved = channels_last and live.dim() == 4 and not live.is_contiguous(memory_format=torch.channels_last)
        if moved or (dtype is not None and live.dtype != dtype):
            copy = _empty_like(live, dtype, channels_last)
            setattr(layer, name, copy)
            pairs.append((live.detach(), copy))
    for name, held in list(layer.named_buffers(recurse=False)):  # such as a window's mask, added to activations
        if dtype is not None and held.is_floating_point() and held.dtype != dtype:
            layer.register_buffer(name, held.to(dtype), persistent=False)
            pairs.append((held, layer.get_buffer(name)))
    return pairs


def network_input(x: torch.Tensor, dtype: torch.dtype | None, channels_last: bool) -> torch.Tensor:
    """Return normalised pixels (N, C, H, W) in the attack's dtype and memory format; no copy where they are so."""
    if channels_last:
        return x.to(dtype or x.dtype, memory_format=torch.channels_last)
    return x.to(dtype or x.dtype)


def _convert_input(module: fx.GraphModule, dtype: torch.dtype | None, channels_last: bool) -> None:
    """Insert the conversion behind the pixel normalisation (behind the input, without one) and float32 logits."""
    graph = module.graph
    entry = next(node for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), PixelNormalisation):
            entry = node
    with graph.inserting_after(entry):
        converted = graph.call_function(network_input, (entry, dtype, channels_last))
    entry.replace_all_uses_with(converted, delete_user_cb=lambda user: user is not converted)
    if dtype is not None:
        (output,) = (node for node in graph.nodes if node.op == "output")
        with graph.inserting_before(output):
            output.args = (graph.call_method("float", (output.args[0],)),)
