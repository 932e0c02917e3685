"""Where images come from, and their views."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distributed_at.catalogue.datasets import DATASETS, Dataset
from distributed_at.config.base import Strict
from distributed_at.config.choice import Choice

ResizeFilter = Literal["antialiased", "opencv"]
ValidationChoice = Literal["counters", "first", "numpy"]


class AugmentConfig(Strict):
    """Training-time views; every random choice comes from counters (seed, epoch, sample_id)."""

    crop: Literal["none", "pad", "random_resized"] = "none"
    pad: int = Field(default=4, ge=0, description="pixels padded on each side before a random crop ('pad')")
    pad_mode: Literal["zero", "reflect"] = "zero"
    flip: bool = False
    area: tuple[float, float] = Field(
        default=(0.08, 1.0), description="share of the image's area kept by 'random_resized'"
    )
    aspect: tuple[float, float] = Field(default=(0.75, 4 / 3), description="width / height of a 'random_resized' crop")
    colour_jitter: bool = Field(
        default=False, description="brightness, contrast, saturation, PCA lighting on uint8 (Xie & Yuille's code)"
    )

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        for name in ("area", "aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high, got [{low}, {high}]")
        if self.area[1] > 1:
            raise ValueError(f"area is a share of the image, at most 1, got {self.area[1]}")
        return self


class ExtraConfig(Strict):
    """Images beside the data set, unlabelled ones with labels of a classifier or generated ones, mixed into every batch."""

    files: tuple[str, ...] = Field(
        min_length=1,
        description="a packed folder (data pack-extra, data pseudolabel), or pickles (data, extrapolated_targets) and .npz "
        "(image, label) that together are one set, which is packed into a cache once",
    )
    cache: str | None = Field(
        default=None, description="where files are packed into; null = beside the first of them, or the user's cache"
    )
    labelled_ratio: float | tuple[tuple[float, float], ...] = Field(
        description="share of a batch that is of the data set itself, 0 to 1 (Gowal et al.: 0.3), the rest is extra; or "
        "[[epoch, share], ...] from which each holds, the first from 0"
    )
    keep: int | None = Field(
        default=None,
        gt=0,
        description="use so many images alone: of each class the keep / classes with the highest scores; needs a set that "
        "data pseudolabel scored",
    )

    @model_validator(mode="after")
    def _ratios(self) -> ExtraConfig:
        outside = [share for _, share in self.ratios if not 0 <= share <= 1]
        if outside:
            raise ValueError(f"labelled_ratio is a share of the batch, 0 to 1, got {outside[0]:g}")
        epochs = [epoch for epoch, _ in self.ratios]
        if not epochs or epochs[0] != 0 or epochs != sorted(set(epochs)):
            raise ValueError(f"labelled_ratio: its epochs begin with 0 and rise, got {epochs}")
        return self

    @property
    def ratios(self) -> tuple[tuple[float, float], ...]:
        """(epoch from which it holds, share of labelled images) pairs."""
        return ((0.0, self.labelled_ratio),) if isinstance(self.labelled_ratio, float) else self.labelled_ratio


class DataConfig(Strict):
    """Where the images come from."""

    dataset: Annotated[str, Choice(DATASETS)] = Field(
        description="a published one; 'folder' = any folder of class folders, their names the classes; or a plug-in's"
    )
    path: str | None = Field(default=None, description="folder that holds the data; digits need none")
    download: bool = Field(default=False, description="let torchvision download CIFAR or SVHN into path")
    test_size: int | None = Field(
        default=None, gt=0, description="images of a folder without val/ that are its test set, always the same ones"
    )
    backend: Literal["auto", "dali_cpu", "dali_gpu", "pil"] = Field(
        default="auto", description="decoder of imagenet folders"
    )
    image_size: int = Field(gt=0, description="height and width of the network's input, pixels")
    resize_size: int | None = Field(
        default=None, gt=0, description="shortest edge before the evaluation centre crop (imagenet)"
    )
    resize: ResizeFilter = Field(
        default="antialiased",
        description="bicubic kernel of imagenet folders: widened when shrinking as Pillow's, or four pixels as OpenCV's "
        "(Xie & Yuille's code), which the CPU decoders have",
    )
    num_classes: int | None = Field(default=None, gt=1, description="classes; null = those of the data set")
    validation_size: int = Field(
        default=0,
        ge=0,
        description="images held out of train for selection; the test set is for final evaluation alone",
    )
    validation_choice: ValidationChoice = Field(
        default="counters",
        description="which images are held out: 'counters' draws them by validation_seed; 'first' = the first ones of train "
        "(Gowal et al.: 1,024); 'numpy' = the first ones of numpy's permutation by validation_seed (Rice et al.'s code: "
        "1,000 by seed 0)",
    )
    validation_seed: int = Field(default=0, ge=0)
    limit_train: int | None = Field(default=None, gt=0, description="use only this many training images (smoke runs)")
    limit_test: int | None = Field(default=None, gt=0)
    augment: AugmentConfig = AugmentConfig()
    extra: ExtraConfig | None = Field(default=None, description="images beside the data set, e.g. generated ones")
    labelled_copies: int = Field(
        default=1,
        ge=1,
        description="how often each labelled image stands in a batch, with a crop, flip and attack of its own each time "
        "(4 emulates the workers of Gowal et al.'s code, which saw the same images at the same time)",
    )
    prefetch: int = Field(default=2, ge=0, description="batches prepared ahead of the attack")
    num_threads: int = Field(default=0, ge=0, description="decoder threads; 0 = by the machine")

    @model_validator(mode="after")
    def _fits_the_data_set(self) -> DataConfig:
        if self.download and self.facts.fetch is None:
            fetched = ", ".join(name for name in DATASETS if DATASETS[name].fetch is not None)
            raise ValueError(f"download fetches {fetched}; '{self.dataset}' has to be brought")
        if self.resize == "opencv" and not self.facts.folder:
            raise ValueError(f"resize is the kernel of image folders; '{self.dataset}' is not resized by it")
        if self.resize == "opencv" and self.backend == "dali_gpu":
            raise ValueError("resize 'opencv' is a kernel of the CPU decoders: set backend dali_cpu, pil or auto")
        if self.mixes and self.facts.folder:
            field = "extra" if self.extra is not None else "labelled_copies"
            raise ValueError(f"{field} goes with data sets whose images are of one size; '{self.dataset}' is a folder")
        if self.validation_choice == "first" and self.validation_seed:
            raise ValueError(
                f"validation_choice 'first' draws nothing: validation_seed {self.validation_seed} has no effect"
            )
        if self.validation_choice == "numpy" and self.validation_seed >= 2**32:
            raise ValueError(
                f"validation_choice 'numpy' takes a validation_seed below 2^32, got {self.validation_seed}"
            )
        if self.test_size is not None and self.facts.test is not None:
            raise ValueError(f"test_size belongs to a folder without val/; '{self.dataset}' has a published test set")
        return self

    @property
    def mixes(self) -> bool:
        """Whether batches hold extra images, or labelled ones several times."""
        return self.extra is not None or self.labelled_copies > 1

    @property
    def ratios(self) -> tuple[tuple[float, float], ...]:
        """(epoch from which it holds, share of labelled images of a batch) pairs."""
        return ((0.0, 1.0),) if self.extra is None else self.extra.ratios

    @property
    def facts(self) -> Dataset:
        """What is known of the data set before it is opened."""
        return DATASETS[self.dataset]
