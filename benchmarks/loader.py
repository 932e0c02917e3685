"""Times how fast training images come: our decoders beside torchvision's DataLoader, on the same files, doing the same work.

    python -m benchmarks.loader [--folder PATH:SIZE ...] [--images 512] [--workers 2] [--rounds 9]

Without --folder the JPEGs are made by this script; a folder holds train/ and val/ of class folders, and is shown at SIZE
pixels. Both sides decode with libjpeg-turbo, draw windows by the same law (area 8 to 100 %, aspect uniform in 3/4 to 4/3,
turned with probability one half), resize bicubically, mirror, and, where it says so, jitter brightness, contrast, saturation
and lighting, each truncated to uint8. Ours has W threads behind one prefetching thread, torchvision W processes that stay
alive, each with one thread. Beside images a second stands the processor time of an image, which a busy machine disturbs less.

First, our decoders must give the same pixels to a few grey levels; how far they are apart is recorded. Writes
results/loader.json. A loader needs to be no faster than the attack: one GPU at PGD-30 takes about 200 images a second, at
PGD-1 about 2000.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, transforms
from torchvision.transforms import functional

from benchmarks import common
from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import Prefetcher
from distributed_at.data.colour import LIGHTING_STD, PRINCIPAL_COMPONENTS, PRINCIPAL_VALUES, STRENGTH
from distributed_at.data.sources import open_split
from distributed_at.errors import UserError

BACKENDS = ("dali_gpu", "dali_cpu", "pil")
TORCHVISION = "torchvision"
CLASSES = 4
GREY_LEVELS = 3.0  # decoders further apart than this on average do not do the same work


def make_folder(root: Path, count: int) -> None:
    """Write ``count`` JPEGs of the sizes and smoothness of photographs, over train and val."""
    generator = np.random.default_rng(0)
    for split, share in (("train", count), ("val", CLASSES)):
        for index in range(share):
            folder = root / split / f"n{index % CLASSES:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            height, width = (int(v) for v in generator.integers(330, 500, size=2))
            coarse = generator.integers(0, 256, size=(height // 16, width // 16, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            picture.save(folder / f"{split}_{index:06d}.JPEG", quality=90)


class RandomResizedCrop:
    """The windows of ``data/augment.py`` by torch's own random numbers, resized as torchvision does."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(10):
            area, aspect, swap, top, left = torch.rand(5).tolist()
            pixels = (0.08 + 0.92 * area) * image.width * image.height
            ratio = 0.75 + aspect * (4 / 3 - 0.75)
            width, height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if swap < 0.5:
                width, height = height, width
            if width <= image.width and height <= image.height:
                y, x = int(top * (image.height - height + 1)), int(left * (image.width - width + 1))
                break
        else:
            resized = functional.resize(image, self.size, functional.InterpolationMode.BICUBIC)
            return functional.center_crop(resized, self.size)
        box = [self.size, self.size]
        return functional.resized_crop(image, y, x, height, width, box, functional.InterpolationMode.BICUBIC)


def lighting(image: torch.Tensor) -> torch.Tensor:
    """Shift a (3, H, W) uint8 image along the principal components of ImageNet's colours."""
    weights = LIGHTING_STD * 255 * torch.randn(3) * torch.tensor(PRINCIPAL_VALUES, dtype=torch.float32)
    shift = torch.tensor(PRINCIPAL_COMPONENTS, dtype=torch.float32) @ weights
    return (image + shift[:, None, None]).clamp_(0, 255).to(torch.uint8)


def torchvision_loader(root: Path, size: int, *, jitter: bool, workers: int, batch: int) -> Any:
    """Return the loader that most training codes have, with our augmentation."""
    steps: list[Any] = [RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    if jitter:
        steps.append(transforms.ColorJitter(STRENGTH, STRENGTH, STRENGTH))
    steps.append(transforms.PILToTensor())
    if jitter:
        steps.append(lighting)
    folder = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    return torch.utils.data.DataLoader(
        folder, batch_size=batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def processor_seconds(workers: list[int]) -> float:
    """Return the processor time that this process and its ``workers`` have used so far; a busy machine stretches it little."""
    ticks = 0
    for worker in workers:
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def processor_time(run: Callable[[], object], workers: list[int], images: int, passes: int = 3) -> float:
    """Return milliseconds of processor time an image, the least of some passes."""
    spent = []
    for _ in range(passes):
        start = processor_seconds(workers)
        run()
        spent.append(processor_seconds(workers) - start)
    return round(1000 * min(spent) / images, 3)


def measure(root: Path, size: int, arguments: argparse.Namespace, *, jitter: bool) -> dict[str, Any]:
    """Compare all decoders that work here with torchvision on one folder; return the record."""
    sources, skipped, first = {}, {}, {}
    for backend in BACKENDS:
        config = DataConfig(
            dataset="imagenet", path=str(root), image_size=size, backend=backend, num_threads=arguments.workers,
            limit_train=arguments.images,
            augment=AugmentConfig(crop="random_resized", flip=True, colour_jitter=jitter),
        )  # fmt: skip
        try:
            source = open_split(config, "train", seed=0)
            ids = np.asarray(source.sample_ids)[: arguments.batch]
            first[backend] = source.read(ids, epoch=1, train=True)[0].to(torch.int16)
            sources[backend] = source
        except (UserError, ImportError, RuntimeError) as error:
            skipped[backend] = str(error).splitlines()[0]
    if not sources:
        raise SystemExit(f"no decoder works here: {skipped}")
    reference = first[next(iter(first))]
    apart = {b: (t - reference).abs().float().mean().item() for b, t in first.items()}
    if max(apart.values()) > GREY_LEVELS:
        raise SystemExit(f"decoders disagree by {apart} grey levels on average: nothing is measured")

    def ours(source: Any) -> int:
        ids = np.asarray(source.sample_ids)
        requests = (ids[start : start + arguments.batch] for start in range(0, len(ids), arguments.batch))
        with Prefetcher(requests, lambda part: source.read(part, epoch=2, train=True), depth=2) as batches:
            return sum(len(images) for images, _ in batches)

    loader = torchvision_loader(root, size, jitter=jitter, workers=arguments.workers, batch=arguments.batch)
    images = next(iter(sources.values())).num_samples
    if images < len(loader.dataset):  # the same number, evenly over the classes
        loader.dataset.samples = [loader.dataset.samples[i] for i in next(iter(sources.values())).sample_ids]
    contestants = {b: lambda s=s: ours(s) for b, s in sources.items()}
    contestants[TORCHVISION] = lambda: sum(len(batch) for batch, _ in loader)
    assert {name: run() for name, run in contestants.items()} == dict.fromkeys(contestants, images)
    comparison = common.compare(contestants, baseline=TORCHVISION, rounds=arguments.rounds, warm_up=1)
    children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    cost = {n: processor_time(run, children if n == TORCHVISION else [], images) for n, run in contestants.items()}
    for source in sources.values():
        source.close()
    rate = {n: round(images / t.median, 1) for n, t in comparison.timings.items()}
    print(f"colour jitter {'on' if jitter else 'off'}, A/A control {comparison.control}", end="")
    print("" if comparison.trusted else "  NOT TRUSTED: the machine was too busy")
    for who, value in rate.items():
        ratio, low, high = comparison.ratios.get(who, [1.0, 1.0, 1.0])
        print(
            f"  {who:12s} {value:8.1f} images/s  x{ratio:.2f} [{low:.2f}, {high:.2f}]  {cost[who]:.2f} ms of processor an image"
        )
    for who, why in skipped.items():
        print(f"  {who} skipped: {why}")
    return {
        "colour_jitter": jitter, "images": images, "size": size, "images_per_second": rate,
        "processor_milliseconds_per_image": cost,
        "grey_levels_apart": apart, "skipped": skipped, "comparison": comparison,
    }  # fmt: skip


def main() -> None:
    """Make images where none are given, check, measure, print and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", action="append", default=[], metavar="PATH:SIZE", help="may be given again")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", type=int, default=224, help="of the images that are made")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = common.environment()
    folders = {}
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        make_folder(made, arguments.images)
        places = {f"made here, 330 to 500 pixels, to {arguments.size}": (made, arguments.size)}
        for given in arguments.folder:
            path, _, size = given.rpartition(":")
            places[f"{Path(path).name}, to {size}"] = (Path(path), int(size))
        for title, (root, size) in places.items():
            print(title)
            folders[title] = [measure(root, size, arguments, jitter=jitter) for jitter in (False, True)]
    setting = {k: v for k, v in vars(arguments).items() if k in ("batch", "workers", "rounds")}
    print(common.write_result("loader", {"setting": setting, "folders": folders}, before=before))


if __name__ == "__main__":
    main()
