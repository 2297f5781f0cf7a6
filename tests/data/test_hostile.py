"""Odd, broken and malicious input: decoded as Pillow does, or refused with a reason; a run over it goes on to its end.

Everything that touches the decoder happens in :mod:`tests.helpers.ward`, where a crash is an outcome.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import struct
import tarfile
import time
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pipeline.data import storage
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.views import ViewSpec
from pipeline.data.index import tar
from pipeline.data.index.build import Fields, build, index_shard
from pipeline.data.index.image_header import inspect_header, is_complete
from pipeline.data.index.manifest import STATUSES
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.errors import DataError
from tests.helpers.ward import Outcome, examine

MEMORY = 2048  # MB that no single file may take


def picture(mode: str = "RGB", width: int = 64, height: int = 40) -> Image.Image:
    """Soft blobs of colour, with an alpha channel where the mode has one."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    soft = np.stack([np.asarray(Image.fromarray(noise[..., c]).filter(ImageFilter.GaussianBlur(2))) for c in range(4)], axis=-1)
    image = Image.fromarray(((soft.astype(np.float32) - soft.min()) * 255 / np.ptp(soft)).astype(np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    return image.convert("RGB").convert(mode) if mode in ("P", "1", "YCbCr", "LAB") else image.convert(mode)


def encode(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int, *, prefix: bytes = b"") -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return prefix + block.tobytes().removeprefix(b"Exif\0\0")


def animated(kind: str) -> bytes:
    return encode(kind, save_all=True, append_images=[picture().rotate(180)])


@cache
def odd() -> dict[str, bytes]:
    """Pictures that are whole, in every guise that a collection from the web may have."""
    found = {
        "cmyk.jpg": encode("JPEG", "CMYK"),
        "gray.jpg": encode("JPEG", "L"),
        "progressive.jpg": encode("JPEG", progressive=True),
        "rgb-coded.jpg": encode("JPEG", keep_rgb=True),
        "4-1-1.jpg": encode("JPEG", subsampling="4:1:1"),
        "restarts.jpg": encode("JPEG", restart_marker_rows=1),
        "trailing.jpg": encode("JPEG") + b"bytes after the end" * 99,
        "png inside.jpg": encode("PNG"),
        "animated.webp": animated("WEBP"),
        "animated.png": animated("PNG"),
        "pages.tif": animated("TIFF"),
        "lossless.webp": encode("WEBP", lossless=True),
        "alpha.webp": encode("WEBP", "RGBA"),
        "16 bit.jp2": encode("JPEG2000", "I;16"),
        "bare.j2k": encode("JPEG2000", no_jp2=True),
        "adam7.png": encode("PNG", optimize=True),
    }
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        found[f"{mode}.png"] = encode("PNG", mode)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        found[f"{mode}.bmp"] = encode("BMP", mode)
    for mode in ("1", "L", "RGB", "I;16"):
        found[f"{mode}.ppm"] = encode("PPM", mode)
    for mode, compression in itertools.product(("1", "L", "LA", "P", "RGBA", "CMYK", "LAB", "I;16"), ("raw", "tiff_lzw")):
        found[f"{mode} {compression}.tif"] = encode("TIFF", mode, compression=compression)
    for turn in range(1, 9):
        found[f"turned {turn}.jpg"] = encode("JPEG", exif=exif(turn, prefix=b"Exif\0\0"))
        found[f"turned {turn}.png"] = encode("PNG", exif=exif(turn))
        found[f"turned {turn}.tif"] = encode("TIFF", "RGBA", tiffinfo={0x0112: turn})
        for name, options in (("lossy", {}), ("lossless", {"lossless": True})):
            found[f"turned {turn} {name}.webp"] = encode("WEBP", exif=exif(turn), **options)
        with_prefix = encode("WEBP", "RGBA", exif=exif(turn))  # Pillow strips the prefix, other writers leave it
        at = with_prefix.index(b"EXIF")
        block = b"Exif\0\0" + with_prefix[at + 8 :]
        longer = with_prefix[:at] + b"EXIF" + struct.pack("<I", len(block)) + block
        found[f"turned {turn} prefixed.webp"] = longer[:4] + struct.pack("<I", len(longer) - 8) + longer[8:]
    return found


def chunk_checked(data: bytearray) -> bytes:
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def bombs() -> dict[str, bytes]:
    """Small files whose headers claim 30 000 by 30 000 pixels, and more."""
    side = 30_000
    found = {}
    data = bytearray(encode("PNG"))
    data[16:24] = struct.pack(">II", side, side)
    found["png"] = chunk_checked(data)
    for name, kind in (("jpeg", encode("JPEG")), ("progressive jpeg", encode("JPEG", progressive=True))):
        data = bytearray(kind)
        at = data.index(b"\xff\xc2" if "progressive" in name else b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", side, side)
        found[name] = bytes(data)
    data = bytearray(encode("BMP"))
    data[18:26] = struct.pack("<ii", side, side)
    found["bmp"] = bytes(data)
    data = bytearray(encode("TIFF"))
    entries = struct.unpack_from("<I", data, 4)[0] + 2
    for number in range(2):  # width and length are the first two tags
        struct.pack_into("<HII", data, entries + 12 * number + 2, 4, 1, side)
    found["tiff"] = bytes(data)
    found["pnm"] = b"P6\n30000 30000\n255\n" + bytes(99)
    data = bytearray(encode("JPEG2000", no_jp2=True))
    data[8:16] = struct.pack(">II", side, side)
    found["jpeg2000"] = bytes(data)
    data = bytearray(encode("WEBP", "RGBA"))
    data[24:30] = (16_383).to_bytes(3, "little") * 2
    found["webp"] = bytes(data)
    return found


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """A few bytes changed, cut out or put in, mostly near the beginning, where the headers are."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 6)):
        end = len(changed) if random.random() < 0.4 else min(200, len(changed))
        at, kind = int(random.integers(0, max(end, 1))), random.integers(0, 5)
        if kind == 0:
            del changed[at : at + int(random.integers(1, 20))]
        elif kind == 1:
            changed[at:at] = random.bytes(int(random.integers(1, 20)))
        elif at < len(changed):
            changed[at] = int(random.choice([0, 1, 127, 128, 255, random.integers(256)]))
    return bytes(changed[: random.integers(len(changed) + 1)] if random.random() < 0.1 else changed)


def assert_harmless(files: dict[str, bytes], outcomes: list[Outcome]) -> None:
    assert len(outcomes) == len(files)
    deaths = {name: outcome.death for name, outcome in zip(files, outcomes, strict=True) if outcome.death}
    assert not deaths, f"these took the process down, by signal: {deaths}"
    assert max(outcome.megabytes for outcome in outcomes) < MEMORY


def assert_right(files: dict[str, bytes], outcomes: list[Outcome], *, tolerance: float) -> None:
    """What was accepted and decoded has the size that was told, and Pillow's pixels."""
    wrong = {}
    for name, outcome in zip(files, outcomes, strict=True):
        told = outcome.judgement
        if outcome.shape is None or told is None or told.status != "ok":
            continue
        if outcome.shape != (told.height, told.width, 3) or outcome.distance is None or outcome.distance > tolerance:
            wrong[name] = outcome
    assert not wrong


@pytest.fixture(scope="module")
def zoo(shared_data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((shared_data / "hostile").iterdir())}


def test_every_hostile_file_is_decoded_as_pillow_does_or_has_its_reason(zoo: dict[str, bytes]) -> None:
    outcomes = examine(list(zoo.values()))
    assert_harmless(zoo, outcomes)
    assert_right(zoo, outcomes, tolerance=0.5)
    judged = Counter(outcome.judgement.status for outcome in outcomes if outcome.judgement)
    assert set(judged) <= set(STATUSES)
    assert judged.total() == len(zoo)
    decoded = sum(outcome.shape is not None for outcome in outcomes)
    assert decoded > 0.6 * len(zoo)
    assert judged["ok"] - decoded < 0.05 * len(zoo), "too much is found out only when it is decoded"


@pytest.mark.slow
def test_the_decoder_survives_what_the_guard_would_have_refused(zoo: dict[str, bytes]) -> None:
    outcomes = examine(list(zoo.values()), decode_all=True)
    assert_harmless(zoo, outcomes)


def test_whole_pictures_of_every_guise_are_decoded_rightly() -> None:
    files = odd()
    outcomes = examine(list(files.values()))
    assert_harmless(files, outcomes)
    lost = {name: outcome for name, outcome in zip(files, outcomes, strict=True) if outcome.shape is None}
    assert not lost
    assert_right(files, outcomes, tolerance=0.5)


@pytest.mark.parametrize("marker", [0xC3, 0xC9, 0xCA, 0xCB])
def test_lossless_and_arithmetic_jpegs_are_refused_by_header(marker: int) -> None:
    data = encode("JPEG", progressive=marker == 0xCA)
    at = data.index(b"\xff\xc2" if marker == 0xCA else b"\xff\xc0") + 1
    assert inspect_header(data[:at] + bytes([marker]) + data[at + 1 :]).status == "unsupported"


@pytest.mark.parametrize("name", sorted(bombs()))
def test_a_bomb_is_refused_by_its_header_at_once(name: str) -> None:
    data = bombs()[name]
    begin = time.process_time()
    judgement = inspect_header(data)
    assert time.process_time() - begin < 0.05
    if name == "webp":  # Pillow looks further than the header here, and finds that it lies
        assert judgement.status in ("too_large", "not_image")
    else:
        assert judgement.status == "too_large"
        assert judgement.width * judgement.height == 30_000**2


def test_a_small_box_around_a_large_codestream_is_refused() -> None:
    data = bytearray(encode("JPEG2000"))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 30_000, 30_000)
    assert inspect_header(bytes(data)).status in ("unsupported", "too_large")


@pytest.mark.parametrize(
    "junk", [b"", b"\xff", b"\xff\xd8\xff", b"<html>404</html>", b"P6", b"P6 ", b"BM", b"RIFF\0\0\0\0WEBP", bytes(64)]
)
def test_what_is_hardly_a_file_has_a_status(junk: bytes) -> None:
    assert inspect_header(junk).status in ("not_image", "truncated")


def test_a_png_whose_chunk_claims_gigabytes_is_refused() -> None:
    """The decoder would ask for them before it looks how long the file is."""
    data = bytearray(encode("PNG"))
    data[data.index(b"IDAT") - 4] = 0xFF
    assert inspect_header(bytes(data)).status != "ok"
    assert not is_complete(bytes(data), "png")
    assert is_complete(encode("PNG") + b"bytes after the end", "png")


def cut(files: dict[str, bytes], points: int) -> dict[str, bytes]:
    return {
        f"{name} cut at {at}": data[:at]
        for name, data in files.items()
        for at in sorted({*np.linspace(0, len(data) - 1, points).astype(int).tolist(), *range(0, 32, 5)})
    }


def check_cuts(points: int) -> None:
    whole = {name: data for name, data in odd().items() if "trailing" not in name}
    expected = dict(zip(whole, examine(list(whole.values())), strict=True))
    files = cut(whole, points)
    outcomes = examine(list(files.values()))
    assert_harmless(files, outcomes)
    for name, outcome in zip(files, outcomes, strict=True):
        if outcome.shape is not None:  # what was cut off was no pixel: padding, another page, text
            assert outcome.distance is None or outcome.distance < 0.5, name
            assert outcome.shape == expected[name.partition(" cut at")[0]].shape, name


def test_no_cut_picture_passes_for_a_whole_one() -> None:
    check_cuts(12)


@pytest.mark.slow
def test_no_cut_picture_passes_for_a_whole_one_wherever_it_is_cut() -> None:
    check_cuts(200)


def check_mutations(rounds: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    files = {f"{name} {number}": mutated(data, random) for name, data in odd().items() for number in range(rounds)}
    outcomes = examine(list(files.values()))
    assert_harmless(files, outcomes)
    assert sum(outcome.judgement is not None and outcome.judgement.status == "ok" for outcome in outcomes) > len(files) / 5


def test_damaged_pictures_never_harm_the_process() -> None:
    check_mutations(8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_damaged_pictures_never_harm_the_process_however_many(seed: int) -> None:
    check_mutations(150, seed)


@settings(max_examples=120, deadline=None)
@given(name=st.sampled_from(sorted(odd())), seed=st.integers(0, 2**32))
def test_judging_never_raises(name: str, seed: int) -> None:
    assert inspect_header(mutated(odd()[name], np.random.default_rng(seed))).status in STATUSES


@settings(max_examples=60, deadline=None)
@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM", b"P5\n", b"\xff\x4f\xff\x51"]),
    rest=st.binary(max_size=400),
)
@example(start=b"RIFF", rest=b"\xff\xff\xff\xffWEBPVP8X\n\0\0\0")
def test_judging_noise_never_raises(start: bytes, rest: bytes) -> None:
    assert inspect_header(start + rest).status in STATUSES


# --- tars -------------------------------------------------------------------------------------------------------------------

LONG = "a-directory-with-a-name/" * 6 + "sample-" + "x" * 120 + ".jpg"


def archive() -> bytes:
    """GNU and PAX headers, long names, a link, a directory, sparse members, duplicates, scattered and upper-case members."""
    small = encode("JPEG")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as writer:
        for name in ("0.jpg", LONG, "1.JPG", "dup.jpg", "dup.jpg", "far.jpg", "between.jpg", "far.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(small)
            writer.addfile(entry, io.BytesIO(small))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE), ("sparse.jpg", tarfile.GNUTYPE_SPARSE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "0.jpg"
            writer.addfile(entry)
        writer.format = tarfile.PAX_FORMAT
        for name, headers in (
            ("größe/" + LONG, {}),
            ("pax.jpg", {"comment": "x" * 600}),
            ("holes.jpg", {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes.jpg"}),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(small), headers
            writer.addfile(entry, io.BytesIO(small))
    return buffer.getvalue()


ARCHIVE = archive()
HEADERS = [at for at in range(0, len(ARCHIVE), 512) if ARCHIVE[at + 257 : at + 262] == b"ustar"]


def put(folder: Path, data: bytes) -> str:
    path = folder / "shard.tar"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    storage.forget()
    return str(path)


class Meter:
    """Counts what is read of a shard, and stops a walk that reads far more than there is."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.bytes, self.reads, self._read = size, 0, 0, storage.read
        monkeypatch.setattr(storage, "read", self)

    def __call__(self, url: str, offset: int, length: int) -> bytes:
        self.bytes, self.reads = self.bytes + length, self.reads + 1
        assert 0 <= offset <= offset + length <= self.size, "reads what is not there"
        assert self.bytes <= 4 * self.size + 4096, "reads the same bytes again and again"
        assert self.reads <= self.size // 128 + 8, "walks in circles"
        return self._read(url, offset, length)


def walk_to_the_end(folder: Path, data: bytes) -> tar.TarDamage | None:
    """Walks an archive; whatever it is, the walk ends, within bounds, and says nothing but :class:`TarDamage`."""
    url = put(folder, data)
    with pytest.MonkeyPatch.context() as patch:
        Meter(len(data), patch)
        try:
            for member in tar.walk(url):
                assert 0 <= member.offset <= member.offset + member.size <= len(data)
        except tar.TarDamage as damage:
            assert 0 <= damage.at < len(data) + 512
            return damage
    return None


def signed(data: bytearray, at: int) -> None:
    """Makes the checksum of a header right, so that its other fields are believed."""
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def test_the_archive_is_read_whole(tmp_path: Path) -> None:
    url = put(tmp_path, ARCHIVE)
    notes = tar.Notes()
    keys = [key for key, _ in tar.samples(url, notes)]
    assert keys == [
        *("0", LONG[:-4], "1", "dup", "dup", "far", "between", "far"),
        *(f"größe/{LONG[:-4]}", "pax"),
    ]
    assert notes == {"link": 1, "sparse": 2}
    index = index_shard(url, fields=Fields())
    assert index.counts == {"ok": 7, "duplicate_key": 1, "not_adjacent": 2}


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_tar_cut_at_any_byte_is_never_taken_for_whole(tmp_path: Path, step: int) -> None:
    end = len(ARCHIVE.rstrip(b"\0"))
    whole = -(-end // 512) * 512 + 1024  # the members and the end marker: what follows is padding
    for length in range(0, whole, step):
        damage = walk_to_the_end(tmp_path, ARCHIVE[:length])
        assert damage is not None, length
        assert damage.reason == ("empty_file" if length == 0 else "not_tar" if length < 512 else "truncated"), length
    assert walk_to_the_end(tmp_path, ARCHIVE[:whole]) is None


def test_a_cut_tar_gives_the_samples_before_the_cut_if_asked_to(tmp_path: Path) -> None:
    keys = index_shard(put(tmp_path, ARCHIVE), fields=Fields()).keys
    for length in range(512, len(ARCHIVE) - 12_000, 997):
        url = put(tmp_path, ARCHIVE[:length])
        with pytest.raises(DataError):
            index_shard(url, fields=Fields())
        index = index_shard(url, fields=Fields(), on_truncated="keep-readable")
        assert index.keys == keys[: len(index.keys)]
        assert index.damage


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (124, b"\xff" * 12),  # base 256: -1
        (124, b"\xff" * 8 + struct.pack(">i", -1024)),  # back to where the walk came from
        (124, b"\x80" + b"\x7f" * 11),  # larger than any file
        (124, b"-0000000512\0"),
        (124, b"77777777777\0"),
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S", b"V"])
def test_a_size_that_cannot_be_is_damage(tmp_path: Path, offset: int, value: bytes, kind: bytes) -> None:
    data = bytearray(ARCHIVE)
    at = HEADERS[1]
    data[at + offset : at + offset + len(value)] = value
    data[at + 156 : at + 157] = kind
    signed(data, at)
    assert walk_to_the_end(tmp_path, bytes(data)) is not None


@pytest.mark.parametrize("size", ["9" * 5000, "²", "٣", "-1", "1e3", "", " 7", "9" * 19])
def test_a_pax_size_that_is_no_number_is_damage(tmp_path: Path, size: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as writer:
        entry = tarfile.TarInfo("0.jpg")
        entry.pax_headers = {"size": size}
        writer.addfile(entry)
    damage = walk_to_the_end(tmp_path, buffer.getvalue())
    assert damage is not None
    assert len(str(damage)) < 600


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_done_to_a_tar_its_walk_ends_and_is_told_apart(tmp_path: Path, data: st.DataObject) -> None:
    changed = bytearray(ARCHIVE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(HEADERS) if data.draw(st.booleans()) else st.integers(0, len(changed) - 1))
        at = min(at, len(changed) - 1)
        match data.draw(st.sampled_from(["byte", "field", "cut out", "put in", "end", "double"])):
            case "byte":
                changed[at] = data.draw(st.integers(0, 255))
            case "field" if at + 512 <= len(changed):
                field, length = data.draw(st.sampled_from([(0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (482, 1)]))
                value = data.draw(st.binary(min_size=1, max_size=length))
                changed[at + field : at + field + len(value)] = value
                signed(changed, at)
            case "cut out":
                del changed[at : at + data.draw(st.sampled_from([1, 7, 512, 1024, 1500]))]
            case "put in":
                changed[at:at] = data.draw(st.sampled_from([b"\0", bytes(512), bytes(1024), b"noise" * 103, ARCHIVE[:512]]))
            case "end":
                del changed[at:]
            case "double":
                changed += ARCHIVE[at : at + 2048]
        if not changed:
            break
    walk_to_the_end(tmp_path, bytes(changed))
    with contextlib.suppress(DataError):
        index_shard(
            put(tmp_path, bytes(changed)), fields=Fields(), on_truncated=data.draw(st.sampled_from(["error", "keep-readable"]))
        )


# --- a run ------------------------------------------------------------------------------------------------------------------


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as writer:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            writer.addfile(entry, io.BytesIO(data))


def test_a_run_over_a_hostile_shard_goes_on_to_its_end_and_tells_what_was_lost(tmp_path: Path, zoo: dict[str, bytes]) -> None:
    everything = {f"zoo-{n:03d}.jpg": data for n, data in enumerate(zoo.values()) if len(data) < 60_000}
    everything |= {f"odd-{n:03d}.jpg": data for n, data in enumerate(odd().values())}
    everything |= {f"bomb-{n:03d}.jpg": data for n, data in enumerate(bombs().values())}
    url = tmp_path / "hostile.tar"
    pack(url, everything)
    manifest = build([str(url)], tmp_path / "index")
    assert sum(manifest.counts.values()) == len(everything)
    assert manifest.counts["too_large"] >= len(bombs())
    offsets, sizes = (manifest.column(0, f"image_{part}") for part in ("offset", "size"))
    rotten = list(range(3, manifest.total, 17))
    with url.open("r+b") as file:  # after the index was made, in place
        for number, row in enumerate(rotten):
            length = int(sizes[row])
            file.seek(int(offsets[row]))
            file.write(bytes(length) if number % 2 else np.random.default_rng(number).bytes(length))
    storage.forget()
    spec = (ViewSpec("view", 1, 32, (0.3, 1.0), augment=(Augment(),)),)
    order = Order(manifest.sizes, 0, 8, streams=1, block_size=1024)
    bad_samples = BadSamples(tmp_path / "bad_samples.jsonl", budget=1.0)
    dataset = StepDataset(Reader(manifest, wants=("image",)), order, spec, seed=0, world=1, rank=0)
    steps = manifest.total // 8
    options = StreamOptions(micro_batch=8, workers=0, hue="off")
    stream = BatchStream(dataset, device=torch.device("cpu"), options=options, bad_samples=bad_samples, first=0, last=steps)
    met: list[int] = []
    for _, (batch,) in stream:
        assert all(torch.isfinite(view).all() for view in batch.views["view"])
        met += batch.ids
    events = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert len(met) == steps * 8
    reasons = {event["id"]: event["reason"] for event in events}
    planned = [int(number) for step in range(steps) for number in order.rank_batch(step, 1, 0).ids]
    assert {row for row in rotten if row in planned} == {row for row in reasons if row in rotten}
    assert {reasons[row] for row in rotten if row in planned} == {"corrupt"}
    assert set(reasons.values()) == {"corrupt", "undecodable"}
    for given_id, planned_id in zip(met, planned, strict=True):  # in place: nothing shifts, and only what was told is another
        assert (given_id == planned_id) == (planned_id not in reasons)
    for event in events:
        assert event["shard"] == "hostile.tar"
        assert event["key"]
