"""Writing pictures anew: the first frame, turned upright, 16 bits scaled and not clipped; never an exception."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.index.image_header import inspect_header
from pipeline.data.pack.transcode import transcode


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def decoded(data: bytes | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(data)))


def test_the_first_frame_of_an_animation_is_kept() -> None:
    frames = [Image.new("RGB", (20, 30), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decoded(transcode(gif, "png")) == (255, 0, 0)).all()
    assert inspect_header(transcode(gif, "jpg") or b"").format == "jpeg"


def test_sixteen_bits_are_scaled_down_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    out = decoded(transcode(encoded(Image.fromarray(values), "PNG"), "png"))
    assert np.array_equal(out[..., 0], values >> 8)


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(transcode(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif), "png")).shape == (40, 20, 3)


def test_a_bomb_is_not_decoded_and_size_is_limited() -> None:
    large = encoded(Image.new("1", (3000, 1000)), "PNG")
    assert transcode(large, "png", max_pixels=2_999_999) is None
    assert decoded(transcode(large, "png", max_side=300)).shape == (100, 300, 3)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"GIF89a", b"8BPS\0\1", b"\0\0\1\0", b"DDS ", b"%!PS-Adobe-3.0 EPSF-3.0\n"]))
def test_rubbish_gives_nothing_and_never_raises(data: bytes, magic: bytes) -> None:
    out = transcode(magic + data, "png", max_pixels=1_000_000)
    assert out is None or inspect_header(out, min_side=1).status == "ok"


def test_of_the_hostile_pictures_the_decoder_gets_what_pillow_can_read(shared_data: Path) -> None:
    gained = 0
    for path in sorted((shared_data / "hostile").glob("*.gif")) + sorted((shared_data / "hostile").glob("*.avif")):
        out = transcode(path.read_bytes(), "png")
        if out is not None:
            assert inspect_header(out, min_side=1).status == "ok", path.name
            gained += 1
    assert gained > 10


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_without_a_natural_range_are_refused(mode: str) -> None:
    assert transcode(encoded(Image.new(mode, (20, 20), 7), "TIFF"), "png") is None
