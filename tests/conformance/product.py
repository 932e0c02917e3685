"""What is checked: the attacks and objectives of the package, or a copy of them with one planted mutation.

A mutated copy is written as a package of its own from the real sources, so that the checks see the code that ships,
differing by one edit.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import distributed_at.attacks
import distributed_at.catalogue
import distributed_at.objectives

# The registries are copied with what their entries name.
_FOLDERS = {
    "catalogue": Path(distributed_at.catalogue.__file__).parent,
    "attacks": Path(distributed_at.attacks.__file__).parent,
    "objectives": Path(distributed_at.objectives.__file__).parent,
}


@dataclass(frozen=True)
class Product:
    """Modules under test."""

    attacks: ModuleType
    objectives: ModuleType
    fused: bool = False

    def pgd(self, norm: str = "linf", eps: float = 8 / 255, **options):
        """Return an attack with convenient defaults: 3 steps of 2/255, or of 0.1 for l2."""
        options.setdefault("fused", self.fused)
        options.setdefault("num_steps", 3)
        options.setdefault("step_size", 2 / 255 if norm == "linf" else 0.1)
        return self.attacks.PGD(threat=self.attacks.Threat(norm, eps), **options)


REAL = Product(distributed_at.attacks, distributed_at.objectives)
FUSED = Product(distributed_at.attacks, distributed_at.objectives, fused=True)


@dataclass(frozen=True)
class Mutation:
    """One bug, planted by replacing ``old`` (which must occur exactly once) by ``new`` in a file.

    ``file`` is relative to the package ("attacks/pgd.py", "objectives/trades.py"); ``caught_by`` is the check that must
    fail.
    """

    name: str
    file: str
    old: str
    new: str
    caught_by: str


def mutated(mutation: Mutation, folder: Path, number: int) -> Product:
    """Write and import a copy of the product with the mutation planted."""
    root = f"mutant_{number}"
    home = folder / root
    sources = {f"{part}/{p.name}": p for part, path in _FOLDERS.items() for p in path.glob("*.py")}
    (home).mkdir(parents=True)
    (home / "__init__.py").write_text("")
    for name, source in sources.items():
        text = source.read_text()
        if name == mutation.file:
            found = text.count(mutation.old)
            if found != 1:
                raise ValueError(f"{mutation.name}: the text to mutate occurs {found} times in {name}")
            text = text.replace(mutation.old, mutation.new)
        for part in _FOLDERS:
            text = text.replace(f"distributed_at.{part}", f"{root}.{part}")
        target = home / name
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        return Product(*(importlib.import_module(f"{root}.{part}") for part in ("attacks", "objectives")))
    finally:
        sys.path.remove(str(folder))
