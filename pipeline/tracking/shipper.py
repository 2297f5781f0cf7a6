"""Copies journals to a tracker in a background thread: a slow or unreachable one never delays training, and no record is lost.

The cursor file stores the tracker's run, how far each journal was accepted, and the last step of each metric. A resumed attempt
repeats the steps after its checkpoint bit for bit, so points of steps that were already sent are skipped. Each tracker is a
subclass in one file, with a cursor of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import DataError, FoveaError
from pipeline.tracking.journal import read
from pipeline.untrusted import hide_secrets, inside, open_regular, printable, read_json, shown_address

_BATCH = 900
_PAUSES = (1.0, 30.0)


class JournalShipper(ABC):
    """Sends all journals of a run to one run of a tracker.

    Attributes:
        tracker: name of the tracker, for messages.
        trouble: the last error; ``None`` once everything was accepted.

    Args:
        folder: ``<run>/tracking``, with ``journal-*.jsonl``; the cursor is stored there.
        uri: where the tracker is; another one gets a run of its own, with everything.
        log: receives a message when the tracker is unreachable, once per outage, and for rejected data, once per name.
        cursor: name of the cursor file.
        once: skip points at steps that a metric already has: an attempt that repeats them records the same values.
        root: the only directory whose files are sent as artifacts, after resolving links; by default the run directory, the
            parent of ``folder``.
    """

    tracker: ClassVar[str]

    def __init__(
        self,
        folder: Path,
        *,
        uri: str,
        log: Callable[[str], None] = lambda _: None,
        cursor: str = "cursor.json",
        once: bool = True,
        root: Path | None = None,
    ) -> None:
        self._folder, self._uri, self._log, self._once = folder, uri, log, once
        self._root = root or folder.parent
        self._cursor_path = folder / cursor
        known = load_cursor(self._cursor_path)
        self._cursor = known if known.get("uri") == uri else new_cursor(uri, "")
        self.trouble: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"fovea-{self.tracker.lower()}", daemon=True)

    @abstractmethod
    def _connect(self) -> Any:
        """Connects, if it is not connected; creates the tracker's run if missing, with a new cursor."""

    @abstractmethod
    def _send(self, records: list[dict[str, Any]]) -> None:
        """Sends records, and updates the steps of the cursor."""

    @abstractmethod
    def _upload(self, path: Path) -> None:
        """Sends a file of the run directory."""

    @abstractmethod
    def _disconnect(self, *, failed: bool) -> None:
        """Forgets the connection after an error, or ends it at the end."""

    @property
    def where(self) -> str:
        """Where the tracker is, for messages."""
        return shown_address(self._uri)

    def start(self) -> None:
        """Starts the background thread."""
        self._thread.start()

    def finish(self) -> None:
        """Asks the thread to send the remaining records and to end; several trackers do so side by side."""
        self._stop.set()

    def close(self, seconds: float = 5.0) -> bool:
        """Sends the remaining records, for at most ``seconds``.

        Returns:
            Whether everything was accepted; if not, the next attempt sends the rest.
        """
        self.finish()
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive() and not self._pending()

    def _pending(self) -> bool:
        unsent = (next(read(path, self._offset(path)), None) for path in self._journals())
        return bool(self._cursor["artifacts"]) or any(unsent)

    def _journals(self) -> list[Path]:
        return sorted(self._folder.glob("journal-*.jsonl"))

    def _offset(self, path: Path) -> int:
        return int(self._cursor["offsets"].get(path.name, 0))

    def _run(self) -> None:
        pause, away = _PAUSES[0], False
        while True:
            last = self._stop.is_set()
            try:
                self.ship()
                pause, away, self.trouble = _PAUSES[0], False, None
                if last:
                    self._disconnect(failed=False)
            except Exception as error:  # no error of a tracker may reach training
                with contextlib.suppress(Exception):  # such as a file that cannot be closed on a full disk
                    self._disconnect(failed=True)
                self.trouble = error
                if not away:
                    reason = first_line(error)
                    self._log(f"{self.tracker} at {self.where} accepts no records now ({reason}); the journal keeps everything")
                pause, away = min(2 * pause, _PAUSES[1]), True
            if last:
                return
            self._stop.wait(pause)

    def ship(self) -> None:
        """Sends everything that the tracker has not accepted yet.

        Raises:
            Exception: any error of the tracker; the cursor keeps what was accepted before it.
        """
        if not self._pending():
            return
        self._connect()
        for path in self._journals():
            records = read(path, self._offset(path))
            while chunk := list(islice(records, _BATCH)):
                self._send([record for _, record in chunk])
                for _, record in chunk:
                    if record["kind"] == "artifact" and record["path"] not in self._cursor["artifacts"]:
                        self._cursor["artifacts"].append(record["path"])
                self._cursor["offsets"][path.name] = chunk[-1][0]
                self._write_cursor()
        while self._cursor["artifacts"]:  # last, so that a broken artifact store delays nothing else
            self._send_artifact(self._cursor["artifacts"][0])
            del self._cursor["artifacts"][0]
            self._write_cursor()

    def _fresh(self, record: dict[str, Any], newest: dict[str, int]) -> dict[str, float]:
        """Returns the values of a metrics record that were not sent yet, and notes their step in ``newest``."""
        known = newest if self._once else {}
        fresh = {key: float(value) for key, value in record["values"].items() if record["step"] > known.get(key, -1)}
        newest.update(dict.fromkeys(fresh, record["step"]))
        return fresh

    def _send_artifact(self, named: str) -> None:
        """Sends a regular file of the run directory; logs what is skipped, and why."""
        try:
            path = inside(named, self._root, where="journal")
            os.close(open_regular(path))
        except FileNotFoundError:
            self._log(f"{printable(named, limit=200)} is gone and cannot be sent to {self.tracker}")
        except (DataError, OSError) as error:
            reason = error.what if isinstance(error, DataError) else error.strerror
            self._log(f"an artifact is not sent to {self.tracker}: {reason}")
        else:
            self._upload(path)

    def _write_cursor(self) -> None:
        temporary = self._cursor_path.with_suffix(f".tmp{os.getpid()}-{time.monotonic_ns()}")
        temporary.write_text(json.dumps(self._cursor))
        temporary.replace(self._cursor_path)


def first_line(error: Exception) -> str:
    """Returns the first line of an error for display, without secrets."""
    return printable(hide_secrets((str(error).strip() or type(error).__name__).splitlines()[0][:4000]), limit=160)


def new_cursor(uri: str, run_id: str) -> dict[str, Any]:
    """Returns the cursor of a run that has received nothing."""
    return {"uri": uri, "run_id": run_id, "offsets": {}, "steps": {}, "artifacts": [], "size": 0, "sessions": []}


def load_cursor(path: Path) -> dict[str, Any]:
    """Reads a cursor; empty if missing, or if one of its values has a wrong type."""
    try:
        loaded = read_json(path)
    except (OSError, FoveaError):
        return {}
    kinds = {"uri": str, "run_id": str, "offsets": dict, "steps": dict, "artifacts": list}
    if not isinstance(loaded, dict) or any(not isinstance(loaded.get(key), kind) for key, kind in kinds.items()):
        return {}
    if type(loaded.setdefault("size", 0)) is not int or type(loaded.setdefault("sessions", [])) is not list:
        return {}
    numbers = [loaded["size"], *loaded["offsets"].values(), *loaded["steps"].values()]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in numbers) or any(
        type(a) is not str for a in (*loaded["artifacts"], *loaded["sessions"])
    ):
        return {}
    return loaded
