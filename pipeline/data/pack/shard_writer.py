"""Writes shards: WebDataset tars whose bytes depend only on the samples.

The members are written by webdataset's ``TarWriter`` with fixed times, owners and modes, so packing the same samples twice gives
the same files. Around it: checked keys, members in the order of the sample, limits of a shard, and a temporary name until the
shard is complete and synced. :mod:`pipeline.data.pack.packer` decides what is packed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pipeline.data.index import tar
from pipeline.data.index.captions import clean_text
from pipeline.data.pack.keys import is_safe
from pipeline.errors import DataError
from pipeline.untrusted import printable


class ShardWriter:
    """Writes samples into ``<prefix>-00000.tar``, ``<prefix>-00001.tar``… of a directory.

    Use it as a context manager: after an exception the unfinished shard is removed.

    Args:
        directory: created if missing.
        prefix: prefix of the shards' names.
        samples_per_shard: samples after which the next shard begins.
        bytes_per_shard: likewise for the bytes of the members.
        shards: finished shards of an earlier attempt, to continue after.
        samples: samples in them.
        finished: called with the path of each completed shard.

    Attributes:
        shards: paths of the finished shards.
        samples: samples written so far.
    """

    def __init__(
        self,
        directory: str | Path,
        prefix: str,
        *,
        samples_per_shard: int = 10_000,
        bytes_per_shard: int = 400_000_000,
        shards: Sequence[str] = (),
        samples: int = 0,
        finished: Callable[[Path], None] | None = None,
    ) -> None:
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise DataError("a shard must hold at least one sample", where="samples_per_shard", hint="Choose a positive number")
        self.shards = list(shards)
        self.samples = samples
        self._finished = finished
        self._folder = Path(directory)
        self._prefix = prefix
        self._limits = samples_per_shard, bytes_per_shard
        self._in_shard = self._bytes = 0
        self._tar: Any = None  # webdataset.TarWriter
        self._file: IO[bytes] | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot be created ({error.strerror})", where=str(directory), hint="Choose another directory"
            ) from error

    def write(self, sample: Mapping[str, Any]) -> None:
        """Appends a sample: ``__key__`` and one entry for each extension.

        Values are bytes, text (written as UTF-8), integers (as decimal text) or JSON values.

        Raises:
            DataError: the key does not make a name that reads back as this key, leads out of the directory it is unpacked to, or
                contains control characters.
        """
        key = sample["__key__"]
        if not is_safe(key):
            hint = "Clean it with pipeline.data.pack.keys.safe_key"
            raise DataError(f"key {printable(key, limit=80)!r} cannot be used", where=self._prefix, hint=hint)
        members = {extension: _encode(value) for extension, value in sample.items() if extension != "__key__"}
        for name in (f"{key}.{extension}" for extension in members):
            if not is_safe(name):
                hint = "Clean it with pipeline.data.pack.keys.safe_extension"
                raise DataError("the extension cannot be used", where=printable(name, limit=80), hint=hint)
            parts = tar.split_name(name)
            if parts is None or parts[0] != key:
                raise DataError(
                    f"key {key!r} cannot be used", where=printable(name), hint="Use a key without dots in its last part"
                )
        size = sum(map(len, members.values()))
        most, room = self._limits
        if self._tar is not None and (self._in_shard >= most or self._bytes + size > room):
            self._finish()
        if self._tar is None:
            self._file = self._temporary.open("wb")
            self._tar = _tar_writer(self._file)
        for extension, data in members.items():  # one call each, since TarWriter sorts the members of a call
            self._tar.write({"__key__": key, extension: data})
        self._in_shard, self._bytes, self.samples = self._in_shard + 1, self._bytes + size, self.samples + 1

    def close(self) -> None:
        """Finishes the open shard."""
        if self._tar is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None and self._file is not None:
            with suppress(OSError):  # closing writes the end of the tar, which fails again on a full disk
                self._tar.close()
            with suppress(OSError):
                self._file.close()
            self._tar = None
            self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self._folder / f".{self._prefix}-{len(self.shards):05d}.tar.{os.getpid()}.tmp"

    def _finish(self) -> None:
        if self._tar is None or self._file is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._tar = None
        path = self._folder / f"{self._prefix}-{len(self.shards):05d}.tar"
        os.replace(self._temporary, path)
        self.shards.append(str(path))
        self._in_shard = self._bytes = 0
        if self._finished is not None:
            self._finished(path)


def _tar_writer(file: IO[bytes]) -> Any:
    import webdataset  # here, since it imports torch

    # keep_meta admits extensions that begin with an underscore. Long and non-ASCII names become PAX headers.
    options = {"encoder": False, "keep_meta": True, "format": "PAX_FORMAT"}
    return webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, **options)


def _encode(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return clean_text(value)[0].encode("utf-8")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value).encode()
    return clean_text(json.dumps(value, sort_keys=True, ensure_ascii=False))[0].encode("utf-8")
