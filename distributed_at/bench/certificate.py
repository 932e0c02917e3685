"""Reads a precision certificate for a recipe that names one: does it speak of this network and attack, and what does it say?

Making one is ``precision.py``. Nothing here needs torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed_at.config import AttackConfig, RunConfig

FORMAT = 2
KIND = "attack precision certificate"
# what does not make an attack another one: precision, compilation and warm-up
_OF_HOW = ("dtype", "compile", "cuda_graph", "precision_certificate", "eps_warmup_epochs", "eps_warmup_form")
_ATTACK_FIELDS = tuple(name for name in AttackConfig.model_fields if name not in _OF_HOW)
_CURE = "make it with: distributed-at bench precision RUN"


def check_certificate(path: Path, config: RunConfig, attack: AttackConfig) -> tuple[str, str]:
    """Return (code, sentence) of what the certificate at ``path`` says of ``attack`` in its 16-bit dtype.

    Args:
        path: as the recipe names it; relative to the working folder.
        config: the recipe, whose model and data set the certificate must be of.
        attack: the attack that names it.

    Returns:
        The code is ``certificate_passed``, or one of ``certificate_missing``, ``_unreadable``, ``_of_another_network``,
        ``_of_another_attack``, ``_without_this_precision``, ``_failed`` and ``_undecided``.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "certificate_missing", f"there is no file {path.absolute()}; {_CURE}"
    except (OSError, ValueError) as error:
        return "certificate_unreadable", f"{path} cannot be read ({error}); {_CURE}"
    if not isinstance(document, dict) or document.get("kind") != KIND or document.get("format") != FORMAT:
        return "certificate_unreadable", f"{path} is no {KIND} of format {FORMAT}; {_CURE}"
    wanted = {**json.loads(config.model.description), "dataset": config.data.dataset}
    found = {**document["model"], "dataset": document["dataset"]}
    if other := _differences(wanted, found, tuple(wanted)):
        return "certificate_of_another_network", f"{path} is of run {document['run']}, whose {other}"
    wanted = attack.model_dump(mode="json")
    # a certificate of an earlier version lacks what attacks could not be then
    defaults = AttackConfig(eps=0, num_steps=0, step_size=1).model_dump(mode="json")
    if other := _differences(wanted, {**defaults, **document["attack"]}, _ATTACK_FIELDS):
        return "certificate_of_another_attack", f"{path} is of run {document['run']}, whose attack's {other}"
    return _verdict(path, document, attack.dtype)


def _differences(wanted: dict[str, Any], found: dict[str, Any], fields: tuple[str, ...]) -> str:
    different = [
        f"{name} is {found.get(name)!r}, not {wanted[name]!r}" for name in fields if found.get(name) != wanted[name]
    ]
    return ", and ".join(different)


def _verdict(path: Path, document: dict[str, Any], dtype: str) -> tuple[str, str]:
    row = next((row for row in document["rows"] if row["precision"] == dtype), None)
    if row is None:
        reason = document["skipped"].get(dtype, "not measured")
        return "certificate_without_this_precision", f"{path} says nothing of {dtype}: {reason}"
    above = row["accuracy_above_fp32"]
    value, low, high = (100 * above[key] for key in ("value", "low", "high"))
    measured = (
        f"on {document['num_samples']} images of run {document['run']} the {dtype} attack leaves {value:+.2f} points "
        f"[{low:+.2f}, {high:+.2f}] of robust accuracy beside fp32's ({path})"
    )
    if row["verdict"] == "passes":
        return "certificate_passed", measured
    if row["verdict"] == "weaker":
        return "certificate_failed", f"{measured}: it is weaker and flatters the model; use fp32"
    return "certificate_undecided", f"{measured}: too few images to tell; give --num-samples more"
