"""Reads the pickles that image sets are published as (CIFAR, pseudo-labelled extra images), running nothing they name.

An ordinary unpickler calls whatever function a file asks for. This one knows three names of numpy and one of Python's
codecs, maps them to inert stand-ins of its own, and refuses all others; what comes out is dicts, lists, numbers, bytes
and arrays of integers.
"""

from __future__ import annotations

import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.errors import DataError
from distributed_at.plain_pickle import PlainUnpickler

_INTEGERS = frozenset({"u1", "u2", "u4", "i1", "i2", "i4", "i8"})


class _Refused(pickle.UnpicklingError):
    """A pickle that names something outside the data it should hold."""


class _ArrayName:
    """Stands for ``numpy.ndarray``, which the files only name."""


class _Dtype:
    """Stands for a numpy dtype: remembers its code and byte order and takes no other notice of its state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else str(code)
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        self.order = order.decode("latin1") if isinstance(order, bytes) else str(order)

    def to_numpy(self) -> np.dtype:
        if self.code not in _INTEGERS or self.order not in ("|", "<", ">"):
            raise _Refused(f"an array of type {self.code!r} where pixels are uint8 and labels are integers")
        return np.dtype(self.order + self.code)


class _Array:
    """Stands for an array under construction: keeps shape and bytes until ``to_numpy`` checks them."""

    def __init__(self, kind: Any, shape: Any, code: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        if not (isinstance(self.state, tuple) and len(self.state) == 5):
            raise _Refused("an array without the five fields of numpy's format")
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _Dtype):
            raise _Refused("an array without a type")
        kind = dtype.to_numpy()
        if isinstance(raw, str):
            raw = raw.encode("latin1")
        if not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise _Refused("an array without bytes or shape")
        sizes_are_counts = all(isinstance(n, int) and n >= 0 for n in shape)
        if not sizes_are_counts or int(np.prod(shape, dtype=object)) * kind.itemsize != len(raw):
            raise _Refused(f"an array of shape {shape} and type {dtype.code!r} over {len(raw)} bytes")
        values = np.frombuffer(raw, dtype=kind).reshape(shape, order="F" if fortran else "C")
        return values.astype(kind.newbyteorder("="), copy=False)


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    """Stand for ``_codecs.encode``, by which Python 3 writes bytes into old pickles."""
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode with {codec!r}")
    return text.encode("latin1")


def _empty_bytes(*parts: Any) -> bytes:
    """Stand for ``bytes()``, by which Python 3 writes empty bytes into old pickles."""
    if parts:
        raise _Refused("bytes() with arguments")
    return b""


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _ArrayName,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
}


class _DataUnpickler(PlainUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"the file names {module}.{name}, which image data does not need") from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.to_numpy()
    if isinstance(value, dict):
        return {k.decode("latin1") if isinstance(k, bytes) else k: _plain(v) for k, v in value.items()}
    return value


def load_data_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in a published data pickle; keys as str, arrays as numpy integers in native byte order.

    Raises:
        DataError: the file is not a pickle, is cut short, names anything but data, or holds no dictionary.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            value = _plain(_DataUnpickler(content, encoding="bytes").load())
    except _Refused as error:
        raise DataError(
            f"{path}: refused to read: {error}. Nothing in it was run; get the file again from its publisher."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a malformed pickle raises almost any type
        raise DataError(
            f"{path}: not a complete pickle ({type(error).__name__}: {error}). Delete it and unpack the archive again."
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a dictionary of data and labels, found {type(value).__name__}")
    return value
