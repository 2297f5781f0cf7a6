"""Unusual, damaged and malicious images: decoded as Pillow does, or refused with a reason.

Everything that uses the decoder runs in :mod:`tests.helpers.ward`, where a crash is an outcome.
"""

from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.index.fields import STATUSES
from pipeline.data.index.image_header import inspect_header, is_complete
from tests.helpers.hostile_images import decompression_bombs, encode, mutated, read_hostile_files, unusual_images
from tests.helpers.limits import cpu_limit
from tests.helpers.ward import Outcome, examine

MEMORY = 2048  # MB that no single file may take


@pytest.fixture(scope="module")
def hostile_files(shared_data: Path) -> dict[str, bytes]:
    return read_hostile_files(shared_data)


def assert_harmless(files: dict[str, bytes], outcomes: list[Outcome]) -> None:
    assert len(outcomes) == len(files)
    deaths = {name: outcome.death for name, outcome in zip(files, outcomes, strict=True) if outcome.death}
    assert not deaths, f"these took the process down, by signal: {deaths}"
    assert max(outcome.megabytes for outcome in outcomes) < MEMORY


def assert_right(files: dict[str, bytes], outcomes: list[Outcome], *, tolerance: float) -> None:
    """What was accepted and decoded has the size that was header, and Pillow's pixels."""
    wrong = {}
    for name, outcome in zip(files, outcomes, strict=True):
        header = outcome.judgement
        if outcome.shape is None or header is None or header.status != "ok":
            continue
        if outcome.shape != (header.height, header.width, 3) or outcome.distance is None or outcome.distance > tolerance:
            wrong[name] = outcome
    assert not wrong


def test_every_hostile_file_is_decoded_as_pillow_does_or_has_its_reason(hostile_files: dict[str, bytes]) -> None:
    outcomes = examine(list(hostile_files.values()))
    assert_harmless(hostile_files, outcomes)
    assert_right(hostile_files, outcomes, tolerance=0.5)
    statuses = Counter(outcome.judgement.status for outcome in outcomes if outcome.judgement)
    assert set(statuses) <= set(STATUSES)
    assert statuses.total() == len(hostile_files)
    decoded = sum(outcome.shape is not None for outcome in outcomes)
    assert decoded > 0.6 * len(hostile_files)
    assert statuses["ok"] - decoded < 0.05 * len(hostile_files), "too much is found out only when it is decoded"


@pytest.mark.slow
def test_the_decoder_survives_what_the_guard_would_have_refused(hostile_files: dict[str, bytes]) -> None:
    outcomes = examine(list(hostile_files.values()), decode_all=True)
    assert_harmless(hostile_files, outcomes)


@pytest.mark.slow
def test_whole_pictures_of_every_guise_are_decoded_rightly() -> None:
    files = unusual_images()
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


@pytest.mark.parametrize("name", sorted(decompression_bombs()))
def test_a_bomb_is_refused_by_its_header_at_once(name: str) -> None:
    data = decompression_bombs()[name]
    with cpu_limit(2):  # decoded, it takes minutes or all memory
        header = inspect_header(data)
    if name == "webp":  # Pillow looks further than the header here, and finds that it lies
        assert header.status in ("too_large", "not_image")
    else:
        assert header.status == "too_large"
        assert header.width * header.height == 30_000**2


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
    complete = {name: data for name, data in unusual_images().items() if "trailing" not in name}
    expected = dict(zip(complete, examine(list(complete.values())), strict=True))
    files = cut(complete, points)
    outcomes = examine(list(files.values()))
    assert_harmless(files, outcomes)
    for name, outcome in zip(files, outcomes, strict=True):
        if outcome.shape is not None:  # what was cut off was no pixel: padding, another page, text
            assert outcome.distance is None or outcome.distance < 0.5, name
            assert outcome.shape == expected[name.partition(" cut at")[0]].shape, name


@pytest.mark.slow
def test_no_cut_picture_passes_for_a_whole_one() -> None:
    check_cuts(12)


@pytest.mark.slow
def test_no_cut_picture_passes_for_a_whole_one_wherever_it_is_cut() -> None:
    check_cuts(200)


def check_mutations(rounds: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    files = {f"{name} {number}": mutated(data, random) for name, data in unusual_images().items() for number in range(rounds)}
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
@given(name=st.sampled_from(sorted(unusual_images())), seed=st.integers(0, 2**32))
def test_judging_never_raises(name: str, seed: int) -> None:
    assert inspect_header(mutated(unusual_images()[name], np.random.default_rng(seed))).status in STATUSES


@settings(max_examples=60, deadline=None)
@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"BM", b"P5\n", b"\xff\x4f\xff\x51"]),
    rest=st.binary(max_size=400),
)
@example(start=b"RIFF", rest=b"\xff\xff\xff\xffWEBPVP8X\n\0\0\0")
def test_judging_noise_never_raises(start: bytes, rest: bytes) -> None:
    assert inspect_header(start + rest).status in STATUSES
