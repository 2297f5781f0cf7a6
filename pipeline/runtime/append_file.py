"""Appends records to a file of a run; what a full disk does not take waits in memory. Does not import torch."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from pipeline.untrusted import printable


class AppendFile:
    """A file that is only appended to. An error of the disk is reported once and does not end the run.

    Args:
        path: the file; its directory is created with the first record.
        kept: maximum size of the records that wait for space on the disk, bytes.
        what: what the records are, for messages.

    Attributes:
        dropped: records that were lost, since the disk took none for too long.
        written: bytes written.
    """

    def __init__(self, path: Path, *, kept: int, what: str = "records") -> None:
        self.path, self.dropped, self.written = path, 0, 0
        self._kept, self._what = kept, what
        self._descriptor: int | None = None
        self._pending = bytearray()
        self._failing = self._closed = False

    def append(self, record: bytes) -> None:
        """Queues a record for the next :meth:`flush`; a closed file loses it."""
        if self._closed or len(self._pending) + len(record) > self._kept:
            self.dropped += 1
        else:
            self._pending += record

    def flush(self) -> None:
        """Writes what waits, as far as the disk takes it; also opens the file if nothing waits. Nothing once it is closed."""
        if self._closed:
            return
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while self._pending:
                count = os.write(self._descriptor, self._pending)
                self.written += count
                del self._pending[:count]
        except OSError as error:
            self._report(f"cannot be written ({error.strerror}); {self._what} are kept in memory until it can")
            self._failing = True
            return
        if self._failing:
            lost = f"; {self.dropped} records were lost" if self.dropped else ""
            self._failing = False
            self._report(f"is written again{lost}")

    def sync(self) -> None:
        """Flushes to disk with ``fsync``."""
        self.flush()
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file after a last :meth:`flush`; what a full disk does not take then is lost, and that is reported."""
        self.flush()
        if self._pending:
            self._failing = False
            self._report(f"could not be written to the end: {len(self._pending)} bytes are lost")
            self._pending.clear()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._closed = True

    def _report(self, text: str) -> None:
        if not self._failing:
            with contextlib.suppress(OSError):  # the log may lie on the same disk
                print(f"fovea: {printable(str(self.path))} {text}", file=sys.stderr, flush=True)
