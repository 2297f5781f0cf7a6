"""Building an index: every shard is walked once, every sample gets a status, nothing is dropped without being counted.

Pictures are judged by their headers alone: nothing is decoded here, so a picture that claims a gigapixel costs nothing.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import (
    BmpImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipeline.data import storage, tar
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

__all__ = ["Fields", "Judgement", "build", "captions_of", "index_shard", "judge", "whole"]

Damaged = Literal["refuse", "use"]
_OPENERS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "jpeg2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "pnm": PpmImagePlugin.PpmImageFile,
}
_OTHER_IMAGES = (b"GIF8", b"8BPS", b"DDS ", b"qoif", b"\0\0\1\0", b"\0\0\2\0", b"icns", b"\xff\x0a", b"<svg", b"\x76\x2f\x31\1")
_ORIENTATION = 0x0112
_SMALL_WORK = 48 << 20  # below this many bytes starting processes takes longer than indexing
_EXIF_SWAPS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Judgement:
    """What a picture's header says.

    Attributes:
        status: ``ok``, ``not_image``, ``unsupported``, ``truncated``, ``too_large`` or ``too_small``.
        format: one of :data:`pipeline.data.manifest.FORMATS`.
        width: pixels, after EXIF orientation; 0 if unknown.
        height: likewise.
    """

    status: str
    format: str = "none"
    width: int = 0
    height: int = 0


def judge(data: bytes, *, min_side: int = 16, max_pixels: int = 50_000_000) -> Judgement:
    """Judges the bytes of a picture without decoding it.

    Only formats that the decoder reads are looked into; the file's name plays no part.
    """
    kind = _sniff(data)
    if kind in ("none", "other"):
        return Judgement("unsupported" if kind == "other" else "not_image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = _oriented_size(data, kind)
    except Exception:  # a hostile header can make a parser raise anything at all
        return Judgement("not_image" if whole(data, kind) else "truncated", kind)
    if min(size) <= 0:
        return Judgement("not_image", kind)
    if size[0] * size[1] > max_pixels:
        return Judgement("too_large", kind, *size)
    if min(size) < min_side:
        return Judgement("too_small", kind, *size)
    if not whole(data, kind):
        return Judgement("truncated", kind, *size)
    if not _decodable(data, kind):
        return Judgement("unsupported", kind, *size)
    return Judgement("ok", kind, *size)


def captions_of(said: Any) -> tuple[str, ...]:
    """The captions in a JSON value, a text or a list of texts, without those that are empty."""
    texts = said if isinstance(said, list) else [said]
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())


def whole(data: bytes, kind: str) -> bool:
    """Whether a picture's bytes reach its end marker (a matter of microseconds; formats without one pass).

    JPEG, JPEG 2000: an end marker after the start of the data, though other bytes may follow it. PNG: the last chunk is there.
    WebP: the length that the header announces.
    """
    if kind == "jpeg":
        scan = _jpeg_frame(data)[0]
        return scan > 0 and data.rfind(b"\xff\xd9", scan) >= 0
    if kind == "png":
        return data.rfind(b"IEND", 33) >= 0
    if kind == "jpeg2000":  # packets never hold two bytes above FF8F, so this is the end of the codestream and no accident
        return data.rfind(b"\xff\xd9", max(data.find(b"\xff\x4f"), 0)) >= 0
    if kind == "webp":
        return len(data) >= 12 and len(data) >= struct.unpack_from("<I", data, 4)[0] + 8
    return True


def index_shard(
    shard: str | storage.ObjectStat, *, fields: Fields, damaged: Damaged = "refuse", store: storage.Storage | None = None
) -> ShardIndex:
    """Walks one shard and judges each of its samples.

    Args:
        shard: the shard, or what storage said of it.
        fields: what makes a sample.
        damaged: ``use`` keeps the whole samples before a cut; ``refuse`` raises.
        store: how to reach it.

    Raises:
        DataError: the shard cannot be read, is no tar or is damaged.
    """
    store = store or storage.Storage()
    about = store.stat(shard) if isinstance(shard, str) else shard
    source = store.open(about)
    try:
        return _walked(source, about, fields, damaged)
    finally:
        source.close()


def _walked(source: storage.Source, about: storage.ObjectStat, fields: Fields, damaged: Damaged) -> ShardIndex:
    notes: Counter[str] = Counter()
    damage, runs = "", []
    walker = tar.samples(source, notes)
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
    rows = [_row(source, members, fields, doubt, notes) for (_, members), doubt in zip(runs, doubts, strict=True)]
    keys = tuple(key for key, _ in runs)
    return ShardIndex(about.url, about.size, about.tag, fields, damage, dict(sorted(notes.items())), keys, make_columns(rows))


def build(
    urls: Sequence[str],
    directory: str | Path,
    *,
    fields: Fields | None = None,
    workers: int | None = None,
    damaged: Damaged = "refuse",
    progress: Callable[[int, int, Shard], None] | None = None,
    store: storage.Storage | None = None,
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
        store: how to reach them.

    Raises:
        DataError: shards cannot be used (all are looked at first, up to five are named), or no sample can.
    """
    fields = fields or Fields()
    folder = Path(directory)
    urls = [storage.absolute(url) for url in urls]
    _make(folder)
    found: dict[str, Shard] = {}
    problems: dict[str, FoveaError] = {}
    pending: list[storage.ObjectStat] = []
    store = store or storage.Storage()

    def tell(shard: Shard) -> None:
        found[shard.url] = shard
        if progress is not None:
            progress(len(found) + len(problems), len(urls), shard)

    for url, about in zip(urls, store.stats(urls), strict=True):
        if isinstance(about, DataError):
            problems[url] = about
            continue
        kept = _reusable(folder / sidecar_name(url), about, fields, damaged)
        if kept is None:
            pending.append(about)
        else:
            tell(Shard.of(kept))
    for url, result in _index_all(pending, folder, fields, damaged, workers, store):
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
    pending: list[storage.ObjectStat],
    folder: Path,
    fields: Fields,
    damaged: Damaged,
    workers: int | None,
    store: storage.Storage,
) -> Iterator[tuple[str, Shard | FoveaError]]:
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), math.ceil(sum(about.size for about in pending) / _SMALL_WORK))
    workers = min(workers, len(pending))
    if workers <= 1:
        for about in pending:
            yield about.url, _index_one(about, folder, fields, damaged, store)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        largest_first = sorted(pending, key=lambda about: about.size, reverse=True)
        jobs = {pool.submit(_index_one, about, folder, fields, damaged, store): about.url for about in largest_first}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _index_one(
    about: storage.ObjectStat, folder: Path, fields: Fields, damaged: Damaged, store: storage.Storage
) -> Shard | FoveaError:
    try:
        index = index_shard(about, fields=fields, damaged=damaged, store=store)
    except FoveaError as error:
        return error
    index.save(folder / sidecar_name(about.url))
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


def _row(
    source: storage.Source, members: dict[str, tar.Member], fields: Fields, doubt: str, notes: Counter[str]
) -> dict[str, int]:
    image = next((extension for extension in fields.images if extension in members), None)
    row = dict.fromkeys(
        ("image_offset", "image_size", "width", "height", "caption_offset", "caption_size", "segmentation_offset"), 0
    )
    row |= {"segmentation_size": 0, "label": -1, "crc32": 0, "other_crc32": 0, "extension": 0, "format": 0, "caption_source": 0}
    status = "missing_image"
    if image is not None:
        data = _data(source, members[image])
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
    others = {name: _data(source, members[name]) for name in (fields.caption, fields.label, fields.json) if name in members}
    document = _json_object(others.get(fields.json), notes)
    _add_label(row, others.get(fields.label), document.get(fields.json_label), notes)
    _add_caption(row, members, others, document, fields)
    if fields.segmentation in members:
        member = members[fields.segmentation]
        row |= {"segmentation_offset": member.offset, "segmentation_size": member.size}
        others[fields.segmentation] = _data(source, member)
    for data in others.values():
        row["other_crc32"] = zlib.crc32(data, row["other_crc32"])
    missing = {"caption": not row["caption_source"], "label": row["label"] < 0, "segmentation": not row["segmentation_size"]}
    if status == "ok":
        status = next((f"missing_{name}" for name in fields.require if missing[name]), "ok")
    row["status"] = STATUSES.index(doubt or status)
    return row


def _data(source: storage.Source, member: tar.Member) -> bytes:
    return source.read(member.offset, member.size) if member.size else b""


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
    elif captions_of(said):
        source, member = "json", members[fields.json]
    else:
        return
    row |= {"caption_source": CAPTION_SOURCES.index(source), "caption_offset": member.offset, "caption_size": member.size}


def _sniff(data: bytes) -> str:
    """The format by its first bytes: one that is read, ``other`` for known pictures that are not, ``none``."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tiff"
    if data[:2] == b"BM":
        return "bmp"
    if data[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        return "jpeg2000"
    if len(data) > 2 and data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return "pnm"
    return "other" if data.startswith(_OTHER_IMAGES) or data[4:8] == b"ftyp" else "none"


def _oriented_size(data: bytes, kind: str) -> tuple[int, int]:
    # Not Image.open: its own limit of pixels is global state, and it would try other formats.
    with _OPENERS[kind](io.BytesIO(data)) as image:
        width, height = image.size
        if kind == "tiff":
            return width, height  # Pillow has turned it already
        exif = Image.Exif()
        try:
            exif.load(image.info.get("exif") or b"")
            turned = exif.get(_ORIENTATION) in _EXIF_SWAPS
        except Exception:  # broken EXIF is no reason to lose a picture
            turned = False
        return (height, width) if turned else (width, height)


def _decodable(data: bytes, kind: str) -> bool:
    """JPEG only: baseline, extended or progressive Huffman coding with 8 bits a channel."""
    if kind != "jpeg":
        return True
    _, frame, precision = _jpeg_frame(data)
    return frame in (0xC0, 0xC1, 0xC2) and precision == 8


def _jpeg_frame(data: bytes) -> tuple[int, int, int]:
    """Where the first scan begins (0: nowhere), the frame marker and its bits per channel, by walking the segments."""
    at, frame, precision = 2, 0, 0
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return 0, frame, precision
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            at += 1 if marker == 0xFF else 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker == 0xDA:
            return at + 2 + length, frame, precision
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 5 <= len(data):
            frame, precision = marker, data[at + 4]
        at += 2 + length
    return 0, frame, precision
