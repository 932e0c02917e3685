"""The unpickler under every reader of pickles that may come from a stranger. Which names it knows is the reader's business.

It is Python's own, the one written in Python: its memo is a dict and its reads end with the file. The one written in C
allocates what a few bytes of the file ask for (a memo of index 2**31 is 32 GB) before anything can be checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar

# Opcodes that reach outside of the stream, or reserve memory by a number in it; no file of ours or of the field has them.
_UNWANTED = (
    pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.BYTEARRAY8,
)  # fmt: skip


def _refuse(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it holds an opcode that plain data do not need")


class PlainUnpickler(pickle._Unpickler):
    """Builds what its ``find_class`` names and nothing else; a subclass must override ``find_class``."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{opcode[0]: _refuse for opcode in _UNWANTED},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that a file names; here none is known."""
        raise pickle.UnpicklingError(f"it names {module}.{name}, and nothing may be named here")
