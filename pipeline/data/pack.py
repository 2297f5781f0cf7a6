"""Writing shards: WebDataset tars whose bytes depend on nothing but the samples.

Times, owners and modes are fixed, so packing the same samples twice gives the same files. A shard is written under a
temporary name and renamed when it is whole.
"""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.data import tar
from pipeline.data.index import judge
from pipeline.data.random import permutation
from pipeline.errors import DataError

_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".jp2", ".ppm", ".gif", ".avif", ".heic"}
_EXTENSIONS = {
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "tiff": "tif",
    "bmp": "bmp",
    "jpeg2000": "jp2",
    "pnm": "ppm",
}
_SHUFFLE = 0x9ACC  # names the draw


class ShardWriter:
    """Writes samples into ``<prefix>-00000.tar``, ``<prefix>-00001.tar``… of a directory.

    Use it as a context manager: after an exception the unfinished shard is removed.

    Args:
        directory: made if it is not there.
        prefix: begins the names of the shards.
        samples_per_shard: samples after which the next shard begins.
        bytes_per_shard: likewise for the bytes of the members.

    Attributes:
        shards: paths of the finished shards.
        samples: samples written so far.
    """

    def __init__(
        self, directory: str | Path, prefix: str, *, samples_per_shard: int = 10_000, bytes_per_shard: int = 400_000_000
    ) -> None:
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise DataError("a shard must hold at least one sample", where="samples_per_shard", mend="Give a positive number.")
        self.shards: list[str] = []
        self.samples = 0
        self._folder = Path(directory)
        self._prefix = prefix
        self._limits = samples_per_shard, bytes_per_shard
        self._in_shard = self._bytes = 0
        self._tar: tarfile.TarFile | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot be made ({error.strerror})", where=str(directory), mend="Give another directory.") from error

    def write(self, sample: Mapping[str, Any]) -> None:
        """Appends a sample: ``__key__`` and one entry for each extension.

        Values are bytes, text (written as UTF-8), integers (as decimal text) or what JSON can hold.

        Raises:
            DataError: the key does not make a name that reads back as this key.
        """
        key = sample["__key__"]
        members = [(f"{key}.{extension}", _encode(value)) for extension, value in sample.items() if extension != "__key__"]
        for name, _ in members:
            parts = tar.split_name(name)
            if parts is None or parts[0] != key:
                raise DataError(f"key {key!r} cannot be used", where=name, mend="Use a key without dots in its last part.")
        size = sum(len(data) for _, data in members)
        most, room = self._limits
        if self._tar is not None and (self._in_shard >= most or self._bytes + size > room):
            self._finish()
        if self._tar is None:
            self._tar = tarfile.TarFile.open(self._temporary, "w", format=tarfile.PAX_FORMAT, encoding="utf-8")
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            self._tar.addfile(entry, BytesIO(data))
        self._in_shard, self._bytes, self.samples = self._in_shard + 1, self._bytes + size, self.samples + 1

    def close(self) -> None:
        """Finishes the shard that is open."""
        if self._tar is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            self._tar.close()
            self._tar = None
            self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{self._prefix}-{len(self.shards):05d}.tar.{os.getpid()}.tmp"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path = self._folder / f"{self._prefix}-{len(self.shards):05d}.tar"
        os.replace(self._temporary, path)
        self.shards.append(str(path))
        self._in_shard = self._bytes = 0


@dataclass(frozen=True)
class PackReport:
    """What became of the pictures.

    Attributes:
        shards: paths of the shards written.
        packed: samples in them.
        skipped: (path, reason) of each picture left out.
        classes: class names, the position is the class number.
    """

    shards: tuple[str, ...]
    packed: int
    skipped: tuple[tuple[str, str], ...]
    classes: tuple[str, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many pictures were left out for each reason."""
        return {reason: sum(r == reason for _, r in self.skipped) for reason in sorted({r for _, r in self.skipped})}


@dataclass(frozen=True)
class _Entry:
    path: Path
    shown: str
    label: int | None = None
    caption: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def pack_folder(
    source: str | Path,
    out: str | Path,
    *,
    prefix: str = "train",
    samples_per_shard: int = 10_000,
    bytes_per_shard: int = 400_000_000,
    seed: int = 0,
    min_side: int = 16,
    max_pixels: int = 50_000_000,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PackReport:
    """Packs a folder of pictures, or the pictures that a table names, into shards.

    In a folder each sub-folder is a class (in the order of their names); pictures that lie in the folder itself have none.
    A table is a ``.csv`` with a heading, or a ``.jsonl``, with ``path`` (relative to the table) and, if wanted, ``label``
    (number or name) and ``caption``. Pictures are shuffled, keyed by ``seed``. Besides the shards ``classes.txt`` is
    written if there are class names, and ``skipped.txt`` if pictures had to be left out.

    Args:
        source: folder or table.
        out: where the shards go.
        prefix: begins the names of the shards.
        samples_per_shard: see :class:`ShardWriter`.
        bytes_per_shard: see :class:`ShardWriter`.
        seed: of the shuffling.
        min_side: pictures with a smaller side are left out.
        max_pixels: larger pictures are left out.
        overwrite: replace shards of the same prefix.
        progress: called with (pictures seen, pictures in all).

    Raises:
        DataError: nothing to pack, a malformed table, or shards that are there already.
    """
    source, out = Path(source), Path(out)
    old = sorted(out.glob(f"{prefix}-[0-9]*.tar")) if out.is_dir() else []
    if old and not overwrite:
        raise DataError(
            f"{len(old)} shards are there already",
            where=str(old[0]),
            mend="Choose another directory or prefix, or allow overwriting.",
        )
    entries, classes = _entries(source)
    if not entries:
        raise DataError(
            "holds no pictures", where=str(source), mend="Point to a folder with one sub-folder a class, or to a table."
        )
    for shard in old:
        shard.unlink()
    skipped: list[tuple[str, str]] = []
    with ShardWriter(out, prefix, samples_per_shard=samples_per_shard, bytes_per_shard=bytes_per_shard) as writer:
        for seen, position in enumerate(permutation(len(entries), seed, _SHUFFLE), start=1):
            entry = entries[position]
            sample, reason = _sample(entry, writer.samples, min_side, max_pixels)
            if sample is None:
                skipped.append((entry.shown, reason))
            else:
                writer.write(sample)
            if progress is not None:
                progress(seen, len(entries))
    skipped.sort()
    if classes:
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    if skipped:
        text = "".join(f"{reason}\t{shown}\n" for shown, reason in skipped)
        (out / "skipped.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
    if not writer.samples:
        raise DataError(
            f"none of {len(entries)} pictures can be used", where=str(source), mend=f"See {out / 'skipped.txt'} for the reasons."
        )
    return PackReport(tuple(writer.shards), writer.samples, tuple(skipped), classes)


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value).encode()
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogateescape")


def _sample(entry: _Entry, number: int, min_side: int, max_pixels: int) -> tuple[dict[str, Any] | None, str]:
    try:
        data = entry.path.read_bytes()
    except FileNotFoundError:
        return None, "missing_file"
    except OSError:
        return None, "unreadable"
    verdict = judge(data, min_side=min_side, max_pixels=max_pixels)
    if verdict.status != "ok":
        return None, verdict.status
    sample: dict[str, Any] = {"__key__": f"{number:09d}", _EXTENSIONS[verdict.format]: data}
    if entry.label is not None:
        sample["cls"] = entry.label
    if entry.caption:
        sample["txt"] = entry.caption
    sample["json"] = {**entry.extra, "path": entry.shown, "width": verdict.width, "height": verdict.height}
    return sample, ""


def _entries(source: Path) -> tuple[list[_Entry], tuple[str, ...]]:
    if source.is_dir():
        return _folder_entries(source)
    if source.suffix.lower() in (".csv", ".tsv", ".jsonl") and source.is_file():
        return _table_entries(source)
    raise DataError(
        "is neither a folder nor a table" if source.exists() else "does not exist",
        where=str(source),
        mend="Point to a folder with one sub-folder a class, or to a .csv or .jsonl with the columns path, caption, label.",
    )


def _folder_entries(source: Path) -> tuple[list[_Entry], tuple[str, ...]]:
    classes = tuple(sorted(child.name for child in source.iterdir() if child.is_dir() and not child.name.startswith(".")))
    numbers = {name: number for number, name in enumerate(classes)}
    entries = []
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in _IMAGES and path.is_file():
            inside = path.relative_to(source)
            entries.append(_Entry(path, inside.as_posix(), numbers.get(inside.parts[0]) if len(inside.parts) > 1 else None))
    return entries, classes


def _table_entries(source: Path) -> tuple[list[_Entry], tuple[str, ...]]:
    rows = list(_table_rows(source))
    labels = [str(row["label"]).strip() for row in rows if row.get("label") not in (None, "")]
    numeric = all(label.isdecimal() for label in labels)
    classes = () if numeric else tuple(sorted(set(labels)))
    entries = []
    for row in rows:
        label = None if row.get("label") in (None, "") else str(row["label"]).strip()
        number = None if label is None else int(label) if numeric else classes.index(label)
        path, caption = str(row["path"]), row.get("caption")
        extra = {name: value for name, value in row.items() if name not in ("path", "label", "caption") and isinstance(name, str)}
        entries.append(_Entry(source.parent / path, path, number, None if caption is None else str(caption), extra))
    return entries, classes


def _table_rows(source: Path) -> Iterator[dict[str, Any]]:
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", where=str(source), mend="Give a table in UTF-8.") from error
    if source.suffix.lower() == ".jsonl":
        for line, content in enumerate(text.splitlines(), start=1):
            if not content.strip():
                continue
            try:
                row = json.loads(content)
            except ValueError as error:
                raise DataError(f"is no JSON ({error})", where=f"{source}:{line}", mend="Write one object a line.") from error
            if not isinstance(row, dict) or not row.get("path"):
                raise DataError("has no path", where=f"{source}:{line}", mend='Write lines such as {"path": "a.jpg"}.')
            yield row
        return
    reader = csv.DictReader(text.splitlines(), delimiter="\t" if source.suffix.lower() == ".tsv" else ",")
    if "path" not in (reader.fieldnames or ()):
        raise DataError(
            "has no column 'path'", where=str(source), mend="Name the columns path, caption, label in the first line."
        )
    for row in reader:
        if not row["path"]:
            raise DataError("has no path", where=f"{source}:{reader.line_num}", mend="Fill the column.")
        yield dict(row)
