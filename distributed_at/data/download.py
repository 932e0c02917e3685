"""Fetches CIFAR and SVHN from their publishers, by torchvision's addresses and checksums, when a recipe allows it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from distributed_at.catalogue.datasets import DATASETS
from distributed_at.data.locks import folder_lock
from distributed_at.errors import DataError
from distributed_at.registry import load_attribute


def download(dataset: str, path: Path) -> None:
    """Download and unpack ``dataset`` into ``path``; files whose checksum is right are not fetched again.

    Archives are only unpacked: torchvision's own data sets are not opened, because they unpickle freely.

    Raises:
        DataError: no connection, or a file that does not have its published checksum.
    """
    place = DATASETS[dataset].fetch
    assert place is not None  # the schema has seen to it
    fetch = load_attribute(place)
    lock, before = path / ".download.lock", [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        with folder_lock(lock):
            fetch(path)
    except (OSError, RuntimeError) as error:
        lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # folders that were made for nothing; one that holds something stays
            for made in before:
                made.rmdir()
        raise DataError(
            f"data.download: {dataset} could not be fetched into {path}: {error}. "
            f"Fetch it where there is a connection and set data.path to it."
        ) from error


def fetch_cifar10(path: Path) -> None:
    """Fetch CIFAR-10 into ``path``."""
    from torchvision import datasets

    _fetch_archive(datasets.CIFAR10, path)


def fetch_cifar100(path: Path) -> None:
    """Fetch CIFAR-100 into ``path``."""
    from torchvision import datasets

    _fetch_archive(datasets.CIFAR100, path)


def _fetch_archive(kind: Any, path: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    if not (path / kind.base_folder).is_dir():
        download_and_extract_archive(kind.url, str(path), filename=kind.filename, md5=kind.tgz_md5)


def fetch_svhn(path: Path) -> None:
    """Fetch SVHN into ``path``."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    for split in ("train", "test"):
        url, file_name, md5 = datasets.SVHN.split_list[split]
        download_url(url, str(path), file_name, md5)
