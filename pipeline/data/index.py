"""Building an index: every shard is walked once, every sample gets a status, nothing is dropped without being counted.

Pictures are judged by their headers alone: nothing is decoded here, so a picture that claims a gigapixel costs nothing.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

from pipeline.data import storage, tar
from pipeline.data.judge import Judgement, judge, whole
from pipeline.data.manifest import (
    CAPTION_SOURCES,
    FORMATS,
    STATUSES,
    Fields,
    Manifest,
    Shard,
    ShardIndex,
    load_sidecar,
    make_columns,
    sidecar_name,
)
from pipeline.errors import DataError, FoveaError

__all__ = ["Fields", "Judgement", "build", "index_shard", "judge", "whole"]

Damaged = Literal["refuse", "use"]
_SMALL_WORK = 48 << 20  # below this many bytes starting processes takes longer than indexing


def index_shard(url: str, *, fields: Fields, damaged: Damaged = "refuse") -> ShardIndex:
    """Walks one shard and judges each of its samples.

    Args:
        url: the shard.
        fields: what makes a sample.
        damaged: ``use`` keeps the whole samples before a cut; ``refuse`` raises.

    Raises:
        DataError: the shard cannot be read, is no tar or is damaged.
    """
    about = storage.stat(url)
    notes: Counter[str] = Counter()
    damage, runs = "", []
    walker = tar.samples(url, notes)
    while True:
        try:
            runs.append(next(walker))
        except StopIteration:
            break
        except tar.TarDamage as error:
            if damaged != "use" or error.reason not in ("truncated", "corrupt", "trailing"):
                raise
            damage = str(error)
            if error.reason != "trailing" and runs:
                runs.pop()  # its next members may be what was lost
                notes["cut_sample"] += 1
            break
    doubts = tar.doubts([(key, set(members)) for key, members in runs])
    rows = [_row(url, members, fields, doubt, notes) for (_, members), doubt in zip(runs, doubts, strict=True)]
    keys = tuple(key for key, _ in runs)
    return ShardIndex(url, about.size, about.tag, fields, damage, dict(sorted(notes.items())), keys, make_columns(rows))


def build(
    urls: Sequence[str],
    directory: str | Path,
    *,
    fields: Fields | None = None,
    workers: int | None = None,
    damaged: Damaged = "refuse",
    progress: Callable[[int, int, Shard], None] | None = None,
) -> Manifest:
    """Indexes shards, or reuses what is already there, and writes the manifest.

    A sidecar is reused while the shard's url, size and version, the rules and the format are the same; so a second build
    is quick and an interrupted one goes on where it stopped.

    Args:
        urls: the shards in order, see :func:`pipeline.data.storage.expand`.
        directory: where sidecars and manifest go.
        fields: what makes a sample.
        workers: processes; None: as many as there are processors and work for them.
        damaged: ``use`` keeps the whole samples before a cut, ``refuse`` stops.
        progress: called after each shard with (shards done, shards in all, its summary).

    Raises:
        DataError: shards cannot be used (all are looked at first, up to five are named), or no sample can.
    """
    fields = fields or Fields()
    folder = Path(directory)
    urls = [storage.absolute(url) for url in urls]
    _make(folder)
    found: dict[str, Shard] = {}
    problems: dict[str, FoveaError] = {}
    pending: list[tuple[int, str]] = []

    def tell(shard: Shard) -> None:
        found[shard.url] = shard
        if progress is not None:
            progress(len(found) + len(problems), len(urls), shard)

    for url in urls:
        try:
            about = storage.stat(url)
            kept = _reusable(folder / sidecar_name(url), about, fields, damaged)
        except DataError as error:
            problems[url] = error
            continue
        if kept is None:
            pending.append((about.size, url))
        else:
            tell(Shard.of(kept))
    for url, result in _index_all(pending, folder, fields, damaged, workers):
        if isinstance(result, Shard):
            tell(result)
        else:
            problems[url] = result
    if problems:
        raise _refusal([problems[url] for url in urls if url in problems], len(urls))
    manifest = Manifest(str(folder), tuple(found[url] for url in urls), fields)
    if manifest.total == 0:
        counted = ", ".join(f"{n} {status}" for status, n in manifest.counts.items()) or "no samples at all"
        raise DataError(
            f"no sample can be used: {counted}",
            where=f"{urls[0]}{' …' if len(urls) > 1 else ''}" if urls else "index",
            mend=f"Samples need an image with one of the extensions {', '.join(fields.images)}.",
        )
    manifest.save(folder)
    return manifest


def _index_all(
    pending: list[tuple[int, str]], folder: Path, fields: Fields, damaged: Damaged, workers: int | None
) -> Iterator[tuple[str, Shard | FoveaError]]:
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), math.ceil(sum(size for size, _ in pending) / _SMALL_WORK))
    workers = min(workers, len(pending))
    if workers <= 1:
        for _, url in pending:
            yield url, _index_one(url, folder, fields, damaged)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        largest_first = sorted(pending, reverse=True)
        jobs = {pool.submit(_index_one, url, folder, fields, damaged): url for _, url in largest_first}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _index_one(url: str, folder: Path, fields: Fields, damaged: Damaged) -> Shard | FoveaError:
    try:
        index = index_shard(url, fields=fields, damaged=damaged)
    except FoveaError as error:
        return error
    finally:
        storage.forget(url)
    index.save(folder / sidecar_name(url))
    return Shard.of(index)


def _reusable(path: Path, about: storage.ObjectStat, fields: Fields, damaged: Damaged) -> ShardIndex | None:
    if not path.exists():
        return None
    try:
        index = load_sidecar(path)
    except DataError:
        return None
    same = (index.url, index.size, index.tag, index.fields) == (about.url, about.size, about.tag, fields)
    return index if same and (damaged == "use" or not index.damage) else None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise DataError(
            f"cannot be written ({error.strerror})", where=str(folder), mend="Give another directory for the index."
        ) from error


def _refusal(problems: list[FoveaError], among: int) -> DataError:
    if len(problems) == 1:
        return DataError(problems[0].what, where=problems[0].where, mend=problems[0].mend)
    named = "; ".join(f"{problem.where}: {problem.what}" for problem in problems[:5])
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    mend = 'Copy them again or leave them out; damaged="use" keeps the whole samples before a cut.'
    return DataError(f"{len(problems)} of {among} shards cannot be used: {named}{more}", mend=mend)


def _row(url: str, members: dict[str, tar.Member], fields: Fields, doubt: str, notes: Counter[str]) -> dict[str, int]:
    image = next((extension for extension in fields.images if extension in members), None)
    row = dict.fromkeys(
        ("image_offset", "image_size", "width", "height", "caption_offset", "caption_size", "segmentation_offset"), 0
    )
    row |= {"segmentation_size": 0, "label": -1, "crc32": 0, "other_crc32": 0, "extension": 0, "format": 0, "caption_source": 0}
    status = "missing_image"
    if image is not None:
        data = _data(url, members[image])
        verdict = judge(data, min_side=fields.min_side, max_pixels=fields.max_pixels)
        status = verdict.status
        row |= {
            "image_offset": members[image].offset,
            "image_size": members[image].size,
            "width": verdict.width,
            "height": verdict.height,
            "crc32": zlib.crc32(data),
            "extension": fields.images.index(image),
            "format": FORMATS.index(verdict.format),
        }
    others = {name: _data(url, members[name]) for name in (fields.caption, fields.label, fields.json) if name in members}
    document = _json_object(others.get(fields.json), notes)
    _add_label(row, others.get(fields.label), document.get(fields.json_label), notes)
    _add_caption(row, members, others, document, fields)
    if fields.segmentation in members:
        member = members[fields.segmentation]
        row |= {"segmentation_offset": member.offset, "segmentation_size": member.size}
        others[fields.segmentation] = _data(url, member)
    for data in others.values():
        row["other_crc32"] = zlib.crc32(data, row["other_crc32"])
    missing = {"caption": not row["caption_source"], "label": row["label"] < 0, "segmentation": not row["segmentation_size"]}
    if status == "ok":
        status = next((f"missing_{name}" for name in fields.require if missing[name]), "ok")
    row["status"] = STATUSES.index(doubt or status)
    return row


def _data(url: str, member: tar.Member) -> bytes:
    return storage.read(url, member.offset, member.size)


def _json_object(data: bytes | None, notes: Counter[str]) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        notes["bad_json"] += 1
        return {}
    return document


def _add_label(row: dict[str, int], text: bytes | None, value: Any, notes: Counter[str]) -> None:
    found: int | None = None
    if text is not None:
        found = int(text) if re.fullmatch(rb"\s*\d{1,9}\s*", text) else -1
    elif isinstance(value, int) and not isinstance(value, bool):
        found = value if 0 <= value < 10**9 else -1
    elif value is not None:
        found = -1
    if found == -1:
        notes["bad_label"] += 1
    row["label"] = -1 if found is None else found


def _add_caption(
    row: dict[str, int], members: dict[str, tar.Member], others: dict[str, bytes], document: dict[str, Any], fields: Fields
) -> None:
    text, said = others.get(fields.caption, b""), document.get(fields.json_caption)
    if text.strip():
        source, member = "text", members[fields.caption]
    elif isinstance(said, str) and said.strip():
        source, member = "json", members[fields.json]
    else:
        return
    row |= {"caption_source": CAPTION_SOURCES.index(source), "caption_offset": member.offset, "caption_size": member.size}
