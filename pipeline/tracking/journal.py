"""The journal: what a run has to say, as JSON lines on its own disk. This is the truth; MLflow is a copy made later.

Writing a line costs about a tenth of a millisecond and never waits for a server. One file an attempt; records are

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


class Journal:
    """Append-only record of one attempt.

    Args:
        path: the file; its folder is made.
        clock: seconds since 1970.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._clock = path, clock
        self._file = path.open("a", buffering=1)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers at a step; the x-axis is the optimizer step."""
        self._write({"kind": "metrics", "step": step, "values": {k: _number(v) for k, v in values.items()}})

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings, which never change over a run."""
        self._write({"kind": "params", "values": {k: str(v) for k, v in values.items()}})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Record facts that may change: state, attempt, last checkpoint."""
        self._write({"kind": "tags", "values": {k: str(v) for k, v in values.items()}})

    def artifact(self, path: Path) -> None:
        """Record a file to be copied to the run's artifacts."""
        self._write({"kind": "artifact", "path": str(path)})

    def sync(self) -> None:
        """Force what was written to disk; called with each checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"t": round(self._clock(), 3), **record}) + "\n")


def _number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def read(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole records from a byte offset on, each with the offset behind it; a torn last line is left for later."""
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield offset, json.loads(line)
            except ValueError:  # torn by a crash; the next attempt starts a file of its own
                continue
