"""Copies journals to Weights & Biases: one W&B run over all attempts of a run, online or offline.

Heeds W&B's own variables: ``WANDB_MODE``, ``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_BASE_URL``, ``WANDB_API_KEY``,
``WANDB_NAME``, ``WANDB_RUN_ID``, ``WANDB_DIR`` and the rest. Without ``WANDB_MODE`` it is online if there is a key, and offline
otherwise: each attempt then leaves a directory ``wandb/offline-run-…``, which ``wandb sync --append`` sends later.

W&B's process on this node receives records and writes them to a file some time later. The cursor on disk therefore stays where
the session began until W&B has closed its file. After a kill, the rows in the files of such sessions are counted, and sending
continues behind them: nothing is lost and no point occurs twice.
"""

from __future__ import annotations

import contextlib
import csv
import io
import netrc
import os
import re
import secrets
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

from pipeline.errors import DataError, FoveaError
from pipeline.masking import printable, shown_address
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.shipper import JournalShipper, first_line, load_cursor, new_cursor
from pipeline.tracking.wandb_files import is_ended, is_open, logged
from pipeline.untrusted import read_bytes

_PUBLIC = "https://api.wandb.ai"
_IMAGES = (".png", ".jpg", ".jpeg")
_MOST = 32 << 20  # maximum size of a table, bytes
_ROWS = 1000  # rows of a table
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SESSION = re.compile(r"(offline-)?run-[A-Za-z0-9_-]{1,100}")
_PATIENCE = 60.0  # seconds that the end of a run waits for uploads


class WandbShipper(JournalShipper):
    """Sends all journals of a run to one W&B run; see :class:`JournalShipper`.

    Args:
        folder: ``<run>/tracking``.
        project: W&B project, unless ``WANDB_PROJECT`` is set.
        name: name of the run, unless ``WANDB_NAME`` is set.
        log: receives messages.
    """

    tracker: ClassVar[str] = "W&B"

    def __init__(self, folder: Path, *, project: str, name: str, log: Callable[[str], None] = lambda _: None) -> None:
        self._project = os.environ.get("WANDB_PROJECT") or project
        self._entity = os.environ.get("WANDB_ENTITY") or ""
        base = shown_address(os.environ.get("WANDB_BASE_URL") or _PUBLIC)  # the cursor lies in the run directory
        super().__init__(folder, uri=f"{base.rstrip('/')}/{self._entity}/{self._project}", log=log, cursor="cursor-wandb.json")
        self._name = os.environ.get("WANDB_NAME") or name
        self._wandb: Any = None
        self._wandb_run: Any = None
        self._failed = False
        self._skip = 0  # rows that sessions which were not closed have written
        self._closed = True

    @property
    def where(self) -> str:
        """Where the tracker is, for messages."""
        return f"{super().where} ({mode()})"

    def _connect(self) -> None:
        if self._wandb_run is not None:
            return
        if not _RUN_ID.fullmatch(str(self._cursor["run_id"])):
            self._cursor = new_cursor(self._uri, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
            super()._write_cursor()
        import wandb

        folder = os.environ.get("WANDB_DIR") or str(RunDirectory(self._root).own_folder("wandb").parent)
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        run_id = self._cursor["run_id"]
        names = [name for name in self._cursor["sessions"] if _SESSION.fullmatch(name)]
        files = [Path(folder) / "wandb" / name / f"run-{run_id}.wandb" for name in names]
        self._await(lambda: not any(map(is_open, files)), "W&B's process of an earlier attempt still writes")
        self._skip = sum(map(logged, files))
        self._wandb_run = wandb.init(
            project=self._project,
            entity=self._entity or None,
            name=self._name,
            id=self._cursor["run_id"],
            dir=folder,
            mode=cast(Any, mode()),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                quiet=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
                finish_timeout=_PATIENCE,
            ),
        )
        self._cursor["sessions"].append(Path(self._wandb_run.dir).parent.name)
        super()._write_cursor()
        self._closed = False
        self._wandb_run.define_metric("step")
        self._wandb_run.define_metric("*", step_metric="step")

    def _disconnect(self, *, failed: bool) -> None:
        run, self._wandb_run = self._wandb_run, None
        if run is None:
            return
        try:
            run.finish(exit_code=int(failed or self._failed))
            file = Path(run.dir).parent / f"run-{self._cursor['run_id']}.wandb"
            if mode() == "offline":  # it may still be writing when finish returns
                self._await(lambda: is_ended(file), f"{file.name} has no end")
        except Exception as error:  # the journal has everything
            failed = True
            self._log(f"{self.tracker} has not closed its file ({first_line(error)})")
        if failed:
            self._cursor = load_cursor(self._cursor_path) or new_cursor(self._uri, self._cursor["run_id"])
        else:
            self._cursor["sessions"], self._closed = [], True
            super()._write_cursor()

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for W&B's process, which writes its file on its own.

        Raises:
            TimeoutError: with ``what``.
        """
        end = time.monotonic() + _PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(what)
            time.sleep(0.05)

    def _write_cursor(self) -> None:
        """The cursor on disk follows when W&B has closed its file."""
        if self._closed:
            super()._write_cursor()

    def _send(self, records: list[dict[str, Any]]) -> None:
        newest = dict(self._cursor["steps"])
        for record in records:
            if record["kind"] == "metrics":
                fresh = self._fresh(record, newest)
                if fresh and self._skip:
                    self._skip -= 1
                elif fresh:
                    self._wandb_run.log({**fresh, "step": record["step"]})
            elif record["kind"] == "params":
                self._wandb_run.config.update(record["values"], allow_val_change=True)
            elif record["kind"] == "tags":
                self._wandb_run.summary.update(record["values"])
                self._failed = record["values"].get("fovea.state", "") == "failed"
        self._cursor["steps"] = newest

    def _upload(self, path: Path) -> None:
        title, kind = f"{path.parent.name}/{path.stem}", path.suffix.lower()
        step = max(self._cursor["steps"].values(), default=0)
        try:
            shown = self._shown(path, kind)
        except (FoveaError, OSError, ValueError, csv.Error) as error:  # the file's own fault, which no later attempt changes
            self._log(f"{printable(path.name)} cannot be shown in W&B ({first_line(error)}); it stays in the run directory")
            return
        if shown is not None:
            self._wandb_run.log({title: shown, "step": step})
        else:
            self._wandb_run.save(str(path), base_path=str(self._root), policy="now")

    def _shown(self, path: Path, kind: str) -> Any:
        """The image or table of a file; ``None`` if it is neither."""
        if kind in _IMAGES:
            return self._wandb.Image(str(path))
        if kind in (".csv", ".tsv"):
            text = read_bytes(path, limit=_MOST, error=DataError).decode("utf-8", "replace")
            rows = list(islice(csv.reader(io.StringIO(text), delimiter="," if kind == ".csv" else "\t"), _ROWS + 1))
            width = len(rows[0]) if rows else 0
            return self._wandb.Table(columns=rows[0] if rows else [], data=[row for row in rows[1:] if len(row) == width])
        return None


def mode() -> Any:
    """Returns ``WANDB_MODE`` if it is set; else ``online`` if there is a key for the server, and ``offline`` otherwise."""
    chosen = os.environ.get("WANDB_MODE", "").strip()
    if chosen:
        return chosen
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _PUBLIC).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc(os.environ.get("NETRC")).authenticators(host):
            return "online"
    return "offline"
