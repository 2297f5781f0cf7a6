"""Indexes the shards that a ``fovea shards`` command works on. Imports lazily."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.untrusted import printable

if TYPE_CHECKING:
    from pipeline.data.index.manifest import Manifest
    from pipeline.data.index.shard_table import Shard
    from pipeline.data.settings import DataSettings
    from pipeline.data.storage import Storage

NAMED = 20  # shards or samples printed before pointing to the report file
_MOST_PARTS = 99_999
_GRACE = 20.0  # seconds to wait during a storage outage


def part_of(text: str | None) -> tuple[int, int] | None:
    """Number and count of parts, from ``3/16``.

    Raises:
        ConfigError: it is anything else.
    """
    if text is None:
        return None
    first, slash, last = text.partition("/")
    if slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= _MOST_PARTS:
        return int(first), int(last)
    raise ConfigError(f"{text[:40]!r} names no part", where="--part", hint="Write 1/16 for the first of 16 parts, up to 16/16")


def build_index(
    settings: DataSettings,
    workers: int | None,
    report: Path | None,
    *,
    quiet: bool = False,
    check: bool = False,
    part: tuple[int, int] | None = None,
) -> tuple[Manifest, Path]:
    """Index shards with progress on stderr; write and print the report of problems.

    Args:
        settings: shards, rules and directory of the index.
        workers: processes; by default one per core.
        report: report file; by default in the index.
        quiet: whether not to print problems.
        check: whether to read the existing index too.
        part: number, from 1, and count of parts; by default all shards.

    Returns:
        The index and its directory.
    """
    from launch.progress import progress_bar
    from pipeline.data.formats.channels import required
    from pipeline.data.index.build import UnusableShards, build
    from pipeline.data.index.fields import Fields
    from pipeline.data.indexing import sidecar_folder
    from pipeline.data.inspect.report import index_report
    from pipeline.data.storage import expand

    fields = Fields(
        images=settings.images,
        caption=settings.caption_extension,
        label=settings.label_extension,
        min_side=settings.min_side,
        max_pixels=settings.max_pixels,
        channels=required(settings.channels),
    )
    store = store_at_start()
    urls = expand(list(settings.shards), store)
    folder = settings.index_folder(urls)
    if part is not None:
        number, count = part
        folder, urls = folder / f"part-{number:05d}-of-{count:05d}", urls[number - 1 :: count]
        if not urls:
            raise ConfigError(f"part {number} of {count} has no shards", where="--part", hint="Use fewer parts")
    report_file = report or folder / "report.json"
    try:
        with progress_bar("indexing") as progress:

            def on_shard(done: int, total: int, shard: Shard) -> None:
                progress(done, total, f"{printable(shard.url)}: {shard.samples} samples")

            manifest = build(
                urls,
                folder,
                fields=fields,
                workers=workers,
                on_truncated=settings.on_truncated_shard,
                progress=on_shard,
                store=store,
                sidecars=sidecar_folder(settings.index_root, folder),
                check=check,
            )
    except UnusableShards as error:
        index = index_report(error.sidecars or folder, error.shards, error.problems)
        index.save(report_file)
        print(f"{index.text(most_shards=NAMED)}\nfull report: {report_file.with_suffix('.txt')}", file=sys.stderr)
        raise
    index = index_report(manifest.sidecars, manifest.shards)
    index.save(report_file)
    if (index.findings or index.damaged) and not quiet:
        print(f"{index.text(most_shards=NAMED)}\nfull report: {report_file.with_suffix('.txt')}\n")
    return manifest, folder


def store_at_start() -> Storage:
    """Storage of the shards, with a short outage timeout for interactive use."""
    from pipeline.data.settings import StorageSettings
    from pipeline.data.storage import Storage

    return Storage(StorageSettings(outage_timeout=_GRACE))


def class_names(path: Path | None) -> tuple[str, ...]:
    """The class names in a file, one per line; none without a file."""
    if path is None:
        return ()
    from pipeline.untrusted import read_bytes

    try:
        names = read_bytes(path, limit=64 << 20, error=ConfigError).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read ({error})", where=str(path), hint="Give a text file with one name per line") from error
    if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise ConfigError(
            "must contain every class name once, one per line", where=str(path), hint="Give the classes.txt of a packing"
        )
    return tuple(names)
