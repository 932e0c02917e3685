"""``data pack-extra``, ``data pseudolabel``, and ``data verify`` of files and packed folders of extra images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distributed_at.commands.common import add_json, find_run, print_json, print_rows, progress_on_terminal, say
from distributed_at.errors import ConfigError

EXIT_DAMAGED = 3


def add_actions(actions: Any) -> None:
    """Add the actions about extra images to those of ``data``."""
    pack = actions.add_parser(
        "pack-extra",
        help="pack files of extra images (.pickle, .npz) into a folder that training reads image by image: data.extra.files",
    )
    pack.add_argument("files", type=Path, nargs="+", help="together one set, in this order")
    pack.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new, or of an interrupted packing")
    pack.add_argument("--classes", type=int, default=None, help="refuse labels from this number on (default 1000)")
    add_json(pack)
    label = actions.add_parser(
        "pseudolabel",
        help="label images by the classifier of RUN, leave out near-duplicates of its test set, and pack the best-scored",
    )
    label.add_argument("run", help="folder or name of a run of natural training")
    label.add_argument(
        "images", type=Path, nargs="+", help=".npz (image), pickle (data), packed folder or image folder"
    )
    label.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the packed set: data.extra.files")
    label.add_argument("--keep", type=int, help="images in all, the same number of each class (default: all)")
    label.add_argument("--checkpoint", default="auto", help="'auto', 'best', 'last' or a step folder")
    label.add_argument(
        "--duplicates-within",
        type=float,
        default=None,
        metavar="LEVELS",
        help="leave out images at most so far from a test image or its mirror image: root mean square of pixel "
        "differences, grey levels of 255 (default 10)",
    )
    label.add_argument("--batch-size", type=int, default=512, help="images a forward")
    label.add_argument("--runs", default="runs", help="where runs are looked for by name")
    add_json(label)


def pack(args: argparse.Namespace) -> int:
    """Pack files; give the same command again where it was interrupted."""
    from distributed_at.data.extra_files import MOST_CLASSES
    from distributed_at.data.packing import pack_extra

    classes = MOST_CLASSES if args.classes is None else args.classes
    if not 1 <= classes <= MOST_CLASSES:
        raise ConfigError(f"--classes must be in [1, {MOST_CLASSES}], got {classes}")
    manifest = pack_extra(args.files, args.output, num_classes=classes, progress=progress_on_terminal("packed"))
    told = {"folder": str(args.output), "images": manifest.images, "image_size": manifest.image_size}
    _show(args, {**told, "shards": len(manifest.shards), "digest": manifest.digest[:12]}, manifest.counts)
    return 0


def label(args: argparse.Namespace) -> int:
    """Label and pack; give the same command again where it was interrupted."""
    from distributed_at.engine.runs.pseudolabel import DUPLICATE_WITHIN, check_arguments, pseudolabel

    within = DUPLICATE_WITHIN if args.duplicates_within is None else args.duplicates_within
    check_arguments(args.keep, within, args.batch_size)
    manifest = pseudolabel(
        find_run(args.run, args.runs),
        args.images,
        args.output,
        keep=args.keep,
        checkpoint=args.checkpoint,
        duplicates_within=within,
        batch_size=args.batch_size,
        progress=progress_on_terminal("labelled"),
    )
    made_by = manifest.made_by or {}
    told = {"folder": str(args.output), "candidates": made_by["candidates"]}
    told |= {"near duplicates": made_by["near_duplicates"], "kept": manifest.images}
    _show(args, told, manifest.counts)
    return 0


def verify_file(args: argparse.Namespace) -> int:
    """Read a file through and say what it holds."""
    from distributed_at.data.extra import labels_of_file
    from distributed_at.data.extra_files import MOST_CLASSES

    _no_split(args)
    images, size, counts = labels_of_file(args.folder, num_classes=MOST_CLASSES)
    _show(args, {"file": str(args.folder), "images": images, "shape": [size, size, 3]}, counts)
    return 0


def verify_packed(args: argparse.Namespace) -> int:
    """Read every byte of a packed folder and say what is not as it was packed."""
    from distributed_at.data.packed import changed_shards, read_manifest

    _no_split(args)
    manifest = read_manifest(args.folder)
    wrong = changed_shards(args.folder, manifest, every_byte=True)
    for name, reason in wrong.items():
        say(f"damaged: {args.folder / name}: {reason}")
    row = {"folder": str(args.folder), "images": manifest.images, "shards": len(manifest.shards), "damaged": len(wrong)}
    _show(args, {**row, **({"reasons": wrong} if args.json else {})}, manifest.counts)
    return EXIT_DAMAGED if wrong else 0


def _no_split(args: argparse.Namespace) -> None:
    if args.split:
        raise ConfigError(f"--split is for folders of class folders; {args.folder} holds extra images")


def _show(args: argparse.Namespace, row: dict[str, Any], counts: Any) -> None:
    if args.json:
        print_json({**row, "labels_per_class": counts})
        return
    print_rows([{**row, "labels per class": "  ".join(f"{label}: {count}" for label, count in counts.items())}])
