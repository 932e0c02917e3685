"""Measures how far our CPU decoders and plain Pillow are apart: in pixels, and in what a trained network answers.

    python -m benchmarks.decoder_parity --data PATH [--folder PATH:SIZE ...] [--runs runs]

PATH is laid out like ImageNet (train/<class>/*, val/<class>/*); every folder is compared in the training view, the training
view with colour jitter, and the evaluation view at SIZE pixels. A small network is trained naturally on --data with DALI
(unless the run is finished already), then its predictions are compared image by image: clean ones on the whole test split,
under PGD-10 on 1000 of its images. Contestants: data.backend dali_cpu and pil, and Pillow's own decoding and ``Image.resize``
of the same windows, which is what torchvision's transforms do. Writes results/decoder_parity.json.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from benchmarks import common
from distributed_at.config import AugmentConfig, DataConfig, evaluation_entry
from distributed_at.data import open_index, open_split
from distributed_at.data.augment import Views
from distributed_at.data.imagenet import FolderSource
from distributed_at.data.source import ImageSource
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.weights import open_network
from distributed_at.evaluation import Execution, Subject, evaluate
from distributed_at.recipes import load_recipe
from distributed_at.statistics import mcnemar, wilson

REFERENCE = "dali_cpu"
CONTESTANTS = (REFERENCE, "pil", "Pillow alone")
RUN = "decoder-parity"
RECIPE = [
    "imagenet/smoke.yaml", "attack=null", "objective={name: standard, label_smoothing: 0.1, label_smoothing_form: uniform}",
    "data.limit_train=null", "data.limit_test=null", "data.backend=dali_cpu",
    "model={blocks: [1, 1, 1, 1], block: basic, base_width: 32}", "schedule={name: cosine}",
    "train={epochs: 8, batch_size: 64, bn_group_size: 64, micro_batch_size: 64, drop_last: true}",
    "optimizer={lr_per: null, lr: 0.1}",
]  # fmt: skip
# A naturally trained network has nothing left at the paper's radius of 16; at 1 it still answers both ways.
ATTACKS = (
    evaluation_entry(kind="clean"),
    evaluation_entry(
        **{
            "kind": "pgd",
            "name": "pgd10",
            "num_samples": 1000,
            "attack": {"eps": 1, "num_steps": 10, "step_size": 0.25},
        }
    ),
)


class PillowAlone:
    """Decodes and resizes with Pillow and nothing else, after the views that every decoder is given."""

    name = CONTESTANTS[2]

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> tuple[torch.Tensor, dict[int, str]]:
        """Return (N, size, size, 3) uint8, and no failures: the folders measured are sound."""
        squares = []
        for i, data in enumerate(encoded):
            (top, left, height, width), (rows, columns) = views.windows[i].tolist(), views.resized[i].tolist()
            y, x = views.corners[i].tolist()
            with Image.open(io.BytesIO(data.tobytes())) as image:
                window = image.convert("RGB").crop((left, top, left + width, top + height))
            resized = window.resize((columns, rows), Image.Resampling.BICUBIC)
            square = resized.crop((x, y, x + views.size, y + views.size))
            turned = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if views.flips[i] else square
            squares.append(torch.from_numpy(np.array(turned)))
        return torch.stack(squares), {}

    def describe(self) -> str:
        """Return the version."""
        return f"Pillow {PIL.__version__}"

    def close(self) -> None:
        """Nothing is open."""


def open_contestant(section: DataConfig, split: str, who: str) -> ImageSource:
    """Open a split of a folder with the decoder ``who``."""
    if who != PillowAlone.name:
        return open_split(section.model_copy(update={"backend": who}), split, seed=0)  # type: ignore[arg-type]
    assert section.path is not None
    index = open_index(Path(section.path) / ("train" if split == "train" else "val"))
    return FolderSource(
        index, PillowAlone(), name=section.dataset, split=split, sample_ids=np.arange(len(index)), seed=0, num_threads=1,
        image_size=section.image_size, resize_size=section.resize_size or round(section.image_size / 0.875),
        augment=section.augment,
    )  # fmt: skip


def compare_pixels(root: Path, size: int, *, images: int, batch: int = 64) -> list[dict[str, Any]]:
    """Return for each view and contestant how far it is from the reference, in grey levels."""
    rows = []
    for view, split, jitter in (
        ("training", "train", False),
        ("training with colour jitter", "train", True),
        ("evaluation", "test", False),
    ):
        augment = AugmentConfig(crop="random_resized", flip=True, colour_jitter=jitter)
        section = DataConfig(dataset="imagenet", path=str(root), image_size=size, augment=augment)
        sources = {who: open_contestant(section, split, who) for who in CONTESTANTS}
        ids = np.asarray(sources[REFERENCE].sample_ids)
        ids = ids[np.linspace(0, len(ids) - 1, min(images, len(ids))).astype(np.int64)]  # over all classes
        counts = {who: np.zeros(256, dtype=np.int64) for who in CONTESTANTS[1:]}  # values by difference
        for start in range(0, len(ids), batch):
            part = ids[start : start + batch]
            read = {w: s.read(part, epoch=0, train=split == "train")[0].to(torch.int16) for w, s in sources.items()}
            for who, values in counts.items():
                values += torch.bincount((read[who] - read[REFERENCE]).abs().flatten(), minlength=256).numpy()
        for who, values in counts.items():
            rows.append(
                {
                    "view": view, "pair": [REFERENCE, who], "images": len(ids),
                    "mean": float(values @ np.arange(256) / values.sum()), "largest": int(np.flatnonzero(values)[-1]),
                    "share_above_one_grey_level": float(values[2:].sum() / values.sum()),
                }
            )  # fmt: skip
        for source in sources.values():
            source.close()
    return rows


def trained(data: Path, runs: Path) -> Path:
    """Train the network, or find it trained; return its run folder."""
    words = ["train", *RECIPE, f"name={RUN}", f"data.path={data}", "--runs", str(runs), "--workers", "1", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "distributed_at", *words], check=True, env=environment, stdout=sys.stderr)
    return runs / RUN


def compare_answers(run: Path, data: Path) -> list[dict[str, Any]]:
    """Return for each attack every contestant's accuracy, and how many predictions differ from the reference's."""
    config = load_recipe(str(run / "recipe.yaml")).config
    section = config.data.model_copy(update={"path": str(data)})
    rows = []
    for what in ATTACKS:
        results = {}
        for who in CONTESTANTS:
            with open_contestant(section, "test", who) as source:
                saved = open_network(RunFolder(run), config, "last", num_classes=source.num_classes)
                results[who] = evaluate(
                    Subject(network=saved.network), source, what, execution=Execution(batch_size=64)
                ).rows
        reference = results[REFERENCE]
        answers = {}
        for who, result in results.items():
            assert (result.sample_id == reference.sample_id).all()
            correct = int(result.correct_adv.sum())
            test = mcnemar(
                int((reference.correct_adv & ~result.correct_adv).sum()),
                int((result.correct_adv & ~reference.correct_adv).sum()),
            )
            answers[who] = {
                "correct": correct, "interval": wilson(correct, len(result)),
                "predictions_changed": int((result.adv_prediction != reference.adv_prediction).sum()),
                "right_with_reference_alone": test.only_first, "right_with_this_alone": test.only_second,
                "p_value": test.p_value,
            }  # fmt: skip
        attack = what.attack.model_dump(include={"eps", "num_steps", "step_size"}) if what.attack else None
        rows.append(
            {"protocol": what.name or what.kind, "attack": attack, "images": len(reference), "answers": answers}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", action="append", default=[], metavar="PATH:SIZE", help="may be given again")
    parser.add_argument("--images", type=int, default=512, help="at most, of each folder and view")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = common.environment()
    pixels = {}
    for given in arguments.folder:
        path, _, size = given.rpartition(":")
        title = f"{Path(path).name}, to {size}"
        pixels[title] = compare_pixels(Path(path), int(size), images=arguments.images)
        for row in pixels[title]:
            print(
                f"{title:26} {row['view']:27} {' / '.join(row['pair']):23} {row['images']:4} images  mean {row['mean']:.4f}  "
                f"largest {row['largest']}"
            )
    answers = compare_answers(trained(arguments.data, arguments.runs), arguments.data)
    for row in answers:
        for who, value in row["answers"].items():
            low, high = (100 * v for v in value["interval"])
            print(
                f"{row['protocol']:6} {who:12} {value['correct']}/{row['images']} = "
                f"{100 * value['correct'] / row['images']:.2f} % [{low:.2f}, {high:.2f}], "
                f"{value['predictions_changed']} predictions changed (p = {value['p_value']:.2f})"
            )
    content = {"pixels": pixels, "network": RECIPE, "answers": answers}
    print(common.write_result("decoder_parity", content, before=before))


if __name__ == "__main__":
    main()
