"""Labels images by the classifier of a run and packs the best of them as extra images; resumable piece by piece.

Carmon et al. 2019 and Gowal et al. 2020 ("Uncovering the limits", section 4.3): a classifier of natural training labels
images without labels, near-duplicates of the test set are taken out, and of each class the N / K with the highest
scores stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distributed_at.data.duplicates import NearTest
from distributed_at.data.index import Progress
from distributed_at.data.packed import Manifest
from distributed_at.data.packing import Packer, Scored, claimed, held_set
from distributed_at.data.selection import best_of_each_class
from distributed_at.data.sources import open_split
from distributed_at.data.unlabelled import Unlabelled, open_unlabelled
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.weights import open_network
from distributed_at.errors import ConfigError, DataError
from distributed_at.evaluation.weights import weights_hash
from distributed_at.files import write_atomically
from distributed_at.logits import checked_logits

# Root mean square grey levels, our choice: no paper states a measure. Images that were encoded anew should fall within it.
DUPLICATE_WITHIN = 10.0
_BLOCK = 16_384  # images between two saves of the scores


@dataclass(frozen=True)
class Scores:
    """What a classifier and the test set say of (N,) images.

    Attributes:
        labels: int64, the class with the highest probability.
        scores: float32, that probability.
        distances: float32, grey levels to the nearest test image; infinite where none is near.
    """

    labels: np.ndarray
    scores: np.ndarray
    distances: np.ndarray


def pseudolabel(
    run_folder: str | Path,
    paths: Sequence[Path],
    output: Path,
    *,
    keep: int | None = None,
    checkpoint: str = "auto",
    duplicates_within: float = DUPLICATE_WITHIN,
    batch_size: int = 512,
    progress: Progress | None = None,
) -> Manifest:
    """Label the images of ``paths`` by a run's network and pack them, scored, into ``output``.

    Args:
        run_folder: the classifier's. Its data set says the classes and the test images.
        paths: files, packed folders or folders of image files; labels in them are not looked at.
        output: the packed folder; its scores lie beside it while the work goes on (``OUTPUT.scores/``).
        keep: images in all, ``keep / classes`` of each class, those with the highest scores; None = all that are no
            duplicates.
        checkpoint: as in ``open_network``.
        duplicates_within: images at most so many grey levels (root mean square) from a test image or its mirror image are
            left out.
        batch_size: images a forward.
        progress: called with (images labelled, images in all).

    Raises:
        DataError, ConfigError, CheckpointError: images, output or run cannot be used; a class has too few images.
    """
    run = RunFolder(Path(run_folder))
    config = run.load_config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open_split(config.data.model_copy(update={"limit_test": None}), "test", seed=config.seed) as test:
        saved = open_network(run, config, checkpoint, num_classes=test.num_classes)
        images = open_unlabelled(paths, image_size=test.image_size)
        test_images = test.read(test.sample_ids, epoch=0, train=False)[0].permute(0, 2, 3, 1).numpy()
        test_digest = test.identity().digest
    network = saved.network.to(device).eval()
    num_classes = config.data.num_classes or test.num_classes
    facts = {
        "run": config.name,
        "checkpoint": saved.path.name,
        "weights": weights_hash(network),
        "dataset": config.data.dataset,
        "test": test_digest,
        "duplicates_within": duplicates_within,
        "measure": "root mean square of pixel differences, grey levels of 255, to a test image or its mirror image",
    }
    near = NearTest(test_images, within=duplicates_within, device=device)

    def examine(block: np.ndarray) -> Scores:
        labels, scores = _classified(network, block, device=device, batch_size=batch_size, num_classes=num_classes)
        return Scores(labels, scores, near.distances(block)[0])

    work = output.with_name(f"{output.name}.scores")
    found = _all_scores(images, examine, work, {**facts, "sources": list(images.sources)}, progress=progress)
    apart = ~np.isfinite(found.distances)
    if keep is None:
        rows = np.flatnonzero(apart)
    else:
        rows = best_of_each_class(found.labels, found.scores, keep, num_classes, field="--keep", eligible=apart)
    if not len(rows):
        raise DataError(f"all {len(images)} images are near-duplicates of test images: nothing is left")
    made_by = {**facts, "candidates": len(images), "near_duplicates": int((~apart).sum()), "keep": keep}
    return _pack(images, found, rows, output, made_by)


def _classified(
    network: torch.nn.Module, images: np.ndarray, *, device: torch.device, batch_size: int, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,) int64 classes and (N,) float32 probabilities of them."""
    labels, scores = [], []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            part = torch.from_numpy(images[start : start + batch_size]).to(device).permute(0, 3, 1, 2)
            x = part.to(torch.float32).div_(255.0)
            best = checked_logits(network(x), x, num_classes).float().softmax(dim=1).max(dim=1)
            labels.append(best.indices.cpu().numpy())
            scores.append(best.values.cpu().numpy())
    score = np.concatenate(scores)
    if not np.isfinite(score).all():
        raise DataError("the classifier's outputs are not finite: it cannot label images")
    return np.concatenate(labels), score


def _all_scores(
    images: Unlabelled,
    examine: Callable[[np.ndarray], Scores],
    work: Path,
    facts: Mapping[str, Any],
    *,
    progress: Progress | None,
) -> Scores:
    """Examine all images, block by block; blocks that an interrupted call has finished are read from ``work``."""
    work.mkdir(parents=True, exist_ok=True)
    table = work / "scores.json"
    told = json.dumps({**facts, "images": len(images), "block": _BLOCK}, indent=1)
    if not table.is_file() or table.read_text(encoding="utf-8") != told:
        for old in work.glob("block-*.npz"):
            old.unlink()
        write_atomically(table, told)
    numbers = range(-(-len(images) // _BLOCK))
    files = [work / f"block-{number:06d}.npz" for number in numbers]
    done = next((number for number in numbers if not files[number].is_file()), len(files))
    blocks = [_read_block(files[number]) for number in range(done)]
    pieces = _blocks(images.pieces(done * _BLOCK))
    for number in range(done, len(files)):
        blocks.append(examine(next(pieces)))
        _write_block(files[number], blocks[-1])
        if progress is not None:
            progress(min((number + 1) * _BLOCK, len(images)), len(images))
    return Scores(*(np.concatenate([getattr(b, name) for b in blocks]) for name in ("labels", "scores", "distances")))


def _blocks(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Join pieces into blocks of ``_BLOCK`` images; the last one may be smaller."""
    held: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        while len(piece):
            used = piece[: _BLOCK - count]
            held.append(used)
            count, piece = count + len(used), piece[len(used) :]
            if count == _BLOCK:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def _write_block(path: Path, block: Scores) -> None:
    beside = path.with_suffix(".part")
    with open(beside, "wb") as file:
        np.savez(file, labels=block.labels, scores=block.scores, distances=block.distances)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _read_block(path: Path) -> Scores:
    try:
        with np.load(path, allow_pickle=False) as content:
            return Scores(content["labels"], content["scores"], content["distances"])
    except Exception as error:  # a damaged archive raises almost any type
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}); remove it") from None


def _pack(images: Unlabelled, found: Scores, rows: np.ndarray, output: Path, made_by: Mapping[str, Any]) -> Manifest:
    chosen = np.zeros(len(images), dtype=bool)
    chosen[rows] = True

    def rows_from(first: int) -> Iterator[Scored]:
        place = int(rows[first]) if first < len(rows) else len(images)
        for piece in images.pieces(place):
            mine = chosen[place : place + len(piece)]
            here = np.arange(place, place + len(piece))[mine]
            place += len(piece)
            if len(here):
                yield piece[mine], found.labels[here], found.scores[here]

    sources = [*images.sources, dict(made_by)]
    with claimed(output):
        held = held_set(output, sources, replace=False)
        if held is not None:
            return held
        packer = Packer(output, image_size=images.image_size, scored=True, sources=sources, made_by=dict(made_by))
        return packer.pack(rows_from, len(rows))


def check_arguments(keep: int | None, duplicates_within: float, batch_size: int) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        ConfigError: names the option and what it may be.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"--keep must be at least 1, got {keep}")
    if not 0 <= duplicates_within <= 255:
        raise ConfigError(f"--duplicates-within is in grey levels, 0 to 255, got {duplicates_within:g}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
