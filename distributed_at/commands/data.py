"""Index an image folder once, check every file of it, or pack it into tar shards; pack and label extra images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed_at.commands import data_extra
from distributed_at.commands.common import add_json, print_json, print_rows, progress_on_terminal, say
from distributed_at.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distributed_at.data.index import FolderIndex

EXIT_DAMAGED = 3
_SPLITS = ("train", "val")
_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("index", "list FOLDER and read every image's header; unreadable files are set aside"),
        ("verify", "the same, but decode every image in full, which also finds files cut short; or check FILE"),
    ):
        action = actions.add_parser(name, help=text)
        text = "holds train/ and val/, or is one folder of class folders"
        if name == "verify":
            text += "; or extra images, a file (.pickle, .npz) or a packed folder"
        action.add_argument("folder", type=Path, help=text)
        action.add_argument("--split", action="append", choices=_SPLITS, help="default: all that FOLDER holds")
        action.add_argument("--threads", type=int, default=0, help="files read at once; 0 = by the machine")
        add_json(action)
    shard = actions.add_parser(
        "shard", help="pack FOLDER into tar shards with an index under DEST; data.path=DEST reads them"
    )
    shard.add_argument("folder", type=Path, help="holds train/ and val/, or is one folder of class folders")
    shard.add_argument("dest", type=Path, help="new folder; gets train/ and val/ likewise")
    shard.add_argument(
        "--size", type=int, default=10_000, help="images a shard (default 10000: about 1 GB of ImageNet)"
    )
    shard.add_argument("--split", action="append", choices=_SPLITS, help="default: all that FOLDER holds")
    shard.add_argument("--threads", type=int, default=0, help="files read at once while indexing; 0 = by the machine")
    add_json(shard)
    data_extra.add_actions(actions)


def split_folders(folder: Path, chosen: list[str] | None) -> dict[str, Path]:
    """Return name -> folder of class folders: the splits inside ``folder``, or ``folder`` itself where it has none.

    Raises:
        DataError: a split that was asked for is absent.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    inside = [name for name in _SPLITS if (folder / name).is_dir()]
    for name in chosen or ():
        if name not in inside:
            held = sorted(p.name for p in folder.iterdir() if p.is_dir())[:8]
            raise DataError(
                f"{folder}: --split {name}: looked for {folder / name}; the folder holds {held or 'nothing'}"
            )
    if not inside:
        return {folder.name: folder}
    return {name: folder / name for name in dict.fromkeys(chosen or inside)}


def _row(name: str, index: FolderIndex) -> dict[str, Any]:
    """Return a table's line; these keys are stable."""
    return {
        "split": name,
        "images": len(index),
        "classes": len(index.class_names),
        "bytes": int(index.byte_sizes.sum()),
        "set_aside": len(index.set_aside),
        "decoded": index.verified,
        "checksum": index.checksum[:12],
    }


def _index(args: argparse.Namespace) -> int:
    from distributed_at.data.index import survey, write_index

    if args.threads < 0:
        raise ConfigError(f"--threads must be at least 0, got {args.threads}")
    verify = args.action == "verify"
    rows, damaged = [], False
    seen: dict[bytes, str] = {}
    for name, folder in split_folders(args.folder, args.split).items():
        index = survey(folder, num_threads=args.threads, verify=verify, progress=progress_on_terminal(name))
        gone, new = _changes(index) if verify else ([], [])
        found = {
            "set_aside": {index.paths[i]: reason for i, reason in sorted(index.set_aside.items())},
            "gone": dict.fromkeys(gone, "in the index, but no longer in the folder"),
            "new": dict.fromkeys(new, "in the folder, but not in the index"),
            "same_bytes": _same_bytes(name, index, seen),
        }
        for kind, places in found.items():
            _tell(kind.replace("_", " "), name, places)
        if gone or new:
            say(
                f"{name}: the index is kept as it was, because ids are places in the listing. Restore the folder, or accept "
                f"the change: distributed-at data index {folder}"
            )
        else:
            write_index(index)
        row = _row(name, index)
        if verify:
            row |= {"gone": len(gone), "new": len(new), "same_bytes": len(found["same_bytes"])}
        rows.append({**row, **({"reasons": found["set_aside"], "places": found} if args.json else {})})
        damaged = damaged or bool(found["set_aside"] or gone or new)
    _show(args, rows)
    return EXIT_DAMAGED if damaged and verify else 0


def _changes(index: FolderIndex) -> tuple[list[str], list[str]]:
    """Return what is gone from the folder and new in it since it was indexed; nothing where it never was."""
    from distributed_at.data.index import index_path, listing_changes, read_index

    if not index_path(index.root).exists():
        return [], []
    return listing_changes(read_index(index.root).paths, index.paths)


def _same_bytes(name: str, index: FolderIndex, seen: dict[bytes, str]) -> dict[str, str]:
    """Return path -> the first image of this call that has the same bytes, and add this split's images to ``seen``."""
    same = {}
    for i, (path, digest) in enumerate(zip(index.paths, index.digests, strict=False)):
        if i in index.set_aside:
            continue
        first = seen.setdefault(digest, f"{name}/{path}")
        if first != f"{name}/{path}":
            same[path] = f"as {first}; both are kept"
    return same


def _tell(what: str, name: str, reasons: dict[str, str]) -> None:
    for path, reason in list(reasons.items())[:_SHOWN]:
        say(f"{what}: {name}/{path}: {reason}")
    if len(reasons) > _SHOWN:
        say(f"... and {len(reasons) - _SHOWN} more in {name}; --json lists them all")


def _shard(args: argparse.Namespace) -> int:
    from distributed_at.data.shards import write_shards

    rows = []
    for name, folder in split_folders(args.folder, args.split).items():
        index = write_shards(
            folder, args.dest / name, size=args.size, num_threads=args.threads, progress=progress_on_terminal(name)
        )
        assert index.shards is not None
        rows.append({**_row(name, index), "shards": len(index.shards.names)})
    _show(args, rows)
    return 0


def _verify_shards(args: argparse.Namespace, folders: dict[str, Path]) -> int:
    from distributed_at.data.shards import verify_shards

    rows, damaged = [], False
    for name, folder in folders.items():
        index, wrong = verify_shards(folder)
        for shard, reason in wrong.items():
            say(f"damaged: {name}/{shard}: {reason}")
        assert index.shards is not None
        row = {**_row(name, index), "shards": len(index.shards.names), "damaged": len(wrong)}
        rows.append({**row, **({"reasons": wrong} if args.json else {})})
        damaged = damaged or bool(wrong)
    _show(args, rows)
    return EXIT_DAMAGED if damaged else 0


def _show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json:
        print_json(rows)
        return
    print_rows(rows)


def run(args: argparse.Namespace) -> int:
    if args.action == "shard":
        return _shard(args)
    if args.action == "pack-extra":
        return data_extra.pack(args)
    if args.action == "pseudolabel":
        return data_extra.label(args)
    if args.action == "verify" and args.folder.is_file():
        return data_extra.verify_file(args)
    from distributed_at.data.packed import is_packed
    from distributed_at.data.shards import has_shards

    if args.action == "verify" and is_packed(args.folder):
        return data_extra.verify_packed(args)

    folders = split_folders(args.folder, args.split)
    if all(has_shards(folder) for folder in folders.values()):
        return _verify_shards(args, folders)
    return _index(args)
