"""Work on checkpoints outside of a run, in one process: list, verify, compare, convert to and from plain weight files.

DeepSpeed's own checkpoints are pickles and can run code when opened: they are read only where the caller says that they
trust them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.files import BadCheckpoint, Manifest
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.native import read_native
from distributed_at.engine.checkpoint.reader import SafeReader
from distributed_at.engine.checkpoint.retention import read_best
from distributed_at.engine.checkpoint.shards import FlatLoadPlanner, FlatShard
from distributed_at.engine.checkpoint.state import BUFFER, EMA, MODEL
from distributed_at.engine.checkpoint.weight_files import ABOUT, SUFFIXES, read_weight_file
from distributed_at.errors import CheckpointError, ConfigError, did_you_mean, first_line

_BUFFER_ENDINGS = ("running_mean", "running_var", "num_batches_tracked")


def checkpoint_folders(path: Path | str) -> list[Path]:
    """Checkpoints, newest first, of a run folder, of its ``checkpoints`` folder, or the one checkpoint given."""
    path = Path(path)
    if (path / files.MANIFEST).exists() or files.STEP_NAME.fullmatch(path.name):
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return [folder for _, folder in files.list_steps(root)]


def checkpoint_ls(path: Path | str, *, verify: bool = False) -> list[dict[str, Any]]:
    """List checkpoints, newest first, one row each.

    ``state``: "good" (every byte checked, with ``verify``), "complete" (all files there, of the right sizes), or what is
    wrong. ``saved``: local time. ``bytes`` are those of the data files.
    """
    rows = []
    for folder in checkpoint_folders(path):
        row: dict[str, Any] = {"checkpoint": folder.name, "epoch": None, "ranks": None, "bytes": None, "saved": None}
        row["best"] = read_best(folder.parent) == folder
        try:
            manifest = files.verify(folder) if verify else files.read_manifest(folder)
            files.check_sizes(folder, manifest)
        except BadCheckpoint as bad:
            rows.append({**row, "state": str(bad)})
            continue
        row.update(
            epoch=manifest.metadata.get("epoch"),
            ranks=manifest.world_size,
            bytes=manifest.num_bytes,
            saved=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created)),
            state="good" if verify else "complete",
        )
        rows.append(row)
    return rows


def checkpoint_verify(path: Path | str) -> list[dict[str, Any]]:
    """List checkpoints after checking every byte of each: ``state`` is "good" or says what is wrong."""
    return checkpoint_ls(path, verify=True)


def resolve(path: Path | str) -> Path:
    """Return the checkpoint meant by a run folder (its newest good one), a checkpoint folder, or refuse."""
    path = Path(path)
    folders = checkpoint_folders(path)
    reasons = []
    for folder in folders:
        try:
            files.verify(folder)
        except BadCheckpoint as bad:
            reasons.append(f"{folder.name}: {bad}")
        else:
            return folder
    told = "; ".join(reasons) if reasons else "there is none"
    raise CheckpointError(f"no usable checkpoint at {path}: {told}")


def read_checkpoint(path: Path | str, *, prefix: str = "") -> tuple[dict[str, torch.Tensor], Manifest]:
    """Return all whole tensors of a verified checkpoint whose names begin with ``prefix``, in host memory."""
    folder = resolve(path)
    try:
        manifest = files.read_manifest(folder)
        reader = SafeReader(folder, manifest)
        saved = reader.read_metadata().state_dict_metadata
    except BadCheckpoint as bad:
        raise CheckpointError(f"cannot use checkpoint {folder}: {bad}") from None
    tensors = {
        name: torch.empty(manifest.shapes[name], dtype=entry.properties.dtype)
        for name, entry in sorted(saved.items())
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    shards: dict[str, Any] = {name: FlatShard.whole(tensor) for name, tensor in tensors.items()}
    try:
        dcp.load(shards, storage_reader=reader, planner=FlatLoadPlanner(), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {first_line(error)}") from error
    return tensors, manifest


def read_weights(path: Path | str, *, weights: str = "model") -> dict[str, torch.Tensor]:
    """Return a plain state dict (parameters and buffers) from a run, a checkpoint, a .pt or a .safetensors file.

    ``weights``: "model", or "ema" for the averaged weights (with the live buffers where the average has none). Nothing
    in the file is run.
    """
    path = Path(path)
    if weights not in ("model", "ema"):
        raise ConfigError(f"weights is {weights!r}; allowed: model, ema.{did_you_mean(weights, ('model', 'ema'))}")
    if path.is_file():
        return read_weight_file(path).state
    tensors, _ = read_checkpoint(path)
    state = {n.removeprefix(BUFFER): t for n, t in tensors.items() if n.startswith(BUFFER)}
    if weights == "ema" and not any(n.startswith(EMA) for n in tensors):
        raise CheckpointError(f"{path} holds no averaged weights: its recipe has no train.ema; use weights model")
    state.update({n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)})
    if weights == "ema":
        state.update({n.removeprefix(EMA): t for n, t in tensors.items() if n.startswith(EMA)})
    return state


def checkpoint_diff(first: Path | str, second: Path | str) -> list[dict[str, Any]]:
    """Compare two checkpoints, one row a tensor: ``equal`` in every bit, else where and by how much they differ."""
    a, b = read_checkpoint(first)[0], read_checkpoint(second)[0]
    return [{"tensor": name, **_compare(a.get(name), b.get(name))} for name in sorted(a.keys() | b.keys())]


def _compare(a: torch.Tensor | None, b: torch.Tensor | None) -> dict[str, Any]:
    row: dict[str, Any] = {"equal": False, "different_values": None, "largest_difference": None, "note": ""}
    if a is None or b is None:
        return {**row, "note": "only in the " + ("second" if a is None else "first")}
    if a.shape != b.shape or a.dtype != b.dtype:
        return {**row, "note": f"{list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}"}
    bits = [tensor.contiguous().reshape(-1, 1).view(torch.uint8) for tensor in (a, b)]
    unequal = int((bits[0] != bits[1]).any(dim=-1).sum())
    largest = float((a.double() - b.double()).abs().max()) if unequal else 0.0
    return {"equal": unequal == 0, "different_values": unequal, "largest_difference": largest, "note": ""}


def checkpoint_convert(
    source: Path | str, target: Path | str, *, average: bool = False, allow_pickle: bool = False
) -> Path:
    """Convert between forms and return what was written.

    ``target`` ending in .pt or .safetensors: a plain state dict from a run, checkpoint or weights file, with what ``about``
    says of it (in .pt beside it, under its own key). Any other
    ``target``: a folder that gets a checkpoint, from weights, or from a DeepSpeed ZeRO 1/2 checkpoint folder, which is
    a pickle and opened only with ``allow_pickle``. ``average``: the averaged weights instead of the last ones.
    """
    source, target = Path(source), Path(target)
    weights = "ema" if average else "model"
    if target.suffix in SUFFIXES:
        state = {n: t.contiguous() for n, t in read_weights(source, weights=weights).items()}
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.tmp")
        if target.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, beside, metadata={"format": "pt", ABOUT: json.dumps(about(source, average=average))})
        else:
            torch.save({"state_dict": state, ABOUT: about(source, average=average)}, beside)
        beside.replace(target)
        return target
    native = sorted(source.glob("*zero_pp_rank_*_optim_states.pt")) if source.is_dir() else []
    if native:
        if not allow_pickle:
            raise ConfigError(
                f"{source} is a DeepSpeed checkpoint: a pickle, which can run any code when it is opened. If you trust "
                "whoever wrote it, say --allow-pickle."
            )
        tensors, step = read_native(source), _native_step(source)
    else:
        state = read_weights(source, weights=weights)
        tensors, step = {_named(name): tensor for name, tensor in state.items()}, 0
    result = CheckpointManager(target).save(step, tensors, {"converted_from": source.name, "step": step}, force=True)
    if result is None or not result.ok:
        raise CheckpointError(f"cannot write {target}: {'; '.join(result.failures) if result else ''}")
    return result.path


def about(source: Path, *, average: bool) -> dict[str, Any]:
    """Return what weights need to mean something elsewhere: network, pixels, classes, and where they come from."""
    if source.is_file():
        return dict(read_weight_file(source).about)
    (folder, *_) = [*checkpoint_folders(source), source]
    try:
        metadata = files.read_manifest(folder).metadata
    except BadCheckpoint:  # told by what reads its tensors
        metadata = {}
    root = next((place for place in (source, *source.parents[:2]) if (place / "recipe.yaml").is_file()), None)
    recipe = {} if root is None else yaml.safe_load((root / "recipe.yaml").read_text(encoding="utf-8"))
    model, data = recipe.get("model") or {}, recipe.get("data") or {}
    told = {
        "run": recipe.get("name"),
        "checkpoint": folder.name,
        "weights": "averaged" if average else "last",
        "model": model,
        "pixel_mean": model.get("pixel_mean"),
        "pixel_std": model.get("pixel_std"),
        "dataset": data.get("dataset"),
        "num_classes": metadata.get("num_classes"),
        "image_size": metadata.get("image_size"),
        "class_names": metadata.get("class_names"),
        "step": metadata.get("step"),
    }
    return {key: value for key, value in told.items() if value is not None}


def _named(name: str) -> str:
    """A state dict's key with our prefix; it does not say which are buffers, their customary endings do."""
    return (BUFFER if name.rsplit(".", 1)[-1] in _BUFFER_ENDINGS else MODEL) + name


def _native_step(folder: Path) -> int:
    digits = "".join(c for c in folder.name if c.isdigit())
    return int(digits) if digits else 0
