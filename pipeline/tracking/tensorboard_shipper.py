"""Copies journals to one TensorBoard event file in the run directory: metrics, images, and tables and settings as text.

The file grows over all attempts. The cursor holds its size after the last record: what a killed process wrote beyond it is cut
off and written again, so no point occurs twice.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

from pipeline.errors import DataError, FoveaError
from pipeline.masking import printable
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.shipper import JournalShipper, first_line, new_cursor
from pipeline.untrusted import read_bytes

FOLDER = "tensorboard"
_IMAGES = (".png", ".jpg", ".jpeg")
_TEXTS = (".json", ".yaml", ".yml", ".txt", ".md", ".jsonl", ".log")
_MOST = 32 << 20  # maximum size of an image, bytes
_MOST_TEXT = 1 << 16  # characters
_ROWS = 200  # rows of a table


class TensorBoardShipper(JournalShipper):
    """Sends all journals of a run to an event file in ``<run>/tensorboard``; see :class:`JournalShipper`.

    Args:
        folder: ``<run>/tracking``.
        name: name of the run; unused, since TensorBoard shows the directory.
        log: receives messages.
    """

    tracker: ClassVar[str] = "TensorBoard"

    def __init__(self, folder: Path, *, name: str = "", log: Callable[[str], None] = lambda _: None) -> None:
        super().__init__(folder, uri=FOLDER, log=log, cursor="cursor-tensorboard.json")
        self._file: IO[bytes] | None = None

    def _path(self) -> Path:
        """The event file; its name holds when it was made, which is all that is taken from the cursor."""
        made = str(self._cursor["run_id"])
        made = made if made.isdigit() and len(made) < 16 else "0"
        return self._root / FOLDER / f"events.out.tfevents.{made}.fovea"

    def _connect(self) -> None:
        if self._file is not None and self._path().exists():
            return
        self._disconnect(failed=True)
        if not self._cursor["run_id"] or not self._is_current():
            self._cursor = new_cursor(FOLDER, str(int(time.time())))
            while self._path().exists():
                self._cursor["run_id"] = str(int(self._cursor["run_id"]) + 1)
        path = self._path()
        RunDirectory(self._root).own_folder(FOLDER)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.fdopen(os.open(path, flags, 0o666), "r+b")
        self._file.truncate(self._cursor["size"])
        self._file.seek(self._cursor["size"])
        if not self._cursor["size"]:
            self._write([{"file_version": "brain.Event:2", "wall_time": time.time()}])
            self._write_cursor()

    def _is_current(self) -> bool:
        try:
            return self._path().lstat().st_size >= self._cursor["size"]
        except OSError:
            return False

    def _disconnect(self, *, failed: bool) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _send(self, records: list[dict[str, Any]]) -> None:
        newest = dict(self._cursor["steps"])
        events: list[dict[str, Any]] = []
        for record in records:
            if record["kind"] == "metrics":
                values = [_scalar(key, value) for key, value in self._fresh(record, newest).items()]
                if values:
                    events.append({"wall_time": record["t"], "step": record["step"], "summary": _summary(values)})
            elif record["kind"] in ("params", "tags"):
                step = max(newest.values(), default=0)
                text = _table([("name", "value"), *sorted(record["values"].items())])
                title = "settings" if record["kind"] == "params" else "state"
                events.append({"wall_time": record["t"], "step": step, "summary": _summary([_text(title, text)])})
        self._write(events)
        self._cursor["steps"] = newest

    def _upload(self, path: Path) -> None:
        step = max(self._cursor["steps"].values(), default=0)
        try:
            value = self._value(path)
        except (FoveaError, OSError, ValueError, csv.Error) as error:  # the file's own fault, which no later attempt changes
            self._log(
                f"{printable(path.name)} cannot be shown in TensorBoard ({first_line(error)}); it stays in the run directory"
            )
            return
        if value is None:
            self._log(f"{printable(path.name)} stays in the run directory: TensorBoard shows images, tables and text only")
            return
        self._write([{"wall_time": time.time(), "step": step, "summary": _summary([value])}])

    def _value(self, path: Path) -> Any:
        """The value that shows a file; ``None`` if TensorBoard has none for its kind."""
        title, kind = f"{path.parent.name}/{path.stem}", path.suffix.lower()
        if kind in _IMAGES:
            return _image(title, read_bytes(path, limit=_MOST, error=DataError))
        if kind in (".csv", ".tsv"):
            text = read_bytes(path, limit=_MOST, error=DataError).decode("utf-8", "replace")
            rows = csv.reader(io.StringIO(text), delimiter="," if kind == ".csv" else "\t")
            return _text(title, _table([row for row, _ in zip(rows, range(_ROWS + 1), strict=False)]))
        if kind in _TEXTS:
            text = read_bytes(path, limit=_MOST, error=DataError).decode("utf-8", "replace")[:_MOST_TEXT]
            return _text(title, "\n".join(f"    {line}" for line in text.splitlines()))
        return None

    def _write(self, events: list[dict[str, Any]]) -> None:
        """Appends events and syncs them; the size goes into the cursor, which the caller writes."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            raise OSError("the event file is closed")
        writer = RecordWriter(self._file)
        for event in events:
            writer.write(Event(**event).SerializeToString())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._cursor["size"] = self._file.tell()


def _summary(values: list[Any]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary(value=values)


def _scalar(key: str, value: float) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=key, simple_value=value)


def _image(title: str, data: bytes) -> Any:
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
        width, height = image.size
    encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary.Value(tag=title, image=encoded)


def _text(title: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode("utf-8", "replace")], tensor_shape=shape)
    return Summary.Value(tag=f"{title}/text_summary", metadata=plugin, tensor=tensor)


def _table(rows: list[Any]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = [" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    return "\n".join([f"| {lines[0]} |", "|---" * len(rows[0]) + "|", *(f"| {line} |" for line in lines[1:])]) if rows else ""
