"""Decoding: what Pillow sees, for every format that is accepted, and ``None`` for what is no picture, there and nowhere else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from pipeline.data.augment import pillow
from pipeline.data.augment.decode import Decoder
from pipeline.data.index.image_header import inspect_header


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(threads=2)


def picture(mode: str = "RGB", width: int = 53, height: int = 37) -> Image.Image:
    """Soft blobs of colour, with an alpha channel where the mode has one."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    soft = np.stack([np.asarray(Image.fromarray(noise[..., c]).filter(ImageFilter.GaussianBlur(2))) for c in range(4)], axis=-1)
    spread = ((soft.astype(np.float32) - soft.min()) * 255 / np.ptp(soft)).astype(np.uint8)
    return Image.fromarray(spread, "RGBA").convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture(), kind, quality=95, exif=exif)


FILES = {
    "jpeg 4:4:4": encode(picture(), "JPEG", quality=90, subsampling=0),
    "jpeg 4:2:0": encode(picture(), "JPEG", quality=90, subsampling=2),
    "jpeg progressive": encode(picture(), "JPEG", quality=90, progressive=True),
    "jpeg gray": encode(picture("L"), "JPEG"),
    "jpeg cmyk": encode(picture("CMYK"), "JPEG"),
    "jpeg with trailing bytes": encode(picture(), "JPEG") + b"\0" * 99,
    "png": encode(picture(), "PNG"),
    "png alpha": encode(picture("RGBA"), "PNG"),
    "png gray": encode(picture("L"), "PNG"),
    "png gray alpha": encode(picture("LA"), "PNG"),
    "png palette": encode(picture().quantize(32), "PNG"),
    "png black and white": encode(picture("1"), "PNG"),
    "webp": encode(picture(), "WEBP", quality=90),
    "webp lossless": encode(picture(), "WEBP", lossless=True),
    "webp alpha": encode(picture("RGBA"), "WEBP", lossless=True, exact=True),
    "tiff": encode(picture(), "TIFF", compression="tiff_lzw"),
    "bmp": encode(picture(), "BMP"),
    "ppm": encode(picture(), "PPM"),
    "jp2": encode(picture(), "JPEG2000"),
    **{f"orientation {n}": rotated(n) for n in range(1, 9)},
    **{f"png orientation {n}": rotated(n, "PNG") for n in range(1, 9)},
}
BAD = {
    "empty": b"",
    "text": b"<html><body>404 not found</body></html>",
    "half a jpeg": FILES["jpeg 4:2:0"][: len(FILES["jpeg 4:2:0"]) // 2],
    "a jpeg's header": FILES["jpeg 4:2:0"][:30],
    "half a png": FILES["png"][: len(FILES["png"]) // 2],
    "a gif": encode(picture().quantize(8), "GIF"),
}


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_pillows(decoder: Decoder, name: str) -> None:
    (image,) = decoder.decode([FILES[name]])
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8
    expected = by_pillow(FILES[name])
    assert image.shape == expected.shape
    distance = np.abs(image - expected)
    most = 1 if name.startswith(("webp", "jp2")) else 0
    assert distance.max() <= most, f"mean {distance.mean():.3f}, most {distance.max()}"


def test_sixteen_bits_are_scaled_to_eight(decoder: Decoder) -> None:
    gray = np.asarray(picture("L"))
    (image,) = decoder.decode([encode(Image.fromarray(gray.astype(np.uint16) * 257), "PNG")])
    assert np.abs(image.astype(int) - gray[:, :, None]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_png_whose_exif_follows_the_pixels_has_the_size_that_it_is_decoded_to(decoder: Decoder, orientation: int) -> None:
    data = rotated(orientation, "PNG")
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    moved = data[:at] + data[at + length : -12] + data[at : at + length] + data[-12:]
    about, (image,) = inspect_header(moved), decoder.decode([moved])
    assert about.status == "ok" and (about.height, about.width) == image.shape[:2]
    assert np.array_equal(image, by_pillow(data)) and np.array_equal(image, pillow.decode(moved))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bits_are_turned_too(decoder: Decoder, orientation: int) -> None:
    gray, exif = np.asarray(picture("L")), Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(gray.astype(np.uint16) * 257), "PNG", exif=exif)
    expected = by_pillow(encode(picture("L"), "PNG", exif=exif))
    about = inspect_header(data)
    assert (about.status, about.height, about.width) == ("ok", *expected.shape[:2])
    for image in (decoder.decode([data])[0], pillow.decode(data)):
        assert image is not None and image.shape == expected.shape and np.abs(image.astype(int) - expected).max() <= 1


def test_what_cannot_be_decoded_is_none_and_the_others_come_out_unharmed(decoder: Decoder) -> None:
    names = [*FILES, *BAD]
    order = np.random.default_rng(1).permutation(len(names))
    everything = {**FILES, **BAD}
    images = decoder.decode([everything[names[i]] for i in order])
    alone = {name: decoder.decode([data])[0] for name, data in FILES.items()}
    for i, image in zip(order, images, strict=True):
        if names[i] in BAD:
            assert image is None, names[i]
        else:
            assert np.array_equal(image, alone[names[i]]), names[i]


def test_nothing_gives_nothing(decoder: Decoder) -> None:
    assert decoder.decode([]) == []
    assert decoder.decode(list(BAD.values())) == [None] * len(BAD)


def test_threads_change_nothing() -> None:
    files = list(FILES.values())
    one, many = Decoder(threads=1).decode(files), Decoder(threads=4).decode(files)
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))


def test_a_blank_is_a_gray_picture(decoder: Decoder) -> None:
    blank = decoder.blank(8)
    assert (blank.shape, blank.dtype, np.unique(blank).tolist()) == ((8, 8, 3), np.uint8, [128])


def test_photographs_are_decoded_as_pillow_does(decoder: Decoder, shared_data: Path) -> None:
    files = [path.read_bytes() for path in sorted((shared_data / "photos").iterdir())[::40]]
    for data, image in zip(files, decoder.decode(files), strict=True):
        assert np.array_equal(image, by_pillow(data))


def test_hostile_files_never_do_harm(decoder: Decoder, shared_data: Path) -> None:
    files = [path.read_bytes() for path in sorted((shared_data / "hostile").iterdir()) if path.stat().st_size < 100_000]
    judged = [inspect_header(data, min_side=1) for data in files]
    files = [data for data, verdict in zip(files, judged, strict=True) if verdict.status != "truncated"]
    judged = [verdict for verdict in judged if verdict.status != "truncated"]
    images = decoder.decode(files)
    for image in images:
        assert image is None or (image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8)
    as_told = [
        image is not None and image.shape[:2] == (verdict.height, verdict.width)
        for image, verdict in zip(images, judged, strict=True)
        if verdict.status == "ok"
    ]
    assert len(as_told) > 100
    assert np.mean(as_told) > 0.9
    assert len(files) - len(as_told) > 50
    assert decoder.decode([FILES["png"]])[0] is not None
