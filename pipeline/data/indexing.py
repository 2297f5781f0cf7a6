"""Finds the shards of a data set and indexes them: once per start of a run, by one process.

The other processes map what it wrote, without asking storage for the shards: a file in ``sets`` beside the indexes names the
index of some patterns. They compare the fingerprints with those of the first rank afterwards, see :mod:`launch.rank_data`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.data import storage
from pipeline.data.formats.channels import required
from pipeline.data.index.build import build
from pipeline.data.index.fields import Fields
from pipeline.data.index.filters import narrow
from pipeline.data.index.manifest import SIDECARS, Manifest
from pipeline.data.order.order import Source
from pipeline.data.selections.apply import Chosen, select
from pipeline.data.settings import DataSettings
from pipeline.errors import DataError
from pipeline.runtime.locks import lock
from pipeline.untrusted import plain_name, read_json

_START_GRACE = 20.0  # seconds
Progress = Callable[[int, int, Any], None]


class HasData(Protocol):
    """Settings with a section ``data``: those of a run, or of a :class:`pipeline.data.ShardDataset`."""

    @property
    def data(self) -> DataSettings:
        """Where samples are stored and how they are read."""
        ...


def fields(config: HasData) -> Fields:
    """Returns which members make a sample, according to the settings."""
    d = config.data
    return Fields(
        images=d.images,
        caption=d.caption_extension,
        caption_lines=d.caption_lines,
        label=d.label_extension,
        min_side=d.min_side,
        max_pixels=d.max_pixels,
        channels=required(d.channels),
    )


def open_storage(config: HasData, *, at_start: bool = False) -> storage.Storage:
    """Returns access to a run's shards. At startup it times out sooner: no progress can be lost yet, and the user is waiting."""
    settings = config.data.storage
    return storage.Storage(
        settings.model_copy(update={"outage_timeout": min(settings.outage_timeout, _START_GRACE)}) if at_start else settings
    )


@dataclass(frozen=True)
class Indexer:
    """Indexes the data sets of a run.

    Attributes:
        config: the settings.
        progress: called after each shard that was indexed.
        reuse: use an index that is there without asking storage whether the shards have changed; another process has done so.
    """

    config: HasData
    progress: Progress | None = None
    reuse: bool = False

    def one(self, patterns: Sequence[str], require: tuple[str, ...] = ()) -> Manifest:
        """Returns the index of the shards that some patterns name.

        Args:
            patterns: paths or URLs of shards.
            require: parts without which a sample is excluded, of ``caption``, ``label`` and ``segmentation``.

        Raises:
            DataError: no shard matches, or shards cannot be used.
        """
        return self.several({"": patterns}, require)[0]

    def training_set(self, require: tuple[str, ...] = ()) -> tuple[Manifest, tuple[Source, ...]]:
        """Returns the index of the training shards, and the data sets that they consist of; no data sets without a mixture.

        Args:
            require: see :meth:`one`.

        Raises:
            DataError: see :meth:`several`.
        """
        data = self.config.data
        selected = bool(data.selection or any(source.selection for source in data.sources or ()))
        required = () if selected else require
        if data.sources is None:
            manifest = self.one(data.shards, required)
            if selected:
                manifest = select(manifest, [Chosen(0, len(manifest.shards), data.selection)], require, verify=not self.reuse)
            return manifest, ()
        manifest, counts = self.several(_groups(data), required)
        sources = _sources(data, counts)
        if selected:
            chosen = [
                Chosen(source.first, source.shards, setting.selection, f"data.sources: selection of {source.name}")
                for source, setting in zip(sources, data.sources, strict=True)
            ]
            manifest = select(manifest, chosen, require, verify=not self.reuse)
        return manifest, sources

    def existing(self) -> tuple[Manifest, tuple[Source, ...]] | None:
        """Returns what :meth:`training_set` does without selections, if the index is there; storage is not asked."""
        data = self.config.data
        root, groups = data.index_root, _groups(data)
        known = self._known(root, root / "sets" / f"{self._name(groups)}.json", (), len(groups))
        return None if known is None else (known[0], _sources(data, known[1]))

    def several(self, groups: dict[str, Sequence[str]], require: tuple[str, ...] = ()) -> tuple[Manifest, tuple[int, ...]]:
        """Returns one index of several data sets, and the number of shards of each.

        Args:
            groups: patterns of each data set, by its name.
            require: see :meth:`one`.

        Raises:
            DataError: no shard matches, shards cannot be used, or two data sets share a shard.
        """
        root = self.config.data.index_root
        file = root / "sets" / f"{self._name(groups)}.json"
        signed = any(
            "://" in pattern and "?" in pattern for patterns in groups.values() for pattern in patterns
        )  # signatures are stored nowhere
        if self.reuse and not signed and (known := self._known(root, file, require, len(groups))) is not None:
            return known
        store = open_storage(self.config, at_start=True)
        parts = {name: storage.expand(patterns, store) for name, patterns in groups.items()}
        _check_apart(parts)
        manifest = self._built([url for part in parts.values() for url in part], require)
        counts = tuple(len(part) for part in parts.values())
        with contextlib.suppress(OSError):  # without the file, ranks find the shards by themselves
            file.unlink(missing_ok=True)
            document = {"index": Path(manifest.directory).relative_to(root).parts[0], "shards": counts}
            storage.write_atomically(file, json.dumps(document).encode())
        return manifest, counts

    def _name(self, groups: dict[str, Sequence[str]]) -> str:
        """Name of the file for some patterns, equal in all processes of a run."""
        patterns = {
            name: [one if "://" in one else os.path.abspath(os.path.expanduser(one)) for one in map(str, part)]
            for name, part in groups.items()
        }
        rules = [patterns, fields(self.config).document(), self.config.data.on_truncated_shard]
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def _known(self, root: Path, file: Path, require: tuple[str, ...], sets: int) -> tuple[Manifest, tuple[int, ...]] | None:
        try:
            document = read_json(file)
            manifest = Manifest.load(_folder(root / plain_name(document["index"], where=str(file)), require))
            counts = tuple(int(n) for n in document["shards"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, DataError):
            return None
        if len(counts) != sets or min(counts, default=0) < 1:
            return None
        fits = (
            sum(counts) == len(manifest.shards) and manifest.rules == fields(self.config) and manifest.fields.require == require
        )
        return (manifest, counts) if fits else None

    def _built(self, urls: Sequence[str], require: tuple[str, ...]) -> Manifest:
        directory = self.config.data.index_folder(urls)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = (directory / ".lock").open("a")
        except OSError as error:
            raise DataError(
                f"the index of the shards cannot be stored here ({error.strerror})",
                where=str(directory),
                hint="Set data.index to a folder",
            ) from error
        with file:
            lock(file.fileno(), file.name)
            manifest = build(
                urls,
                directory,
                fields=fields(self.config),
                on_truncated=self.config.data.on_truncated_shard,
                progress=self.progress,
                store=open_storage(self.config, at_start=True),
                sidecars=sidecar_folder(self.config.data.index_root, directory),
            )
            return narrow(manifest, _folder(directory, require), require, self.progress) if require else manifest


def indexed(
    config: HasData, patterns: Sequence[str], progress: Progress | None = None, *, require: tuple[str, ...] = ()
) -> Manifest:
    """Finds and indexes shards; an existing index is reused where the shards have not changed. See :class:`Indexer`."""
    return Indexer(config, progress).one(patterns, require)


def sidecar_folder(root: Path, directory: Path) -> Path:
    """Returns the directory of the sidecars: one for all data sets, or the data set's own where another user owns that one."""
    shared = root / SIDECARS
    try:
        shared.mkdir(parents=True, exist_ok=True)
    except OSError:
        return directory / SIDECARS
    return shared if os.access(shared, os.W_OK | os.X_OK) else directory / SIDECARS


def _groups(data: DataSettings) -> dict[str, Sequence[str]]:
    """Patterns of the training shards by data set."""
    return {"": data.shards} if data.sources is None else {source.name: source.shards for source in data.sources}


def _sources(data: DataSettings, counts: Sequence[int]) -> tuple[Source, ...]:
    """The data sets of a mixture, from their numbers of shards."""
    firsts = itertools.accumulate((0, *counts[:-1]))
    return tuple(
        Source(source.name, first, count, source.weight, source.repeat or 1.0)
        for source, first, count in zip(data.sources or (), firsts, counts, strict=data.sources is not None)
    )


def _folder(directory: Path, require: tuple[str, ...]) -> Path:
    return directory / f"with-{'-'.join(require)}" if require else directory


def _check_apart(parts: dict[str, list[str]]) -> None:
    owner: dict[str, str] = {}
    for name, urls in parts.items():
        for url in urls:
            if owner.setdefault(storage.absolute(url), name) != name:
                raise DataError(
                    f"the data sets {owner[storage.absolute(url)]!r} and {name!r} share a shard",
                    where=url,
                    hint="Give each shard to one set of data.sources; repeat or weight say how often it is seen",
                )
