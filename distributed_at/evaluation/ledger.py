"""Per-sample results on disk: append-only files, one a writer, merged as a set keyed by (protocol hash, sample id).

Any number of processes may add to one folder at once without locks, because no two write to the same file. A writer
killed in the middle of a line costs that line and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.errors import UserError
from distributed_at.evaluation.legacy import format_1_hash
from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.rows import COLUMNS, Rows, empty_rows
from distributed_at.files import write_atomically

PROTOCOL_FILE = "protocol.json"
SUMMARY_FILE = "summary.json"  # of a finished evaluation
EARLIER = "earlier_hash"
_GLOB = "rows-*.jsonl"
# columns that must agree where a sample was evaluated twice; a loss may differ by rounding between machines
_MUST_AGREE = ("label", "clean_prediction", "correct_clean", "correct_adv")


class LedgerConflictError(UserError):
    """Two rows of one protocol and one sample that say different things."""


def _to_json(rows: Rows, index: int) -> str:
    record: dict[str, Any] = {}
    for name in COLUMNS:
        value = getattr(rows, name)[index].item()
        record[name] = None if isinstance(value, float) and math.isnan(value) else value
    return json.dumps(record, separators=(",", ":"), allow_nan=False)


def _from_json(line: bytes) -> dict[str, Any] | None:
    """Parse one row; None for a torn or foreign line."""
    try:
        record = json.loads(line)
    except (ValueError, UnicodeDecodeError):
        return None
    if not isinstance(record, dict) or set(record) != set(COLUMNS) or not isinstance(record["sample_id"], int):
        return None
    if record["loss"] is None:
        record["loss"] = math.nan
    return record


@dataclass
class Ledger:
    """The rows of one protocol in one folder.

    ``Ledger.of`` finds or creates a protocol's folder among all evaluations, also one that an earlier version named
    by another hash; ``append`` adds rows durably; ``read`` returns the union of all writers' rows. A ledger opened in
    a folder of another protocol is refused.
    """

    folder: Path
    protocol_hash: str
    _path: Path | None = field(default=None, repr=False)

    @classmethod
    def of(cls, evaluations: Path, protocol: Protocol) -> Ledger:
        """Open or create the ledger of a protocol below ``evaluations``."""
        folder = evaluations / protocol.folder_name
        earlier = format_1_hash(protocol)
        if not folder.exists() and earlier is not None:
            before = evaluations / f"{protocol.slug}-{earlier[:12]}"
            folder = before if before.exists() else folder
        return cls.open(folder, protocol)

    @classmethod
    def open(cls, folder: Path, protocol: Protocol) -> Ledger:
        """Open or create the ledger of a protocol in ``folder`` (the protocol's own folder)."""
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / PROTOCOL_FILE
        content = json.dumps(protocol.to_dict(), indent=1, sort_keys=True) + "\n"
        if record.exists():
            stored = json.loads(record.read_text(encoding="utf-8")).get("hash")
            if stored == format_1_hash(protocol):
                write_atomically(record, content.replace("{", f'{{\n "{EARLIER}": "{stored}",', 1))
            elif stored != protocol.hash:
                raise LedgerConflictError(
                    f"{folder} holds results of protocol {str(stored)[:12]}, not of {protocol.short_hash}"
                )
        else:
            write_atomically(record, content)
        return cls(folder=folder, protocol_hash=protocol.hash)

    def seconds(self) -> float:
        """Return the wall-clock time that earlier calls took, as the finished summary says it; 0 without one."""
        try:
            return float(json.loads((self.folder / SUMMARY_FILE).read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0

    def append(self, rows: Rows) -> None:
        """Add rows to this writer's file and return when they are on disk."""
        if not len(rows):
            return
        if self._path is None:
            # a fresh file each time: nothing is ever appended behind another process's torn line
            self._path = self.folder / f"rows-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
            header = json.dumps({"protocol": self.protocol_hash}) + "\n"
        else:
            header = ""
        text = header + "".join(_to_json(rows, i) + "\n" for i in range(len(rows)))
        with open(self._path, "ab") as handle:
            handle.write(text.encode())
            handle.flush()
            os.fsync(handle.fileno())

    def _owners(self) -> set[str]:
        """Return the hashes that rows here may carry: the protocol's, and the one that an earlier version gave it."""
        try:
            stored = json.loads((self.folder / PROTOCOL_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {self.protocol_hash}
        return {self.protocol_hash, str(stored[EARLIER])} if EARLIER in stored else {self.protocol_hash}

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        owners = self._owners()
        for path in sorted(self.folder.glob(_GLOB)):
            header, *lines = path.read_bytes().split(b"\n")
            try:
                owner = json.loads(header)["protocol"]
            except (ValueError, KeyError, TypeError):
                continue  # torn before its first row
            if owner not in owners:
                raise LedgerConflictError(
                    f"{path} holds rows of protocol {owner[:12]}, not of {self.protocol_hash[:12]}"
                )
            for line in lines:
                record = _from_json(line)
                if record is not None:
                    yield path.name, record

    def read(self) -> Rows:
        """Return the union of all writers' rows in the order of sample ids, each sample once.

        Raises:
            LedgerConflictError: where two rows of a sample differ in label, prediction or verdict.
        """
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        conflicts: list[str] = []
        for name, record in self._records():
            first = found.setdefault(record["sample_id"], (name, record))
            wrong = [c for c in _MUST_AGREE if first[1][c] != record[c]]
            if wrong:
                conflicts.append(f"sample {record['sample_id']} differs in {', '.join(wrong)} ({first[0]}, {name})")
        if conflicts:
            more = f" and {len(conflicts) - 5} more" if len(conflicts) > 5 else ""
            raise LedgerConflictError(
                f"{self.folder}: rows of one protocol contradict one another: {'; '.join(conflicts[:5])}{more}. "
                "Move one of the files away to go on with the other."
            )
        if not found:
            return empty_rows()
        records = [found[i][1] for i in sorted(found)]
        return Rows(**{c: np.array([r[c] for r in records], dtype=t) for c, t in COLUMNS.items()})
