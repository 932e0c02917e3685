"""Says of one image file what its dimensions are, or why no decoder may have it: the same words behind every decoder."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image

MAX_PIXELS = 1 << 27  # 134 million: far above any photograph here, far below what exhausts a machine's memory
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})  # 8 bits a channel
_OTHERS = {  # how files begin that hold an image, but none that both decoders read
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"GIF8": "a GIF",
    b"\0\0\0\x0cjP": "a JPEG 2000",
    b"\xff\x4f\xff\x51": "a JPEG 2000",
}
_END = 4096  # bytes at either end of a file that its fingerprint is taken of
_SHOWN = 16  # first bytes that a message shows


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What is known of one file; ``reason`` is empty where it can be used.

    Attributes:
        height: pixels as stored; 0 where unknown.
        width: likewise.
        byte_size: of the file; 0 where unknown.
        reason: why the file cannot be used.
        digest: SHA-256 of its bytes where all of them were read.
        fingerprint: ``fingerprint`` of the file; 0 where it cannot be read.
    """

    height: int = 0
    width: int = 0
    byte_size: int = 0
    reason: str = ""
    digest: bytes = b""
    fingerprint: int = 0


def fingerprint(file: IO[bytes], size: int) -> int:
    """Return 64 bits over a file's size, first and last 4 KiB: other images have others, and it costs two reads."""
    file.seek(0)
    head = file.read(_END)
    file.seek(max(0, size - _END))
    return int.from_bytes(hashlib.blake2b(b"%d:" % size + head + file.read(_END), digest_size=8).digest(), "little")


def cut_short(encoded: bytes) -> bool:
    """Whether a JPEG lacks its end: a decoder that is given a window alone notices only where it reaches the cut."""
    return encoded[:2] == b"\xff\xd8" and encoded.rfind(b"\xff\xd9") < 0


def damage(encoded: bytes) -> str:
    """Return why an encoded image cannot be used, found by decoding it in full; empty where it can."""
    return _look(io.BytesIO(encoded), full=True)[2]


def inspect_file(path: Path, *, verify: bool) -> Inspection:
    """Inspect a file's header, or with ``verify`` all of it."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            return Inspection(reason="a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a plain file")
        with open(path, "rb") as file:
            mark = fingerprint(file, status.st_size)
            file.seek(0)
            data = file.read() if verify else b""
            height, width, reason = _look(io.BytesIO(data) if verify else file, full=verify)
    except FileNotFoundError:
        return Inspection(reason="a link to a file that is not there" if path.is_symlink() else "the file is gone")
    except OSError as error:
        return Inspection(reason=f"cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(data).digest() if verify else b""
    return Inspection(
        height=height, width=width, byte_size=status.st_size, reason=reason, digest=digest, fingerprint=mark
    )


def _look(stream: IO[bytes], *, full: bool) -> tuple[int, int, str]:
    """Return (height, width, reason) of an image; the first two are 0 where it cannot be used."""
    head = stream.read(_SHOWN)
    stream.seek(0)
    if not head:
        return 0, 0, "empty file"
    try:
        with Image.open(stream, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return 0, 0, f"declares {width} x {height} pixels, more than {MAX_PIXELS}"
            if image.mode not in _MODES or (image.format == "PNG" and _png_depth(stream) > 8):
                return 0, 0, "has more than 8 bits a channel, which decoders scale differently"
            if full:
                stream.seek(0)
                if cut_short(stream.read()):
                    return 0, 0, "cut short: a JPEG without its end"
                image.convert("RGB")
            return height, width, ""
    except Image.DecompressionBombError:
        return 0, 0, f"declares more than {MAX_PIXELS} pixels"
    except Image.UnidentifiedImageError:
        return 0, 0, _unidentified(head)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on damaged files
        return 0, 0, f"cannot be decoded: {error}"


def _png_depth(stream: IO[bytes]) -> int:
    place = stream.tell()
    stream.seek(24)  # signature, length and name of the first chunk, width, height
    depth = stream.read(1)
    stream.seek(place)
    return depth[0] if depth else 0


def _unidentified(head: bytes) -> str:
    for start, name in _OTHERS.items():
        if head.startswith(start):
            return f"{name}; images are JPEG, PNG, WebP or BMP, under any name"
    if head.startswith(b"\xff\xd8"):
        return "a JPEG whose header is damaged"
    return f"not an image: begins with {head!r}"
