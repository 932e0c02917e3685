"""A copy of the checkout to plant faults in, so that neither the checkout nor a second planter sees them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mutations.mutation import PACKAGE, ROOT, Mutation


class Mirror:
    """Holds the files that git knows or would take; worker processes of a test import from it too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._edits = 0
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.decode().split("\0")):
            source = ROOT / name
            if source.is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / name)

    @contextmanager
    def with_fault(self, mutation: Mutation) -> Iterator[None]:
        """Hold the fault in the copy for the length of the block."""
        path = self.folder / PACKAGE / mutation.file
        text = path.read_text()
        self._write(path, mutation.planted(text))
        try:
            yield
        finally:
            self._write(path, text)

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        # Compiled files are matched by whole seconds and size: every edit gets a second of its own.
        self._edits += 1
        moment = path.stat().st_mtime + 2 * self._edits
        os.utime(path, (moment, moment))
