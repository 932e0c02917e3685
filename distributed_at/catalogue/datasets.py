"""The data sets that a recipe can name: their facts, one entry each. What opens and fetches them is in ``data/``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from distributed_at.registry import Registry, load_attribute

# (config, split, *, seed, warn, progress, device_index) -> the split, an ``ImageSource``
Opener = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What the rest of the package asks about a data set.

    Attributes:
        title: as reports print it.
        open: a function (config, split, *, seed, warn, progress, device_index) -> ``ImageSource``, or "module:function".
        train, test: published numbers of images; None = what the folder holds.
        classes: None = what the folder holds.
        image_size: height and width of the images, which are not resized; None = they are, to ``data.image_size``.
        folder: it is a folder of class folders, or of shards made of one.
        fetch: "module:function" that downloads it into a folder; None = nobody may.
        robust_overfitting: robust accuracy is known to fall after the learning rate has (Rice et al. 2020).
    """

    title: str
    open: str | Opener
    train: int | None = None
    test: int | None = None
    classes: int | None = None
    image_size: int | None = None
    folder: bool = False
    fetch: str | None = None
    robust_overfitting: bool = False

    def opener(self) -> Opener:
        """Return what opens a split."""
        return cast(Opener, load_attribute(self.open)) if isinstance(self.open, str) else self.open


_DATA = "distributed_at.data"
_FETCH = f"{_DATA}.download"
DATASETS: Registry[Dataset] = Registry(
    "data set",
    field="data.dataset",
    entry=Dataset,
    builtin={
        # one set of 1797, of which 360 are always the test set
        "digits": Dataset(
            title="Digits 8×8", open=f"{_DATA}.digits:open_digits", train=1437, test=360, classes=10, image_size=8
        ),
        "cifar10": Dataset(
            title="CIFAR-10",
            open=f"{_DATA}.cifar:open_cifar10",
            train=50_000,
            test=10_000,
            classes=10,
            image_size=32,
            fetch=f"{_FETCH}:fetch_cifar10",
            robust_overfitting=True,
        ),
        "cifar100": Dataset(
            title="CIFAR-100",
            open=f"{_DATA}.cifar:open_cifar100",
            train=50_000,
            test=10_000,
            classes=100,
            image_size=32,
            fetch=f"{_FETCH}:fetch_cifar100",
            robust_overfitting=True,
        ),
        "svhn": Dataset(
            title="SVHN",
            open=f"{_DATA}.svhn:open_svhn",
            train=73_257,
            test=26_032,
            classes=10,
            image_size=32,
            fetch=f"{_FETCH}:fetch_svhn",
        ),
        "imagenet": Dataset(
            title="ImageNet",
            open=f"{_DATA}.sources:open_imagenet",
            train=1_281_167,
            test=50_000,
            classes=1000,
            folder=True,
        ),
        "folder": Dataset(title="folder of images", open=f"{_DATA}.sources:open_image_folder", folder=True),
    },
)


def recorded_dataset(data: Mapping[str, Any]) -> Dataset | None:
    """Return the data set that a recorded ``data`` section names; None where its plug-in is not loaded here."""
    name = data.get("dataset")
    return DATASETS[name] if isinstance(name, str) and name in DATASETS else None
