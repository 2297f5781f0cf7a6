"""A folder of embeddings while it is being written, by any number of processes that may be killed at any moment.

The unit of work is a part of one shard, whose size depends on what is embedded and on nothing else. Every part is a file, written
under a temporary name and renamed; when all parts of a shard are there, its file is put together. What is finished is never
written again, so that neither interruptions nor the number of processes change a byte.

<dir>/.progress/settings.json     what is embedded; another command may not continue it
<dir>/.progress/parts/            one Parquet file for each part, until its shard is put together
<dir>/.progress/shards/           what is known of each shard's file: written before the file is renamed
<dir>/00000-<shard>.parquet       one for each shard
<dir>/bad_samples.jsonl           samples that could not be embedded
<dir>/embeddings.json             written last; then ``.progress`` is removed
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.data.embeddings import document, table
from pipeline.data.embeddings.document import EmbeddedShard, EmbeddingDocument, EmbeddingSpec, file_name
from pipeline.data.index.manifest import Manifest
from pipeline.data.storage import write_atomically
from pipeline.data.storage.parquet import open_pyarrow
from pipeline.errors import ConfigError, DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import printable, read_json, shown_address

PROGRESS = ".progress"
BAD = "bad_samples.jsonl"
_FILES = "|".join(map(re.escape, (document.FILE, BAD)))
_SAMPLES = 2048  # most samples of a part
_BYTES = 64 << 20  # of the embeddings of a part, unless one batch has more
_VISIBLE = 60.0  # seconds until another node's file must be visible
_OTHERS = "Choose another --out, or replace the embeddings that are there with --overwrite"
State = Literal["new", "resumed", "complete"]


@dataclass(frozen=True)
class Unit:
    """A part of a shard.

    Attributes:
        shard: number of the shard.
        part: number of the part.
        first, last: its rows in the index, the last exclusive.
    """

    shard: int
    part: int
    first: int
    last: int


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be embedded.

    Attributes:
        row: in the index of its shard.
        key: its name.
        reason: one word.
    """

    row: int
    key: str
    reason: str


def unit_size(spec: EmbeddingSpec) -> int:
    """Samples of a part: full batches, and a bounded number of bytes."""
    each = spec.rows_per_sample * spec.dim * (2 if spec.dtype == "float16" else 4)
    batches = min(_BYTES // each, _SAMPLES) // spec.batch_size
    return max(batches, 1) * spec.batch_size


class EmbeddingFolder:
    """A folder that is being written.

    Args:
        directory: the folder.
        spec: what is embedded.
        manifest: index of the shards.
    """

    def __init__(self, directory: Path, spec: EmbeddingSpec, manifest: Manifest) -> None:
        self.directory, self.spec, self.manifest = directory, spec, manifest
        self._progress = directory / PROGRESS
        self._size = unit_size(spec)
        self._file: IO[str] | None = None

    # ---- the first rank, before and after the others ----------------------------------------------------------------------

    def prepare(self, *, overwrite: bool = False) -> State:
        """Creates the folder, or continues it.

        Args:
            overwrite: remove embeddings that are there.

        Raises:
            ConfigError: the folder holds other embeddings or other files, or another process writes it.
            OSError: it cannot be written.
        """
        if overwrite:
            self._lock()
            _remove_all(self.directory)
        settings = self._progress / "settings.json"
        if (self.directory / document.FILE).exists():
            content = document.load(self.directory)
            self._compare(content.spec, content.fingerprint, [shard.digest for shard in content.shards])
            self._lock()
            self._remove_leftovers()
            self._remove_progress()
            return "complete"
        if not settings.exists():
            if self.directory.exists() and (others := foreign(self.directory)):
                raise _has_other_files(self.directory, others)
            for name in ("parts", "shards"):
                (self._progress / name).mkdir(parents=True, exist_ok=True)
            self._lock()
            write_atomically(settings, json.dumps(self._identity(), indent=1).encode())
            return "new"
        known = read_json(settings)
        if not isinstance(known, dict) or known.get("format") != document.FORMAT or not isinstance(known.get("digests"), list):
            raise DataError("is damaged", where=printable(str(settings)), hint="Start again with --overwrite")
        spec = document.validated(document.SPEC, known.get("spec"), printable(str(settings)))
        self._compare(spec, str(known.get("fingerprint")), known["digests"])
        self.spec = spec
        self._lock()
        for name in ("parts", "shards"):
            (self._progress / name).mkdir(exist_ok=True)
        self._remove_leftovers()
        return "resumed"

    def missing(self) -> tuple[list[Unit], list[int]]:
        """The parts that are still to be embedded, in order, and the shards of which only the file is to be put together."""
        parts = {name for name in os.listdir(self._progress / "parts") if name.endswith(".parquet")}
        units: list[Unit] = []
        waiting: list[int] = []
        for number, shard in enumerate(self.manifest.shards):
            if self.is_assembled(number):
                continue
            missing = [unit for unit in self.units(number, shard.samples) if self._part(unit).name not in parts]
            units += missing
            if not missing:
                waiting.append(number)
        return units, waiting

    def finish(self) -> tuple[EmbeddingDocument, Counter[str]]:
        """Writes the list of bad samples and the description, and removes the rest; returns the description and the reasons.

        Raises:
            DataError: a shard's file is missing.
        """
        entries, lines = [], []
        reasons: Counter[str] = Counter()
        for number, shard in enumerate(self.manifest.shards):
            entry, bad = self._entry(number)
            if entry is None:
                raise DataError("its embeddings are missing", where=printable(shard.url), hint="Run the same command again")
            entries.append(entry)
            reasons.update(one.reason for one in bad)
            lines += [
                json.dumps({"key": table.text_of(one.key), "shard": number, "row": one.row, "reason": one.reason}) + "\n"
                for one in bad
            ]
        write_atomically(self.directory / BAD, "".join(lines).encode())
        content = EmbeddingDocument(self.spec, self.manifest.fingerprint, tuple(entries))
        content.save(self.directory)
        self._remove_progress()
        return content, reasons

    def close(self) -> None:
        """Releases the lock."""
        if self._file is not None:
            self._file.close()

    # ---- every rank -------------------------------------------------------------------------------------------------------

    @property
    def scratch(self) -> Path:
        """Folder of this job's own records; it is removed at the end."""
        return self._progress

    def units(self, shard: int, samples: int) -> list[Unit]:
        """All parts of a shard."""
        firsts = range(0, samples, self._size)
        return [Unit(shard, part, first, min(first + self._size, samples)) for part, first in enumerate(firsts)]

    def write_unit(self, unit: Unit, columns: Sequence[table.Columns], bad: Sequence[BadSample]) -> None:
        """Writes a part.

        Args:
            unit: the part.
            columns: of its rows, batch by batch.
            bad: its samples without a row.
        """
        path = self._part(unit)
        pyarrow, _ = open_pyarrow(str(path))
        metadata = {"bad": json.dumps([[one.row, table.text_of(one.key), one.reason] for one in bad])}
        with table.writer(path, self.spec, metadata) as out:
            for part in columns:
                out.write_table(table.arrow_table(self.spec, part, pyarrow, str(path)))

    def assemble(self, shard: int) -> None:
        """Puts the file of a shard together from its parts; by one process only.

        Raises:
            DataError: a part is missing or damaged.
        """
        about = self.manifest.shards[shard]
        target = self.directory / file_name(shard, about.name)
        units = self.units(shard, about.samples)
        bad: list[BadSample] = []
        rows = 0
        made = self._progress / "shards" / target.name
        with table.writer(made, self.spec) as out:
            for unit in units:
                part, own = self._read_part(unit)
                bad += own
                rows += len(part)
                out.write_table(part, row_group_size=table.ROW_GROUP)
        entry = EmbeddedShard(
            url=shown_address(about.url, limit=4096),
            name=printable(about.name, limit=4096),
            digest=about.digest,
            samples=about.samples,
            file=target.name,
            rows=rows,
            bytes=made.stat().st_size,
            sha256=table.sha256(made),
            bad=len(bad),
        )
        known = {"entry": asdict(entry), "bad": [[one.row, one.key, one.reason] for one in bad]}
        write_atomically(self._known(shard), json.dumps(known).encode())
        made.replace(target)
        for unit in units:
            self._part(unit).unlink(missing_ok=True)

    def is_assembled(self, shard: int) -> bool:
        """Whether the file of a shard is complete."""
        entry, _ = self._entry(shard)
        if entry is None:
            return False
        try:
            return (self.directory / entry.file).stat().st_size == entry.bytes
        except OSError:
            return False

    def _part(self, unit: Unit) -> Path:
        return self._progress / "parts" / f"{unit.shard:05d}-{unit.part:06d}.parquet"

    def _known(self, shard: int) -> Path:
        return self._progress / "shards" / f"{shard:05d}.json"

    def _read_part(self, unit: Unit) -> tuple[Any, list[BadSample]]:
        pyarrow, parquet = open_pyarrow(str(self.directory))
        path = self._part(unit)
        end = time.monotonic() + _VISIBLE
        while not path.exists() and time.monotonic() < end:  # written by another node, whose directory entry is cached here
            time.sleep(0.2)
        where, hint = printable(str(path)), "Remove the file and run the same command again"
        try:
            with path.open("rb") as stream:
                file = parquet.ParquetFile(stream)
                part, metadata = file.read(use_threads=False), file.schema_arrow.metadata or {}
            bad = [BadSample(int(row), str(key), str(reason)) for row, key, reason in json.loads(metadata[b"bad"])]
        except FileNotFoundError as error:
            raise DataError("part is missing", where=where, hint="Run the same command again") from error
        except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"part is damaged ({printable(str(error), limit=120)})", where=where, hint=hint) from error
        part = part.replace_schema_metadata(None)
        kept = (unit.last - unit.first - len(bad)) * self.spec.rows_per_sample
        if len(part) != kept or not part.schema.equals(table.schema(self.spec, pyarrow)):
            raise DataError(f"part has {len(part)} rows instead of {kept}", where=where, hint=hint)
        return part, bad

    def _entry(self, shard: int) -> tuple[EmbeddedShard | None, list[BadSample]]:
        path = self._known(shard)
        try:
            known = read_json(path)
        except FileNotFoundError:
            return None, []
        where = printable(str(path))
        try:
            bad = [BadSample(int(row), str(key), str(reason)) for row, key, reason in known["bad"]]
            return document.validated(document.SHARD, known["entry"], where), bad
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("is damaged", where=where, hint="Remove the file and run the same command again") from error

    def _identity(self) -> dict[str, Any]:
        digests = [shard.digest for shard in self.manifest.shards]
        facts = {"spec": asdict(self.spec), "fingerprint": self.manifest.fingerprint, "digests": digests}
        return {"format": document.FORMAT, **facts}

    def _compare(self, spec: EmbeddingSpec, fingerprint: str, digests: list[Any]) -> None:
        """Refuses to continue a folder of something else; where the weights lie does not matter."""
        where = printable(str(self.directory))
        ours, theirs = _facts(self.spec), _facts(spec)
        if different := [name for name in ours if ours[name] != theirs[name]]:
            name = different[0]
            raise ConfigError(f"holds embeddings with {name} {theirs[name]}, not {ours[name]}", where=where, hint=_OTHERS)
        if fingerprint != self.manifest.fingerprint or digests != [shard.digest for shard in self.manifest.shards]:
            raise ConfigError("holds embeddings of other shards, or of another version of them", where=where, hint=_OTHERS)

    def _lock(self) -> None:
        """Holds the lock of the folder until :meth:`close`.

        Raises:
            ConfigError: another process holds it.
        """
        self.close()
        self._file = _locked(self.directory)

    def _remove_leftovers(self) -> None:
        """Removes temporary files of processes that were killed."""
        own = [path for name in (BAD, document.FILE) for path in self.directory.glob(f".{name}.*.tmp")]
        for path in [*own, *self._progress.rglob(".*.tmp")]:
            path.unlink(missing_ok=True)

    def _remove_progress(self) -> None:
        shutil.rmtree(self._progress, ignore_errors=True)


def _facts(spec: EmbeddingSpec) -> dict[str, Any]:
    """What determines the numbers, by name: not where weights lie, nor which channels people are shown."""
    facts = asdict(spec)
    image = facts.pop("image")
    if image["channels"] is not None:
        del image["channels"]["composite"]
    return {"weights": facts.pop("weights")["digest"][:16], **image, **facts}


def check_directory(directory: Path) -> None:
    """Refuses a folder that cannot become one of embeddings, before anything else is done.

    Args:
        directory: the folder.

    Raises:
        ConfigError: it has other files, or cannot be written.
        DataError: pyarrow is not installed.
    """
    open_pyarrow(str(directory))
    where = printable(str(directory))
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError("must be a folder", where=where, hint="Choose another --out")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError("is not writable", where=where, hint="Choose another --out, or change its permissions")
    known = (directory / document.FILE).exists() or (directory / PROGRESS / "settings.json").exists()
    if (others := foreign(directory)) and not known:
        raise _has_other_files(directory, others)


def _has_other_files(directory: Path, others: list[str]) -> ConfigError:
    return ConfigError(
        f"has other files, such as {printable(others[0], limit=80)!r}",
        where=printable(str(directory)),
        hint="Choose another --out: a folder that is empty or does not exist",
    )


def clear(directory: Path) -> None:
    """Removes embeddings and what belongs to them, and nothing else.

    Args:
        directory: the folder.

    Raises:
        ConfigError: another process is writing them.
    """
    held = _locked(directory)
    try:
        _remove_all(directory)
    finally:
        if held is not None:
            held.close()


def _locked(directory: Path) -> IO[str] | None:
    """Locks a folder in which embeddings are written; ``None`` if none are."""
    path = directory / PROGRESS / "lock"
    if not path.parent.is_dir():
        return None
    file = path.open("w")
    try:
        lock(file.fileno(), file.name, wait=False)
    except BlockingIOError:
        file.close()
        raise ConfigError(
            "another process is writing these embeddings",
            where=printable(str(directory)),
            hint="Wait for it, or choose another --out",
        ) from None
    return file


def _remove_all(directory: Path) -> None:
    if not directory.exists():
        return
    (directory / document.FILE).unlink(missing_ok=True)  # first: what is left is incomplete
    for name in os.listdir(directory):
        path = directory / name
        if _own(name) and not path.is_dir():
            path.unlink()
    shutil.rmtree(directory / PROGRESS, ignore_errors=True)


def foreign(directory: Path) -> list[str]:
    """Names in a folder that are not of embeddings."""
    return sorted(name for name in os.listdir(directory) if not _own(name) and name not in (PROGRESS, "job"))


def _own(name: str) -> bool:
    return bool(re.fullmatch(rf"\d{{5,}}-.+\.parquet|(?:{_FILES})|\.(?:{_FILES})\..*\.tmp", name))


def digest_of(data: bytes) -> bytes:
    """BLAKE2b-128 of an encoded image."""
    return hashlib.blake2b(data, digest_size=table.DIGEST_BYTES).digest()
