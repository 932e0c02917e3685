"""Times how fast images come: our decoders on a folder of JPEGs that this script makes, beside torchvision's DataLoader.

    python -m benchmarks.loader [--images 256] [--size 224] [--workers 2] [--rounds 5]

First, every decoder must give the same crops: the windows come from counters, so only decoding and resizing may differ,
by a few grey levels, which is printed. Writes results/loader.json. A loader needs to be no faster than the attack: one
GPU at PGD-30 takes about 200 images a second, at PGD-1 about 2000.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from distributed_at.config import DataConfig
from distributed_at.data.sources import open_split
from distributed_at.errors import UserError

BACKENDS = ("dali_gpu", "dali_cpu", "pil")
CLASSES = 4


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


def torchvision_epoch(root: Path, size: int, workers: int, batch: int) -> int:
    """Read the folder once as most training codes do; return the number of images."""
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    folder = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(folder, batch_size=batch, shuffle=True, num_workers=workers)
    return sum(len(images) for images, _ in loader)


def main() -> None:
    """Make images, check, measure, print and write the JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    before = common.environment()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_folder(root, arguments.images)
        sources, skipped, first = {}, {}, {}
        for backend in BACKENDS:
            config = DataConfig(
                dataset="imagenet", path=str(root), image_size=arguments.size, backend=backend,
                num_threads=arguments.workers, num_classes=CLASSES,
            )  # fmt: skip
            try:
                source = open_split(config, "train", seed=0)
                ids = np.asarray(source.sample_ids)[: arguments.batch]
                first[backend] = source.read(ids, epoch=1, train=True, seed=0)[0].to(torch.int16)
                sources[backend] = source
            except (UserError, ImportError, RuntimeError) as error:
                skipped[backend] = str(error).splitlines()[0]
        if not sources:
            raise SystemExit(f"no decoder works here: {skipped}")
        reference = first[next(iter(first))]
        difference = {b: (t - reference).abs().float().mean().item() for b, t in first.items()}
        if max(difference.values()) > 3.0:
            raise SystemExit(f"decoders disagree by {difference} grey levels on average: nothing is measured")

        def read_all(source) -> None:
            ids = np.asarray(source.sample_ids)
            for start in range(0, len(ids), arguments.batch):
                source.read(ids[start : start + arguments.batch], epoch=2, train=True, seed=0)

        contestants = {f"ours, {b}": lambda s=s: read_all(s) for b, s in sources.items()}
        contestants["torchvision DataLoader"] = lambda: torchvision_epoch(
            root, arguments.size, arguments.workers, arguments.batch
        )
        comparison = common.compare(contestants, baseline="torchvision DataLoader", rounds=arguments.rounds, warm_up=1)
        for source in sources.values():
            source.close()
    rate = {n: round(arguments.images / t.median, 1) for n, t in comparison.timings.items()}
    print(f"A/A control {comparison.control}{'' if comparison.trusted else '  NOT TRUSTED: the machine was too busy'}")
    for who, value in rate.items():
        print(f"  {who:24s} {value:8.1f} images/s  x{comparison.ratios.get(who, [1.0])[0]:.2f}")
    print(f"  mean difference between decoders, grey levels: {difference}")
    for who, why in skipped.items():
        print(f"  {who} skipped: {why}")
    content = {
        "setting": vars(arguments), "images_per_second": rate, "grey_levels_apart": difference, "skipped": skipped,
        "comparison": comparison,
    }  # fmt: skip
    print(common.write_result("loader", content, before=before))


if __name__ == "__main__":
    main()
