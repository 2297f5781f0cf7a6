"""Writes and reads the journal: metrics, parameters, tags and artifacts of a run as JSON lines on local disk.

The journal is the source of truth; MLflow receives a copy later. Writing a line takes about 0.1 ms and never waits for a server.
Each attempt has its own file. Lines that a full disk does not take wait in memory until there is space. Records are

    {"t": seconds, "kind": "metrics", "step": 120, "values": {"train/loss": 5.1}}
    {"t": seconds, "kind": "params" | "tags", "values": {...}}
    {"t": seconds, "kind": "artifact", "path": "report.html"}
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.untrusted import hide_secrets, open_regular, parse_json, printable

_LINE = 16 << 20  # maximum size of a record, bytes
_KEPT = 64 << 20  # maximum size of the records that wait for space on the disk, bytes


class Journal:
    """Append-only journal of one attempt.

    Args:
        path: the file; its directory is created.
        clock: returns seconds since 1970.

    Attributes:
        dropped: records that were lost, since the disk took none for too long.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self.dropped, self._clock = path, 0, clock
        self._file: io.FileIO | None = None
        self._pending = bytearray()
        self._failing = False
        self._flush()

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
        self._flush()
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes the file."""
        if self._file is None or not self._file.closed:
            self.sync()
            if self._file is not None:
                self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        line = (json.dumps({"t": round(self._clock(), 3), **record}) + "\n").encode()
        if len(self._pending) + len(line) > _KEPT:
            self.dropped += 1
            return
        self._pending += line
        self._flush()

    def _flush(self) -> None:
        """Writes what waits; an error of the disk is reported once and does not end the run."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
        except OSError as error:
            self._report(f"cannot be written ({error.strerror}); records are kept in memory until it can")
            self._failing = True
            return
        if self._failing:
            lost = f"; {self.dropped} records were lost" if self.dropped else ""
            self._failing = False
            self._report(f"is written again{lost}")

    def _report(self, text: str) -> None:
        if not self._failing:
            with contextlib.suppress(OSError):  # the log may lie on the same disk
                print(f"fovea: {printable(str(self.path))} {text}", file=sys.stderr, flush=True)


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
