"""Images of declared channels: every value as stored, whatever the file's layout; what differs is refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from imagecodecs import png_encode
from PIL import Image, ImageOps

from pipeline.data.formats import read
from pipeline.data.formats.channels import DTYPES, Channels
from pipeline.data.index.fields import STATUSES
from tests.helpers.channel_images import Layout, npy_file, random_image, tiff_file
from tests.helpers.limits import cpu_limit

LIMITS = {"min_side": 1, "max_pixels": 1_000_000}


def status(data: bytes, channels: Channels, **limits: int) -> str:
    result = read.inspect(data, channels, **{**LIMITS, **limits}).status
    assert result in STATUSES
    return result


def values(data: bytes, channels: Channels) -> Any:
    return read.decode(data, channels, max_pixels=LIMITS["max_pixels"])


def assert_exact(data: bytes, image: np.ndarray) -> None:
    channels = Channels(image.shape[2], image.dtype.name)  # type: ignore[arg-type]
    about = read.inspect(data, channels, **LIMITS)
    assert (about.status, about.height, about.width) == ("ok", *image.shape[:2])
    decoded = values(data, channels)
    assert decoded is not None and decoded.dtype == image.dtype and decoded.dtype.isnative
    assert np.array_equal(decoded, image)


@settings(max_examples=150)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 16),
    size=st.tuples(st.integers(2, 70), st.integers(2, 70)),
    byteorder=st.sampled_from("<>"),
    layout=st.sampled_from(["pages", "interleaved", "planar"]),
    storage=st.one_of(
        st.fixed_dictionaries({"tile": st.sampled_from([(16, 16), (32, 16), (64, 80)])}),
        st.fixed_dictionaries({"rowsperstrip": st.integers(1, 80)}),
        st.just({}),
    ),
    codec=st.sampled_from(
        [
            {},
            {"compression": "zlib"},
            {"compression": "zlib", "predictor": True},
            {"compression": "lzw", "predictor": True},
            {"compression": "lzw"},
            {"compression": "zstd"},
            {"compression": "packbits"},
        ]
    ),
    big=st.booleans(),
)
def test_a_tiff_of_any_layout_has_exactly_its_values(
    dtype: str, count: int, size: tuple[int, int], byteorder: str, layout: Layout, storage: Any, codec: Any, big: bool
) -> None:
    image = random_image(dtype, count, *size)
    assert_exact(tiff_file(image, layout, byteorder=byteorder, bigtiff=big, **storage, **codec), image)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 16),
    size=st.tuples(st.integers(17, 40), st.integers(17, 40)),
    big_endian=st.booleans(),
    fortran=st.booleans(),
    first=st.booleans(),
)
def test_a_numpy_file_has_exactly_its_values(
    dtype: str, count: int, size: tuple[int, int], big_endian: bool, fortran: bool, first: bool
) -> None:
    image = random_image(dtype, count, *size)
    stored = np.moveaxis(image, 2, 0) if first else image
    stored = stored.astype(stored.dtype.newbyteorder(">" if big_endian else "<"))
    assert_exact(npy_file(np.asfortranarray(stored) if fortran else np.ascontiguousarray(stored)), image)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_png_has_exactly_its_values(dtype: str, count: int) -> None:
    image = random_image(dtype, count)
    data = png_encode(np.ascontiguousarray(image[:, :, 0] if count == 1 else image))
    assert_exact(data, image)
    for kind, content in ((b"gAMA", struct.pack(">I", 20_000)), (b"tRNS", bytes({1: 2, 3: 6}.get(count, 0)))):
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        assert_exact(data[:33] + chunk + data[33:], image)


def test_a_gray_numpy_file_without_a_channel_axis_has_one_channel() -> None:
    image = random_image("uint16", 1)
    assert_exact(npy_file(image[:, :, 0]), image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_pillow_turns_it(orientation: int) -> None:
    image = random_image("uint8", 3)
    data = tiff_file(image, "interleaved", photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    with Image.open(io.BytesIO(data)) as opened:
        assert_exact(data, np.asarray(opened))


def displayed(image: np.ndarray, orientation: int) -> np.ndarray:
    """The image as Pillow turns it: where each pixel goes is read off an image of their numbers."""
    numbers = Image.fromarray(np.arange(image.shape[0] * image.shape[1], dtype=np.int32).reshape(image.shape[:2]))
    numbers.getexif()[0x0112] = orientation
    turned = np.asarray(ImageOps.exif_transpose(numbers))
    return image.reshape(-1, image.shape[2])[turned]


def exif_of(orientation: int, byteorder: str = "MM") -> bytes:
    exif = Image.Exif()
    exif.endian = "<" if byteorder == "II" else ">"
    exif[0x0112] = orientation
    return exif.tobytes().removeprefix(b"Exif\0\0")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("dtype", "count"), [("uint8", 1), ("uint8", 3), ("uint8", 4), ("uint16", 1), ("uint16", 2), ("uint16", 4)]
)
def test_a_png_is_turned_as_its_exif_says(dtype: str, count: int, orientation: int) -> None:
    image = random_image(dtype, count)
    data = png_encode(np.ascontiguousarray(image[:, :, 0] if count == 1 else image))
    expected = displayed(image, orientation)
    for block in (exif_of(orientation), exif_of(orientation, "II")):
        assert_exact(data[:33] + chunk(b"eXIf", block) + data[33:], expected)
    assert_exact(data[:-12] + chunk(b"eXIf", exif_of(orientation)) + data[-12:], expected)
    if dtype == "uint8":
        with Image.open(io.BytesIO(data[:33] + chunk(b"eXIf", exif_of(orientation)) + data[33:])) as opened:
            by_pillow = np.asarray(ImageOps.exif_transpose(opened))
        assert np.array_equal(by_pillow.reshape(expected.shape), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("layout", ["pages", "interleaved", "planar"])
@pytest.mark.parametrize("storage", [{}, {"tile": (16, 16)}])
def test_a_tiff_of_any_channels_is_turned_as_it_says(orientation: int, layout: Layout, storage: dict[str, Any]) -> None:
    image = random_image("uint16", 5)
    data = tiff_file(image, layout, extratags=[(274, 3, 1, orientation, False)], **storage)
    assert_exact(data, displayed(image, orientation))


@pytest.mark.parametrize(
    "block", [b"", b"MM", b"Exif\0\0", b"MM\0*\xff\xff\xff\xff", exif_of(6)[:12], exif_of(0), exif_of(9), b"x" * 99]
)
def test_a_broken_exif_block_turns_nothing(block: bytes) -> None:
    image = random_image("uint16", 2)
    data = png_encode(image)
    assert_exact(data[:33] + chunk(b"eXIf", block) + data[33:], image)


def test_files_of_one_image_are_turned_each_and_must_then_agree() -> None:
    image = random_image("uint16", 2)
    first = tiff_file(image[:, :, :1], extratags=[(274, 3, 1, 6, True)])
    upright = displayed(image[:, :, 1:], 6)
    png = png_encode(np.ascontiguousarray(image[:, :, 1]))
    turned = png[:33] + chunk(b"eXIf", exif_of(6)) + png[33:]
    channels = Channels(2, "uint16", ("a.tif", "b.png"))
    about = read.inspect_stack({"a.tif": first, "b.png": turned}, channels, **LIMITS)
    assert (about.status, about.height, about.width) == ("ok", 30, 24)
    assert read.inspect_stack({"a.tif": first, "b.png": png}, channels, **LIMITS).status == "other_size"
    assert np.array_equal(values(turned, Channels(1, "uint16")), upright)


def test_overviews_and_masks_are_no_channels() -> None:
    image = random_image("uint16", 2)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for channel in np.moveaxis(image, 2, 0):
            writer.write(np.ascontiguousarray(channel))
        writer.write(np.ascontiguousarray(image[::2, ::2, 0]), subfiletype=1)
    assert_exact(buffer.getvalue(), image)


def test_pages_that_differ_are_refused() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(random_image("uint16", 1)[:, :, 0])
        writer.write(random_image("uint16", 1, 20, 20)[:, :, 0])
    assert status(buffer.getvalue(), Channels(2, "uint16")) == "unsupported"


@pytest.mark.parametrize("kind", ["tiff", "npy"])
@pytest.mark.parametrize(
    ("channels", "reason"),
    [
        (Channels(4, "uint16"), "other_channels"),
        (Channels(2, "uint16"), "other_channels"),
        (Channels(3, "uint8"), "other_dtype"),
        (Channels(3, "float32"), "other_dtype"),
        (Channels(3, "uint16"), "ok"),
    ],
)
def test_other_channels_or_values_are_refused_and_never_padded(kind: str, channels: Channels, reason: str) -> None:
    image = random_image("uint16", 3)
    data = tiff_file(image) if kind == "tiff" else npy_file(image)
    assert status(data, channels) == reason
    assert (values(data, channels) is not None) == (reason == "ok")


@pytest.mark.parametrize("dtype", ["int16", "float64", "uint32", "float16", "bool", "complex64"])
def test_values_of_other_types_are_refused(dtype: str) -> None:
    data = npy_file(np.zeros((20, 20), dtype=dtype))
    assert status(data, Channels(1, "uint16")) == "other_dtype"
    assert values(data, Channels(1, "uint16")) is None


def test_values_that_are_not_finite_are_refused() -> None:
    for bad in (np.nan, np.inf):
        image = random_image("float32", 2)
        image[3, 4, 1] = bad
        assert values(npy_file(image), Channels(2, "float32")) is None


def test_limits_of_size_count_all_channels() -> None:
    data = tiff_file(random_image("uint8", 6, 100, 100))
    assert status(data, Channels(6, "uint8"), max_pixels=20_000) == "ok"
    assert status(data, Channels(6, "uint8"), max_pixels=19_999) == "too_large"
    assert status(data, Channels(6, "uint8"), min_side=101) == "too_small"
    assert read.decode(data, Channels(6, "uint8"), max_pixels=19_999) is None


def test_no_pickle_is_loaded() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}] * 400, dtype=object).reshape(20, 20), allow_pickle=True)
    assert status(buffer.getvalue(), Channels(1, "uint16")) == "unsupported"
    assert values(buffer.getvalue(), Channels(1, "uint16")) is None


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (100000, 100000)}\n"),
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (-5, -5)}\n") + bytes(50),
        npy_header("{'descr': '<u2', 'fortran_order': False, 'shape': (5, 5)}\n") + bytes(49),
        npy_header("{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (5, 5)}\n") + bytes(50),
        npy_header("__import__('os').abort()\n"),
        npy_header("(" * 2000),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b"{" * 100,
        b"\x93NUMPY\x03\x00\x00\x00",
        b"\x93NUMPY",
    ],
)
def test_numpy_headers_that_lie_are_refused_at_once(data: bytes) -> None:
    with cpu_limit(5):
        assert status(data, Channels(1, "uint16")) != "ok"
        assert values(data, Channels(1, "uint16")) is None


# ---- several files ------------------------------------------------------------------------------------------------------

STACK = Channels(3, "uint16", members=("b02.tif", "b03.tif", "b04.npy"))


def stack(image: np.ndarray) -> dict[str, bytes]:
    return {
        "b02.tif": tiff_file(image[:, :, :1]),
        "b03.tif": tiff_file(image[:, :, 1:2], byteorder=">"),
        "b04.npy": npy_file(image[:, :, 2]),
    }


def test_files_are_stacked_in_the_declared_order() -> None:
    parts = stack(random_image("uint16", 3))
    assert read.inspect_stack(parts, STACK, **LIMITS).status == "ok"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"b03.tif": None}, "missing_image"),
        ({"b03.tif": tiff_file(random_image("uint8", 1))}, "other_dtype"),
        ({"b03.tif": tiff_file(random_image("uint16", 2))}, "other_channels"),
        ({"b03.tif": tiff_file(random_image("uint16", 1, 25, 30))}, "other_size"),
        ({"b03.tif": b"<html>"}, "not_image"),
    ],
)
def test_a_stack_whose_files_differ_is_refused(change: dict[str, bytes | None], reason: str) -> None:
    parts = {name: data for name, data in (stack(random_image("uint16", 3)) | change).items() if data is not None}
    assert read.inspect_stack(parts, STACK, **LIMITS).status == reason


# ---- DICOM --------------------------------------------------------------------------------------------------------------


def dicom_file(image: np.ndarray, *, window: tuple[float, float] | None = None, **elements: Any) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    frames = image.shape[2]
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = *image.shape[:2], 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = image.dtype.itemsize * 8
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(image.dtype.kind == "i")
    dataset.NumberOfFrames = frames
    if window is not None:
        dataset.WindowCenter, dataset.WindowWidth = window
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = np.ascontiguousarray(np.moveaxis(image, 2, 0)).tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize("frames", [1, 3])
def test_dicom_as_stored_is_exact(frames: int) -> None:
    image = random_image("uint16", frames)
    assert_exact(dicom_file(image), image)


def test_dicom_as_float_is_rescaled_and_signed() -> None:
    image = random_image("uint16", 1).view(np.int16)
    data = dicom_file(image, RescaleSlope=2, RescaleIntercept=-1024)
    assert status(data, Channels(1, "uint16")) == "other_dtype"
    channels = Channels(1, "float32")
    assert status(data, channels) == "ok"
    assert np.array_equal(values(data, channels), image.astype(np.float32) * 2 - 1024)


def test_a_window_of_dicom_covers_the_full_range() -> None:
    image = np.array([[[0], [100], [150], [200], [900]]], dtype=np.uint16).repeat(2, axis=0)
    channels = Channels(1, "uint16", dicom="window")
    data = dicom_file(image, window=(150, 100))
    assert values(data, channels)[0, :, 0].tolist() == [0, 0, 32768, 65535, 65535]
    assert values(dicom_file(image), channels) is None, "it has no window"


def test_a_deflated_or_cut_dicom_is_refused_before_it_is_parsed() -> None:
    data = dicom_file(random_image("uint16", 1))
    deflated = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"[:20])
    assert status(deflated, Channels(1, "uint16")) == "unsupported"
    assert status(data[:-100], Channels(1, "uint16")) in ("truncated", "not_image")
    assert values(data[:-100], Channels(1, "uint16")) is None


# ---- hostile files ------------------------------------------------------------------------------------------------------


def tiff_of(tags: dict[int, tuple[int, int, int]], rest: bytes = bytes(64)) -> bytes:
    """A little-endian TIFF of one directory; each tag has type, count and value."""
    entries = b"".join(struct.pack("<HHII", tag, *tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0) + rest


PLAIN = {
    256: (3, 1, 64),
    257: (3, 1, 64),
    258: (3, 1, 16),
    259: (3, 1, 1),
    262: (3, 1, 1),
    273: (4, 1, 200),
    277: (3, 1, 1),
    278: (4, 1, 64),
    279: (4, 1, 8192),
}
BOMBS = {
    "a gigapixel": {256: (4, 1, 1 << 30), 257: (4, 1, 1 << 30)},
    "samples without number": {277: (3, 1, 65535)},
    "strips without number": {278: (4, 1, 1), 273: (4, 1 << 28, 200), 279: (4, 1 << 28, 200)},
    "one row a strip of many": {257: (4, 1, 1 << 24), 256: (3, 1, 1), 278: (4, 1, 1)},
    "huge tiles": {322: (4, 1, 1 << 30), 323: (4, 1, 1 << 30), 324: (4, 1, 200), 325: (4, 1, 100)},
    "deep": {32997: (4, 1, 1 << 20)},
    "a strip beyond the end": {273: (4, 1, 0xFFFFFFF0)},
    "a strip longer than the file": {279: (4, 1, 0xFFFFFFF0)},
    "bits without number": {258: (3, 1, 65535)},
    "a codec with surprises": {259: (3, 1, 34712)},
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_tiffs_that_claim_too_much_are_refused_at_once(name: str) -> None:
    data = tiff_of(PLAIN | BOMBS[name], bytes(9000))
    with cpu_limit(10):
        assert status(data, Channels(1, "uint16")) != "ok"
        assert values(data, Channels(1, "uint16")) is None


def test_the_tiff_those_are_made_of_is_read() -> None:
    assert status(tiff_of(PLAIN, bytes(9000)), Channels(1, "uint16")) == "ok"


@pytest.mark.parametrize("compression", [8, 5, 50000])
def test_a_strip_that_inflates_beyond_its_size_is_not_inflated(compression: int) -> None:
    from imagecodecs import lzw_encode, zstd_encode

    plain = bytes(1 << 28)
    packed = {8: lambda: zlib.compress(plain, 9), 5: lambda: lzw_encode(plain), 50000: lambda: zstd_encode(plain)}[compression]()
    tags = PLAIN | {259: (3, 1, compression), 279: (4, 1, len(packed))}
    data = tiff_of(tags, bytes(200 - 8 - 2 - 12 * len(tags) - 4) + packed)
    with cpu_limit(10):
        decoded = values(data, Channels(1, "uint16"))
    assert decoded is None or not decoded.any()


def test_a_chain_of_directories_that_never_ends_is_cut() -> None:
    data = bytearray(tiff_of(PLAIN, bytes(9000)))
    at = 8 + 2 + 12 * len(PLAIN)
    data[at : at + 4] = struct.pack("<I", 8)  # the next directory is the first
    with cpu_limit(10):
        status(bytes(data), Channels(1, "uint16"))
    many = tiff_file(random_image("uint8", 1, 4, 4).repeat(2000, axis=2), "pages")
    with cpu_limit(30):
        assert status(many, Channels(16, "uint8")) == "other_channels"


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["zlib", "lzw", "raw", "tiled", "planar", "npy", "png", "dicom"]),
)
def test_damaged_files_never_raise(seed: int, kind: str) -> None:
    image = random_image("uint16", 3, 20, 20)
    made = {
        "zlib": lambda: tiff_file(image, compression="zlib", predictor=True),
        "lzw": lambda: tiff_file(image, "interleaved", compression="lzw"),
        "raw": lambda: tiff_file(image),
        "tiled": lambda: tiff_file(image, tile=(16, 16)),
        "planar": lambda: tiff_file(image, "planar"),
        "npy": lambda: npy_file(image),
        "png": lambda: png_encode(image),
        "dicom": lambda: dicom_file(image),
    }[kind]()
    random = np.random.default_rng(seed)
    data = bytearray(made)
    for at in random.integers(0, min(len(data), 400 if seed % 2 else len(data)), 6):
        data[at] = random.integers(256)
    damaged = bytes(data[: random.integers(1, len(data) + 1)] if seed % 3 == 0 else data)
    channels = Channels(3, "uint16")
    with cpu_limit(20):
        status(damaged, channels)
        decoded = values(damaged, channels)
    assert decoded is None or (decoded.shape[2] == 3 and decoded.dtype == np.uint16)


WARD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from pathlib import Path
from pipeline.data.formats import read
from pipeline.data.formats.channels import Channels
from pipeline.data.index.fields import STATUSES
kinds = [Channels(count, dtype) for count in (1, 3, 4) for dtype in ("uint8", "uint16", "float32")]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    data = Path(name).read_bytes()
    for channels in kinds:
        result = read.inspect(data, channels, min_side=1, max_pixels=1_000_000)
        assert result.status in STATUSES, (name, result)
        decoded = read.decode(data, channels, max_pixels=1_000_000)
        assert decoded is None or result.status == "ok", (name, channels, result)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(len(sys.argv) - 1, grown)
"""


def test_every_hostile_file_is_counted_or_decoded_within_limits(shared_data: Path) -> None:
    """In a process that may take 3 GB of addresses and a minute; a crash ends it with another exit code."""
    import subprocess
    import sys

    from tests.helpers.runs import ROOT, environment

    files = [str(path) for path in sorted((shared_data / "hostile").iterdir())]
    done = subprocess.run([sys.executable, "-c", WARD, *files], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, grown = map(int, done.stdout.split())
    assert count == len(files) and grown < 300, done.stdout
