"""What an evaluation measured, as a frozen record with a hash: two numbers are comparable exactly when hashes agree.

Here stands what every evaluation depends on; what belongs to one kind stands in its file in ``kinds/``, as a subclass.
The hash leaves out what stands at its default. So a field that is added later, with a default that means what was done
before, changes no hash that exists; and a default, once released, never changes. How the work is spread (batch size,
world size, devices) is no part of a protocol. The record only holds; running it is ``runner.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from distributed_at.catalogue.attacks import UNTARGETED
from distributed_at.catalogue.evaluations import KINDS
from distributed_at.lazy import torch

if TYPE_CHECKING:
    from distributed_at.config import AttackConfig, EvaluationEntry

FORMAT = 2
P = TypeVar("P", bound="Protocol")


OF_THE_RUN = ("weights", "model", "seed")  # what a run brings, however it is measured


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every accuracy depends on; a kind's own protocol adds its settings.

    Attributes:
        kind: name in ``KINDS``.
        weights: ``weights_hash`` of the network.
        data_ids: ``ids_hash`` of the samples; num_samples: how many they are.
        model: the architecture in words or JSON, for what the weights do not tell (activation, pixel normalisation).
        branch: norm branch, 'adv' or 'clean'.
        dataset, split, preprocessing: where the pixels come from, as the source says it.
        pixel_box: smallest and largest pixel.
        dtype: arithmetic of the forwards.
        scope: 'clean_correct' where only samples that are right before the attack are attacked, else 'all'.
        target: rule of a targeted attack, 'none' otherwise.
        attacks: names of the attacks in the order that they run; a row says which one broke its sample.
        title: for people; no part of the hash.
    """

    kind: str
    weights: str
    data_ids: str
    num_samples: int
    model: str = ""
    branch: str = "adv"
    dataset: str = ""
    split: str = ""
    preprocessing: str = ""
    pixel_box: tuple[float, float] = (0.0, 1.0)
    num_classes: int = 0
    dtype: str = "fp32"
    scope: str = "clean_correct"
    target: str = UNTARGETED
    attacks: tuple[str, ...] = ()
    title: str = field(default="", compare=False)

    # fields whose value may be written as a whole number or a list
    _floats: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self._floats:
            object.__setattr__(self, name, float(getattr(self, name)))  # 8 and 8.0 are one radius, so one hash
        object.__setattr__(self, "pixel_box", tuple(float(v) for v in self.pixel_box))
        for one in fields(self):
            object.__setattr__(self, one.name, _as_tuples(getattr(self, one.name)))  # JSON's lists

    def canonical(self) -> str:
        """Return the JSON that the hash is taken of: what differs from its default; sorted keys, no spaces, no title."""
        content: dict[str, Any] = {"format": FORMAT}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name != "title" and (one.default is MISSING or value != one.default):
                content[one.name] = value
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON, 64 hex digits: of the result, as the weights are part of it."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    @property
    def protocol_hash(self) -> str:
        """sha256 of the same without weights, architecture and the seed of random starts, 64 hex digits.

        Two results of equal protocol hashes were measured in the same way, on the same images: this is what a paper quotes.
        """
        content = {k: v for k, v in json.loads(self.canonical()).items() if k not in OF_THE_RUN}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def short_hash(self) -> str:
        """First 12 hex digits of the hash, for folders and tables."""
        return self.hash[:12]

    @property
    def name(self) -> str:
        """The title where one was given, else a name such as ``PGD-20 linf 8/255``."""
        return self.title or self.default_name

    @property
    def default_name(self) -> str:
        """Name made from the protocol alone."""
        return self.kind

    @property
    def folder_name(self) -> str:
        """Folder below ``evaluations/``: readable, and unique by the short hash."""
        return f"{self.slug}-{self.short_hash}"

    @property
    def slug(self) -> str:
        """The default name in letters that every file system takes."""
        return re.sub(r"[^a-z0-9]+", "-", self.default_name.lower()).strip("-")

    @property
    def attacked(self) -> bool:
        """Whether the kind attacks at all."""
        return KINDS[self.kind].attacked

    @property
    def targeted(self) -> bool:
        """Whether the attack aims at a class."""
        return self.target != UNTARGETED

    @property
    def metric(self) -> str:
        """``clean_accuracy`` or ``robust_accuracy``."""
        return "robust_accuracy" if self.attacked else "clean_accuracy"

    @property
    def ball(self) -> tuple[str, float] | None:
        """Norm and radius (/255) of the attack's ball, None where there is none."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the whole record as JSON types, with name and hash, as summaries and events show it."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "title"}
        return {
            **json.loads(json.dumps(values)),
            "format": FORMAT,
            "name": self.name,
            "hash": self.hash,
            "protocol_hash": self.protocol_hash,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Protocol:
        """Rebuild a protocol from ``to_dict``, of this version or an earlier one; keys that are no fields are ignored.

        Raises:
            ConfigError: the kind is not known here.
        """
        own = KINDS[str(content["kind"])].Record
        known = {one.name for one in fields(own)}
        return own(**{key: _tuples(value) for key, value in content.items() if key in known})


@dataclass(frozen=True, kw_only=True)
class AttackProtocol(Protocol):
    """What every attack inside a ball depends on. ``eps`` is in /255; ``seed`` is that of starts and targets."""

    norm: str = "linf"
    eps: float = 0.0
    seed: int = 0

    _floats: ClassVar[tuple[str, ...]] = ("eps",)

    @property
    def ball(self) -> tuple[str, float]:
        return self.norm, self.eps


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def ids_hash(ids: np.ndarray) -> str:
    """Return the sha256 of a set of sample ids; their order does not matter."""
    ordered = np.unique(np.asarray(ids, dtype="<i8"))
    return hashlib.sha256(ordered.tobytes()).hexdigest()


def effective_dtype(dtype: str, device: torch.device) -> str:
    """Return the arithmetic that ``dtype`` really means on a device: fp32 convolutions run as TF32 where allowed."""
    if dtype != "fp32" or device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return dtype
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    return "tf32" if any(b.fp32_precision == "tf32" for b in backends) else dtype


def build_protocol(
    entry: EvaluationEntry,
    *,
    weights: str,
    ids: np.ndarray,
    num_classes: int,
    training_attack: AttackConfig | None = None,
    model: str = "",
    branch: str | None = None,
    dataset: str = "",
    split: str = "",
    preprocessing: str = "",
    seed: int = 0,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Protocol:
    """Turn one evaluation of a recipe into the record of everything that its number depends on.

    BN always normalises with running statistics in an evaluation, whatever ``attack.bn_mode`` says of training; the
    epsilon warm-up of training does not apply either.

    Args:
        weights: ``weights_hash`` of the model.
        ids: (N,) sample ids that the number is over.
        training_attack: threat of an evaluation that names none of its own.
        settings: values of the kind's own fields that no recipe says, such as AutoAttack's budgets.

    Raises:
        ConfigError: where the configuration cannot be run.
    """
    kind = KINDS[entry.kind]
    attack = kind.attack_of(entry, training_attack)
    common: dict[str, Any] = {
        "kind": entry.kind,
        "weights": weights,
        "data_ids": ids_hash(ids),
        "num_samples": len(np.unique(ids)),
        "model": model,
        "branch": branch or entry.branch or "adv",
        "dataset": dataset,
        "split": split,
        "preprocessing": preprocessing,
        "num_classes": num_classes,
        "dtype": effective_dtype("fp32" if attack is None else attack.dtype, torch.device(device)),
        "title": entry.name or "",
    }
    if attack is not None:
        common |= {"norm": attack.norm, "eps": attack.eps, "seed": seed}
    return kind.Record(**{**common, **kind.settings(entry, attack, num_classes), **settings})
