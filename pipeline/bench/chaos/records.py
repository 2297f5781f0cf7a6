"""Rows of the chaos benchmark: what one fault cost, appended to a file as soon as it is known."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from pipeline.untrusted import parse_json, printable

_FILE = 64 << 20  # bytes that are read of a file of rows


@dataclass(frozen=True)
class Row:
    """Result of one fault.

    Attributes:
        kind: kind of fault.
        number: number of the fault among those of its kind.
        seed: the benchmark's seed; with kind and number it decides moment and details.
        detail: what exactly was done.
        step: steps that were complete when it was injected.
        ended: whether the run came to its end.
        equal: whether weights, optimizer state and the signatures of all steps are those of the undisturbed run, bit for bit.
        steps_lost: steps that were executed again.
        seconds_lost: time in which the run stood still or repeated steps, beyond its usual time for a step.
        samples_wrong: samples of steps whose batch was not that of the undisturbed run, or is missing.
        attempts: attempts that came to a step.
        action: what the user had to do; empty for nothing.
        seconds: wall time from start to end.
        start: median of the seconds from an attempt's start to its first step.
        usual: median seconds of a step.
        error: why the fault counts as not survived; empty if it does not.
    """

    kind: str
    number: int
    seed: int
    detail: str
    step: int
    ended: bool
    equal: bool
    steps_lost: int
    seconds_lost: float
    samples_wrong: int
    attempts: int
    action: str
    seconds: float
    start: float
    usual: float
    error: str = ""

    @property
    def key(self) -> tuple[str, int, int]:
        """What identifies the fault."""
        return self.kind, self.number, self.seed


_TYPES = {field.name: {"str": str, "int": int, "float": float, "bool": bool}[str(field.type)] for field in fields(Row)}


def append(path: Path, row: Row) -> None:
    """Append a row in one write, so that several processes can share a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.write(descriptor, (json.dumps(asdict(row)) + "\n").encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Row]:
    """The rows of a file, the last of each fault, in the order of kind and number; lines that are no rows are skipped."""
    rows: dict[tuple[str, int, int], Row] = {}
    try:
        with path.open("rb") as file:
            lines = file.read(_FILE).splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        if (row := _row(line)) is not None:
            rows[row.key] = row
    return [rows[key] for key in sorted(rows)]


def _row(line: bytes) -> Row | None:
    try:
        values = parse_json(line)
    except ValueError:  # torn when the benchmark was killed
        return None
    if not isinstance(values, dict) or values.keys() != _TYPES.keys():
        return None
    for name, value in values.items():
        kind = _TYPES[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            values[name] = float(value)
        elif type(value) is not kind:
            return None
        elif isinstance(value, str):
            values[name] = printable(value)
    return Row(**values)
