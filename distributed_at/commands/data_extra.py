"""``data pack-extra``, and ``data verify`` of files and packed folders of extra images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distributed_at.commands.common import add_json, print_json, print_rows, progress_on_terminal, say
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
