"""Reads the files that W&B's process writes on this node, with W&B's own messages. Their format is LevelDB's log.

block of 32 KiB:  (CRC-32C, length, kind) and data, and so on; kinds: 1 complete, 2 first, 3 middle, 4 last part of a record
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.untrusted import open_regular

_BLOCK, _HEADER = 32768, 7
_RECORD = 64 << 20  # maximum size of a record, bytes


def records(path: Path, start: int = 0) -> Iterator[Any]:
    """Yields the records of a ``.wandb`` file; a torn end ends it.

    Args:
        path: the file.
        start: begin with the first record that starts at or after this offset, a multiple of 32 KiB.

    Raises:
        DataError: it is not a regular file, or not of W&B.
        OSError: it cannot be opened.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    with os.fdopen(open_regular(path), "rb") as file:
        if file.read(_HEADER)[:4] != b":W&B":
            raise DataError("is not a file of W&B", where=str(path), hint="Delete its directory")
        at, parts, begun = start or _HEADER, b"", False
        file.seek(at)
        while True:
            left = _BLOCK - at % _BLOCK
            if left < _HEADER:
                file.seek(left, os.SEEK_CUR)
                at += left
            header = file.read(_HEADER)
            if len(header) < _HEADER:
                return
            length, kind = struct.unpack("<HB", header[4:])
            data = file.read(length)
            if kind not in (1, 2, 3, 4) or len(data) < length or len(parts) > _RECORD:
                return
            begun = begun or kind in (1, 2)
            parts = data if kind in (1, 2) else parts + data
            at += _HEADER + length
            if kind in (1, 4) and begun:
                record = wandb_internal_pb2.Record()
                try:
                    record.ParseFromString(parts)
                except DecodeError:
                    return
                yield record


def is_ended(path: Path) -> bool:
    """Whether W&B's process has written the record of the run's end, which is one of the last."""
    try:
        start = max(path.stat().st_size // _BLOCK - 2, 0) * _BLOCK
        return any(record.WhichOneof("record_type") == "exit" for record in records(path, start))
    except (OSError, DataError):
        return False


def is_open(path: Path) -> bool:
    """Whether a process of this user on this node has a file open; W&B's outlives the process that it served, and writes on."""
    where = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == where:
                return True
    return False


def logged(path: Path) -> int:
    """Returns how many rows of metrics a file holds: those with a step and without images or tables; 0 if it cannot be read."""
    rows = 0
    try:
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                plain = all(len(item.nested_key) < 2 and not item.value_json.startswith("{") for item in items)
                rows += plain and any("step" in (item.key, *item.nested_key) for item in items)
    except (DataError, OSError):
        pass
    return rows
