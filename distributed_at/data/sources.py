"""Opens a split of a data set as the recipe's ``data`` section describes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from distributed_at.config import DataConfig
from distributed_at.data.imagenet import Decoder, FolderSource, check_layout
from distributed_at.data.imagenet_dali import DaliDecoder
from distributed_at.data.imagenet_pil import PilDecoder
from distributed_at.data.index import FolderIndex, Progress, list_folder, open_index, read_index
from distributed_at.data.machine import dali_installed, decoder_threads
from distributed_at.data.shards import has_shards, load_shards
from distributed_at.data.source import ImageSource
from distributed_at.data.split import check_classes, fixed_test_ids, split_ids
from distributed_at.errors import ConfigError, DataError

Split = Literal["train", "validation", "test"]
_EVALUATION_CROP = 0.875  # 224 out of 256
_CORES_FOR_CPU_DECODING = 4


def open_split(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    warn: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
    device_index: int | None = None,
) -> ImageSource:
    """Open 'train', 'validation' or 'test'.

    Args:
        config: the recipe's data section.
        split: 'validation' is carved out of the published train split by ``validation_seed``; the three are disjoint
            images, and 'train' is without the held-out ones.
        seed: the run's seed, of augmentation and of limits.
        warn: called with (code, message) for facts that a run must record, such as damaged files.
        progress: called with (done, in all) while a folder is indexed for the first time.
        device_index: CUDA device of the 'dali_gpu' backend; null = the current one.

    Raises:
        DataError: the data are absent, incomplete, or not what the recipe says.
        ConfigError: the section contradicts itself for this data set.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be 'train', 'validation' or 'test', got {split!r}")
    if split == "validation" and config.validation_size == 0:
        raise ConfigError("split 'validation' needs data.validation_size > 0")
    return config.facts.opener()(config, split, seed=seed, warn=warn, progress=progress, device_index=device_index)


def choose_backend(config: DataConfig) -> str:
    """Return 'dali_cpu', 'dali_gpu' or 'pil' for ``data.backend``.

    'auto' is DALI on the CPU where DALI is installed: its pixels do not depend on the GPU, and an attack of many steps
    leaves the processor idle. With fewer than 4 cores a rank and a CUDA device, and neither colour jitter nor OpenCV's kernel
    (both of the CPU), it is DALI on the GPU. Without DALI it is Pillow.
    """
    if config.backend != "auto":
        return config.backend
    if not dali_installed():
        return "pil"
    import torch

    few = decoder_threads(config.num_threads) < _CORES_FOR_CPU_DECODING
    on_cpu = config.augment.colour_jitter or config.resize == "opencv"
    return "dali_gpu" if few and torch.cuda.is_available() and not on_cpu else "dali_cpu"


def _make_decoder(config: DataConfig, device_index: int | None) -> Decoder:
    backend, num_threads = choose_backend(config), decoder_threads(config.num_threads)
    if backend == "pil":
        return PilDecoder(num_threads=num_threads, resize=config.resize)
    if backend == "dali_cpu":
        return DaliDecoder(size=config.image_size, num_threads=num_threads, resize=config.resize)
    import torch

    if not torch.cuda.is_available():
        raise DataError("data.backend 'dali_gpu' needs a CUDA device, and there is none: use dali_cpu, pil or auto")
    device = torch.cuda.current_device() if device_index is None else device_index
    return DaliDecoder(size=config.image_size, num_threads=num_threads, device_id=device)


def open_imagenet(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    warn: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
    device_index: int | None = None,
) -> ImageSource:
    """Open a split of a folder that holds ``train/`` and ``val/``."""
    root, resize_size = _folder_settings(config)
    check_layout(root, split)
    if (root / "train").is_dir():
        _check_same_classes(root)
    index = _index(root / ("val" if split == "test" else "train"), config, progress)
    ids = np.arange(len(index), dtype=np.int64)
    return _folder_source(index, ids, config, split, resize_size, seed=seed, warn=warn, device_index=device_index)


def open_image_folder(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    warn: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
    device_index: int | None = None,
) -> ImageSource:
    """Open a split of any folder of class folders: ``train/`` and ``val/``, or one folder of which a part is the test set."""
    root, resize_size = _folder_settings(config)
    if has_own_test_set(root, config.test_size):
        if config.test_size is not None:
            raise ConfigError(f"data.test_size is {config.test_size}, but {root} has a test set of its own in val/")
        return open_imagenet(config, split, seed=seed, warn=warn, progress=progress, device_index=device_index)
    if config.test_size is None:
        raise DataError(
            f"data.path {root}: no train/ and val/ in it: make both, or say by data.test_size how many of its images are "
            "the test set"
        )
    index = _index(root, config, progress)
    if config.test_size >= len(index):
        raise ConfigError(
            f"data.test_size {config.test_size} leaves nothing to train on: {root} has {len(index)} images"
        )
    train, test = fixed_test_ids(len(index), config.test_size)
    ids = test if split == "test" else train
    return _folder_source(index, ids, config, split, resize_size, seed=seed, warn=warn, device_index=device_index)


def has_own_test_set(root: Path, test_size: int | None) -> bool:
    """Whether a folder of images holds ``val/`` beside ``train/``, which an evaluation can do without."""
    return (root / "val").is_dir() and ((root / "train").is_dir() or test_size is None)


def folder_sizes(config: DataConfig) -> tuple[tuple[str, ...], int, int]:
    """Return class names, training and test images of a folder, by its names or its shards' tables; no image is read.

    Raises:
        ConfigError, DataError: no folder is named, or it holds none.
    """
    if config.path is None:
        raise ConfigError(f"data.path is null: '{config.dataset}' is counted where it lies; give data.path")
    root = Path(config.path).expanduser()
    if has_own_test_set(root, config.test_size):
        check_layout(root, "train")
        classes, train = _counted(root / "train")
        return classes, train, _counted(root / "val")[1]
    classes, images = _counted(root)
    test = config.test_size or 0
    return classes, images - test, test


def indexed_sizes(config: DataConfig) -> tuple[int, int] | None:
    """Return (training, test) images of a folder as its index or shards say them; None where nothing says it yet.

    Where the folder is there, what a run would refuse later is refused now: its layout, and classes that differ.

    Raises:
        DataError: the folder is not laid out as a run needs it.
    """
    root = None if config.path is None else Path(config.path).expanduser()
    if root is None or not root.is_dir():
        return None
    check_layout(root, "train")
    _check_same_classes(root)
    if not has_shards(root / "val"):
        list_folder(root / "val")
    sizes = [_indexed(root / part) for part in ("train", "val")]
    return None if None in sizes else (sizes[0] or 0, sizes[1] or 0)


def _indexed(folder: Path) -> int | None:
    if has_shards(folder):
        return len(load_shards(folder))
    try:
        return len(read_index(folder))
    except DataError:  # none yet, or one that a run makes again
        return None


def _counted(folder: Path) -> tuple[tuple[str, ...], int]:
    if has_shards(folder):
        index = load_shards(folder)
        return index.class_names, len(index)
    paths = list_folder(folder)
    return tuple(sorted({path.split("/", 1)[0] for path in paths})), len(paths)


def _folder_settings(config: DataConfig) -> tuple[Path, int]:
    """Return the folder and the size that the shorter edge gets in evaluation."""
    if config.path is None:
        raise DataError(
            f"data.path is null: '{config.dataset}' needs the folder that holds train/ and val/"
            + ("" if config.facts.test is not None else ", or class folders and data.test_size")
        )
    resize_size = config.resize_size or round(config.image_size / _EVALUATION_CROP)
    if resize_size < config.image_size:
        raise ConfigError(f"data.resize_size {resize_size} is smaller than data.image_size {config.image_size}")
    if config.augment.crop == "pad":
        raise ConfigError(
            f"data.augment.crop 'pad' needs images of equal size; for {config.dataset} use 'random_resized'"
        )
    return Path(config.path).expanduser(), resize_size


def _index(folder: Path, config: DataConfig, progress: Progress | None) -> FolderIndex:
    if has_shards(folder):
        index = load_shards(folder)
    else:
        index = open_index(folder, num_threads=config.num_threads, progress=progress)
    check_classes(config, len(index.class_names), str(index.root))
    return index


def _folder_source(
    index: FolderIndex,
    ids: np.ndarray,
    config: DataConfig,
    split: Split,
    resize_size: int,
    *,
    seed: int,
    warn: Callable[[str, str], None] | None,
    device_index: int | None,
) -> ImageSource:
    return FolderSource(
        index,
        _make_decoder(config, device_index),
        name=config.dataset,
        split=split,
        sample_ids=split_ids(ids, config, split, seed=seed),
        image_size=config.image_size,
        resize_size=resize_size,
        resize=config.resize,
        augment=config.augment,
        seed=seed,
        num_threads=decoder_threads(config.num_threads),
        warn=warn,
    )


def _class_names(folder: Path) -> set[str]:
    if has_shards(folder):
        return set(load_shards(folder).class_names)
    return {p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")}


def _check_same_classes(root: Path) -> None:
    """Labels are places among the sorted class folders, so train and val must have the same ones."""
    train, val = (_class_names(root / part) for part in ("train", "val"))
    if train and val and train != val:
        only = [
            f"{len(a - b)} only in {n} (e.g. {min(a - b)})"
            for n, a, b in (("train", train, val), ("val", val, train))
            if a - b
        ]
        raise DataError(
            f"{root}: train has {len(train)} class folders and val {len(val)}: {', '.join(only)}. Labels would not agree; "
            f"make the class folders of both the same."
        )
