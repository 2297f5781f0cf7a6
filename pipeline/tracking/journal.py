"""Writes and reads the journal: metrics, parameters, tags and artifacts of a run as JSON lines on local disk.

The journal is the source of truth; MLflow receives a copy later. Writing a line takes about 0.1 ms and never waits for a server.
Each attempt has its own file. Lines that a full disk does not take wait in memory until there is space. Records are

    {"t": seconds, "kind": "metrics", "step": 120, "values": {"train/loss": 5.1}}
    {"t": seconds, "kind": "params" | "tags", "values": {...}}
    {"t": seconds, "kind": "artifact", "path": "report.html"}
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.runtime.append_file import AppendFile
from pipeline.untrusted import hide_secrets, open_regular, parse_json

_LINE = 16 << 20  # maximum size of a record, bytes
_KEPT = 64 << 20  # maximum size of the records that wait for space on the disk, bytes


class Journal:
    """Append-only journal of one attempt.

    Args:
        path: the file; its directory is created.
        clock: returns seconds since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file = AppendFile(path, kept=_KEPT)
        self._file.flush()
        self._closed = False

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def dropped(self) -> int:
        """Records that were lost, since the disk took none for too long."""
        return self._file.dropped

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics at an optimizer step."""
        self._write({"kind": "metrics", "step": step, "values": {k: _number(v) for k, v in values.items()}})

    def params(self, values: Mapping[str, Any]) -> None:
        """Records settings, which are constant over a run. Secrets in addresses are masked, as in all text of a journal."""
        self._write({"kind": "params", "values": {k: hide_secrets(str(v)) for k, v in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Records facts that may change: state, attempt, last checkpoint."""
        self._write({"kind": "tags", "values": {k: hide_secrets(str(v)) for k, v in values.items()}})

    def artifact(self, path: Path) -> None:
        """Records a file to be uploaded to the run's artifacts."""
        self._write({"kind": "artifact", "path": str(path)})

    def sync(self) -> None:
        """Flushes to disk with ``fsync``; called with each checkpoint."""
        self._file.sync()

    def close(self) -> None:
        """Syncs and closes the file."""
        if not self._closed:
            self._closed = True
            self._file.sync()
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        line = (json.dumps({"t": round(self._clock(), 3), **record}) + "\n").encode()
        self._file.append(line)
        self._file.flush()


def _number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def read(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields complete records from a byte offset on, each with the offset after it. An incomplete last line is left for later.

    Lines that are no valid record are skipped: torn by a crash, longer than 16 MiB, or with values of a wrong type.

    Raises:
        DataError: the path is not a regular file.
    """
    for end, line in lines(path, offset):
        record = parse(line)
        if record is not None:
            yield end, record


def lines(path: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yields complete lines of at most 16 MiB from a byte offset on, each with the offset after it.

    Raises:
        DataError: the path is not a regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        file.seek(offset)
        while line := file.readline(_LINE):
            offset += len(line)
            if not line.endswith(b"\n"):
                if len(line) < _LINE:
                    return
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LINE)
                    offset += len(line)
                continue
            yield offset, line


def parse(line: bytes) -> dict[str, Any] | None:
    """Parses a line; ``None`` if it is not a record that :class:`Journal` writes."""
    try:
        record = parse_json(line)
        if not isinstance(record, dict) or not math.isfinite(record["t"]):
            return None
        if record["kind"] == "artifact":
            return record if isinstance(record["path"], str) else None
        values = record["values"]
        if record["kind"] == "metrics":
            is_valid = type(record["step"]) is int and 0 <= record["step"] < 1 << 62
            return record if is_valid and all(type(v) in (int, float, str) and [float(v)] for v in values.values()) else None
        is_valid = record["kind"] in ("params", "tags") and all(isinstance(value, str) for value in values.values())
        return record if is_valid else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
