"""Weights of a file: out of the wrappings in which codes of the field save them, with the normaliser that came with them.

Known forms: a plain state dict; one under ``state_dict``, ``model``, ``net`` (TRADES, kuangliu), ``model_state_dict``; names
behind ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.``, ``net.``, ``network.`` or the place in a
``Sequential`` behind a normaliser; MadryLab's ``module.model.`` beside ``attacker.`` and ``normalizer.``; RobustBench's
``model.`` beside ``mu`` and ``sigma``. Nothing in a file is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distributed_at.engine.checkpoint.reader import load_without_code
from distributed_at.errors import BadCheckpoint, CheckpointError, ConfigError, first_line

SUFFIXES = (".pt", ".pth", ".safetensors")
ABOUT = "distributed_at"  # key of what a file of ours says of its weights
_NESTINGS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "state")
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.|model\.|net\.|network\.|[0-9]+\.)")
# Names of normalisers, and of copies of the network that a wrapper keeps.
_MEAN = re.compile(r"^(|.*\.)(mu|mean|new_mean|pixel_mean)$")
_STD = re.compile(r"^(|.*\.)(sigma|std|new_std|pixel_std)$")
_COPIES = ("attacker.",)
_OF_MODULES = ("module.", "_orig_mod.")
_CLOSE = 2e-3  # codes write 0.2023, 0.2010 and 0.1994 of means and deviations that differ in their third digit


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """What a file of weights holds.

    Attributes:
        forms: name -> tensor with one more prefix taken off in each; the first as the file has them.
        mean, std: of the normaliser that came with it, in [0, 1] pixel units; None where there is none.
        wrappings: keys and prefixes that were taken off, outermost first.
        about: what a file of ours says of its weights (``describe``).
    """

    forms: tuple[dict[str, torch.Tensor], ...]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    wrappings: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The state dict without what parallel and compiled modules put before its names."""
        form = self.forms[0]
        for following, prefix in zip(self.forms[1:], self.prefixes, strict=True):
            if prefix not in _OF_MODULES:
                break
            form = following
        return form

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes among ``wrappings``."""
        return tuple(wrapping for wrapping in self.wrappings if not wrapping.startswith("["))

    def fitting(self, own: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the form whose names are most of a network's ``own`` ones, which may stand behind ``network.`` there."""
        behind = {"", *({"network."} if all(name.startswith("network.") for name in own) else ())}
        candidates = [
            {prefix + name: tensor for name, tensor in form.items()} for form in self.forms for prefix in sorted(behind)
        ]
        return max(candidates, key=lambda form: len(form.keys() & own.keys()))

    def check_normaliser(self, mean: tuple[float, ...], std: tuple[float, ...], *, source: str) -> None:
        """Refuse weights that expect other pixels than a recipe gives them.

        Raises:
            ConfigError: says what to write instead.
        """
        if self.mean is None or self.std is None:
            return
        own = [value for pair in (self.mean, self.std) for value in _three(pair)]
        theirs = [value for pair in (mean, std) for value in _three(pair)]
        if any(abs(a - b) > _CLOSE for a, b in zip(own, theirs, strict=True)):
            raise ConfigError(
                f"{source} came with a normaliser of mean {_listed(self.mean)} and std {_listed(self.std)}, and the recipe "
                f"normalises by {_listed(mean)} and {_listed(std)}: write model.pixel_mean={_listed(self.mean)} "
                f"model.pixel_std={_listed(self.std)}"
            )


def _three(values: tuple[float, ...]) -> tuple[float, ...]:
    return values * 3 if len(values) == 1 else values


def _listed(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def read_weight_file(path: Path) -> WeightFile:
    """Read a .pt, .pth or .safetensors file.

    Raises:
        ConfigError: a file of another kind.
        CheckpointError: it cannot be read, or holds no state dict of tensors; names what it holds.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: weights files end in {', '.join(SUFFIXES)}")
    about: Any = {}
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
                found: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        else:
            found = load_without_code(path)
            about = found.get(ABOUT, {}) if isinstance(found, Mapping) else {}
    except BadCheckpoint as bad:
        raise CheckpointError(f"cannot read weights {path}: {bad}") from None
    except Exception as error:  # whatever a stranger's file raises
        raise CheckpointError(f"cannot read weights {path}: {first_line(error)}") from None
    try:
        unwrapped = unwrap(found)
    except ValueError as error:
        raise CheckpointError(f"{path} does not hold a state dict of tensors: {error}") from None
    if not isinstance(about, Mapping) or not about:
        return unwrapped
    mean, std = (tuple(map(float, about[key])) if key in about else None for key in ("pixel_mean", "pixel_std"))
    return replace(unwrapped, about=about, mean=mean, std=std)


def unwrap(found: Any) -> WeightFile:
    """Return the state dict inside of what a file held.

    Raises:
        ValueError: there is none; says what was found.
    """
    wrappings: list[str] = []
    while isinstance(found, Mapping) and not _is_state(found):
        key = next((key for key in _NESTINGS if isinstance(found.get(key), Mapping)), None)
        if key is None:
            break
        wrappings.append(f"['{key}']")
        found = found[key]
    if not isinstance(found, Mapping) or not _is_state(found):
        held = f"keys {', '.join(map(repr, list(found)[:6]))}" if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(f"it holds {held}; a state dict may stand under {', '.join(_NESTINGS)}")
    state = {str(name): tensor for name, tensor in found.items()}
    mean = std = None
    forms: list[dict[str, torch.Tensor]] = []
    while True:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_COPIES)}
        for name in [name for name, tensor in state.items() if tensor.numel() in (1, 3) and not _beside(name, state)]:
            if _MEAN.match(name):
                mean = _values(state.pop(name))
            elif _STD.match(name):
                std = _values(state.pop(name))
        forms.append(state)
        prefixes = {match[1] if (match := _PREFIXES.match(name)) else "" for name in state}
        if len(prefixes) != 1 or "" in prefixes:
            return WeightFile(forms=tuple(forms), mean=mean, std=std, wrappings=tuple(wrappings))
        (prefix,) = prefixes
        wrappings.append(prefix)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _is_state(found: Mapping[Any, Any]) -> bool:
    return bool(found) and all(isinstance(value, torch.Tensor) for value in found.values())


def _beside(name: str, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a name stands in a layer of the network, beside its weights, rather than in a normaliser."""
    layer = name.rpartition(".")[0]
    return any(other.rpartition(".")[0] == layer and other.endswith(("weight", "bias")) for other in state if layer)


def _values(tensor: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in tensor.flatten().tolist())


def naming_hint(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return what a refusal adds where two sets of names differ by what they begin with; "" where they do not."""
    unknown = [name for name in theirs if name not in own]
    heads = {name.split(".")[0] for name in unknown}
    if len(heads) != 1 or not own:
        return ""
    (head,) = heads
    fits = sum(name.removeprefix(f"{head}.") in own for name in unknown)
    if 2 * fits >= len(unknown):
        return f" Their names begin with '{head}.', which this network's do not: save them without it."
    return ""
