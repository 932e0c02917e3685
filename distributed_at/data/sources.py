"""Opens a split of a data set as the recipe's ``data`` section describes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from distributed_at.config import DataConfig
from distributed_at.data import cifar, digits, svhn
from distributed_at.data.download import download
from distributed_at.data.imagenet import Decoder, FolderSource, check_layout
from distributed_at.data.imagenet_dali import DaliDecoder
from distributed_at.data.imagenet_pil import PilDecoder
from distributed_at.data.index import Progress, open_index
from distributed_at.data.machine import dali_installed, decoder_threads
from distributed_at.data.shards import has_shards, load_shards
from distributed_at.data.source import ArraySource, ImageSource
from distributed_at.data.split import carve_validation, limit_ids
from distributed_at.errors import ConfigError, DataError

Split = Literal["train", "validation", "test"]
_SMALL_SIZES = {"digits": digits.IMAGE_SIZE, "cifar10": 32, "cifar100": 32, "svhn": 32}
_SMALL_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "svhn": 10}
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
    if config.dataset == "imagenet":
        return _open_folder(config, split, seed=seed, warn=warn, progress=progress, device_index=device_index)
    return _open_arrays(config, split, seed=seed, warn=warn)


def _split_ids(published: np.ndarray, config: DataConfig, split: Split, *, seed: int) -> np.ndarray:
    """Choose the ids of ``split`` among those of the published split that it comes from."""
    if split == "test":
        return limit_ids(published, config.limit_test, seed=seed)
    train, validation = carve_validation(published, size=config.validation_size, seed=config.validation_seed)
    return validation if split == "validation" else limit_ids(train, config.limit_train, seed=seed)


def _check_classes(config: DataConfig, found: int, where: str) -> None:
    if config.num_classes is not None and config.num_classes != found:
        raise DataError(
            f"data.num_classes is {config.num_classes}, but {where} has {found} classes: set num_classes: {found}, "
            f"or check data.path"
        )


def _open_arrays(
    config: DataConfig, split: Split, *, seed: int, warn: Callable[[str, str], None] | None
) -> ImageSource:
    name = config.dataset
    if config.image_size != _SMALL_SIZES[name]:
        raise DataError(
            f"data.image_size is {config.image_size}, but {name} has images of {_SMALL_SIZES[name]} pixels and is not "
            f"resized: set image_size: {_SMALL_SIZES[name]}"
        )
    _check_classes(config, _SMALL_CLASSES[name], name)
    published = "test" if split == "test" else "train"
    if name == "digits":
        images, labels, class_names = digits.read_digits()
        ids = digits.digits_ids(published, len(labels))
    else:
        if config.path is None:
            raise DataError(f"data.path is null: {name} needs the folder that holds its files")
        path = Path(config.path).expanduser()
        if config.download:
            download(name, path)
        if name == "svhn":
            images, labels, class_names = svhn.read_svhn(path, published, warn=warn)
        else:
            images, labels, class_names = cifar.read_cifar(path, name, published, warn=warn)
        ids = np.arange(len(labels), dtype=np.int64)
    return ArraySource(
        images,
        labels,
        name=name,
        split=split,
        sample_ids=_split_ids(ids, config, split, seed=seed),
        num_classes=_SMALL_CLASSES[name],
        augment=config.augment,
        seed=seed,
        class_names=class_names,
    )


def choose_backend(config: DataConfig) -> str:
    """Return 'dali_cpu', 'dali_gpu' or 'pil' for ``data.backend``.

    'auto' is DALI on the CPU where DALI is installed: its pixels do not depend on the GPU, and an attack of many steps
    leaves the processor idle. With fewer than 4 cores a rank and a CUDA device, and no colour jitter (which runs on the
    CPU), it is DALI on the GPU. Without DALI it is Pillow.
    """
    if config.backend != "auto":
        return config.backend
    if not dali_installed():
        return "pil"
    import torch

    few = decoder_threads(config.num_threads) < _CORES_FOR_CPU_DECODING
    return "dali_gpu" if few and torch.cuda.is_available() and not config.augment.colour_jitter else "dali_cpu"


def _make_decoder(config: DataConfig, device_index: int | None) -> Decoder:
    backend, num_threads = choose_backend(config), decoder_threads(config.num_threads)
    if backend == "pil":
        return PilDecoder(num_threads=num_threads)
    if backend == "dali_cpu":
        return DaliDecoder(size=config.image_size, num_threads=num_threads)
    import torch

    if not torch.cuda.is_available():
        raise DataError("data.backend 'dali_gpu' needs a CUDA device, and there is none: use dali_cpu, pil or auto")
    device = torch.cuda.current_device() if device_index is None else device_index
    return DaliDecoder(size=config.image_size, num_threads=num_threads, device_id=device)


def _open_folder(
    config: DataConfig,
    split: Split,
    *,
    seed: int,
    warn: Callable[[str, str], None] | None,
    progress: Progress | None,
    device_index: int | None,
) -> ImageSource:
    if config.path is None:
        raise DataError("data.path is null: imagenet needs the folder that holds train/ and val/")
    resize_size = config.resize_size or round(config.image_size / _EVALUATION_CROP)
    if resize_size < config.image_size:
        raise ConfigError(f"data.resize_size {resize_size} is smaller than data.image_size {config.image_size}")
    if config.augment.crop == "pad":
        raise ConfigError("data.augment.crop 'pad' needs images of equal size; for imagenet use 'random_resized'")
    root = Path(config.path).expanduser()
    check_layout(root)
    _check_same_classes(root)
    folder = root / ("val" if split == "test" else "train")
    if has_shards(folder):
        index = load_shards(folder)
    else:
        index = open_index(folder, num_threads=config.num_threads, progress=progress)
    _check_classes(config, len(index.class_names), str(index.root))
    return FolderSource(
        index,
        _make_decoder(config, device_index),
        name=config.dataset,
        split=split,
        sample_ids=_split_ids(np.arange(len(index), dtype=np.int64), config, split, seed=seed),
        image_size=config.image_size,
        resize_size=resize_size,
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
