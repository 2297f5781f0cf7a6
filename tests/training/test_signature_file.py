"""Signatures on disk: what is written is read, what a stranger damaged is skipped and counted, and a step takes few bytes."""

from __future__ import annotations

import math
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.training import signature_file
from pipeline.training.signature_file import (
    SCHEDULES,
    SKETCHES,
    STEP_BYTES,
    Damage,
    Header,
    Signature,
    SignatureFile,
    Weights,
    read,
    sketched,
)

HEADER = Header(attempt=0, rank=0, world=2, device="cpu", threads=1, zero_stage=2, micro_batch=8, torch="2", fovea="1", code="ab")


def signature(step: int, **changes: object) -> Signature:
    values = {"term/dino": 1.5, "term/koleo": -0.25, "norm/backbone": 3.0}
    plain = {"applied": True, "samples": 2**64 - 1, "inputs": 7, "sketches": b"abcd", "values": values, "schedules": (0.1,) * 5}
    return Signature(step, **{**plain, **changes})  # type: ignore[arg-type]


def write(path: Path, *records: Signature | Weights) -> bytes:
    file = SignatureFile(path, HEADER)
    for record in records:
        file.step(record) if isinstance(record, Signature) else file.weights(record)
    file.close()
    return path.read_bytes()


def frame(kind: bytes, payload: bytes) -> bytes:
    body = kind + len(payload).to_bytes(2, "little") + payload
    return b"\xf0\x7e" + body + zlib.crc32(body).to_bytes(4, "little")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first = signature(3)
    other = signature(4, values={"term/dino": 0.1, "term/gram": 2.0}, schedules=(), applied=False)  # rounded to fp32
    again = signature(3)
    weights = Weights(4, {"master/backbone": "00112233445566ff", "teacher/head": "ffeeddccbbaa9988"})
    write(tmp_path / "a.bin", first, other, weights, again)
    header, *records = read(tmp_path / "a.bin")
    assert header == HEADER
    assert [record.step for record in records if isinstance(record, Signature)] == [3, 4, 3]
    assert records[0] == first == records[3] and records[2] == weights
    assert isinstance(records[1], Signature)
    assert records[1].values == {"term/dino": struct.unpack("f", struct.pack("f", 0.1))[0], "term/gram": 2.0}
    assert not records[1].applied and records[1].schedules == ()


def test_values_that_are_not_numbers_keep_their_bits(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", signature(0, values={"term/a": math.nan, "term/b": math.inf, "term/c": -0.0}))
    _, record = read(tmp_path / "a.bin")
    assert (
        isinstance(record, Signature)
        and record.bits == signature(0, values={"term/a": math.nan, "term/b": math.inf, "term/c": -0.0}).bits
    )
    assert record.bits != signature(0, values={"term/a": math.nan, "term/b": math.inf, "term/c": 0.0}).bits


@pytest.mark.parametrize(("count", "sketches"), [(21, SKETCHES), (22, 0), (29, 0)])
def test_a_step_takes_at_most_200_bytes(tmp_path: Path, count: int, sketches: int) -> None:
    values = {f"term/{number}": 1.0 for number in range(count)}
    one = signature(1 << 40, sketches=bytes(SKETCHES), values=values, schedules=(0.1,) * len(SCHEDULES))
    sizes = [len(write(tmp_path / f"{times}.bin", *[one] * times)) for times in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] <= STEP_BYTES
    _, record = read(tmp_path / "1.bin")
    assert isinstance(record, Signature) and record.values == values and len(record.sketches) == sketches


@pytest.mark.parametrize("count", [0, 1, 5, 32, 33, 64, 1000])
def test_each_sample_belongs_to_one_byte(count: int) -> None:
    groups = sketched(count)
    assert len(groups) == min(count, SKETCHES)
    assert [index for group in groups for index in group] == list(range(count))
    assert all(groups)


@given(st.data())
def test_a_damaged_file_yields_only_what_was_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("signatures") / "a.bin"
    records = [*(signature(step) for step in range(6)), Weights(6, {"master/a": "00" * 8})]
    content = bytearray(write(path, *records))
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(begin + 200, len(content))))
    content[begin:end] = data.draw(st.binary(max_size=300))
    path.write_bytes(content)
    damage = Damage()
    for record in read(path, damage):
        assert record == HEADER or record in records
    assert not damage.records or bytes(content) != write(path.with_name("b.bin"), *records)


def test_the_end_that_a_kill_leaves_is_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    whole = write(path, signature(0), signature(1))
    for end in range(len(whole) - 1, len(whole) - 60, -1):
        path.write_bytes(whole[:end])
        damage = Damage()
        assert [record.step for record in read(path, damage) if isinstance(record, Signature)] == [0]
        assert damage.records == 1


def test_records_after_a_hole_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    first, both = len(write(path, signature(0))), len(write(tmp_path / "b.bin", signature(0), signature(1)))
    whole = write(tmp_path / "c.bin", signature(0), signature(1), signature(2))
    path.write_bytes(whole[:first] + bytes(both - first) + whole[both:])
    damage = Damage()
    assert [record.step for record in read(path, damage) if isinstance(record, Signature)] == [0, 2]
    assert damage.records == 1


HEAD = frame(b"H", HEADER.model_dump_json().encode())
NAMES = frame(b"N", b'["term/a"]')
STEP = struct.Struct("<QBQQQBB")


@pytest.mark.parametrize(
    "record",
    [
        frame(b"S", b""),
        frame(b"S", STEP.pack(1 << 63, 1, 0, 0, 0, 0, 0)),
        frame(b"S", STEP.pack(1, 1, 0, 0, 2, 0, 0) + bytes(4)),  # a name that there is not
        frame(b"S", STEP.pack(1, 1, 0, 0, 1, 255, 0) + bytes(4)),
        frame(b"S", STEP.pack(1, 1, 0, 0, 1, 0, 200) + bytes(1604)),
        frame(b"S", STEP.pack(1, 1, 0, 0, 0, 0, 5) + struct.pack("<5d", *[math.nan] * 5)),
        frame(b"N", b"{}"),
        frame(b"N", b'["' + b"a" * 300 + b'"]'),
        frame(b"N", ("[" + ",".join(['"a"'] * 100) + "]").encode()),
        frame(b"N", b"[" * 5000),
        frame(b"G", b"[1]"),
        frame(b"W", b"123"),
        frame(b"W", struct.pack("<QH8s", 1, 9, bytes(8))),
        frame(b"H", b'{"attempt": -1, "rank": 0, "world": 1}'),
        frame(b"H", b'{"attempt": 1e400, "rank": 0, "world": 1}'),
    ],
)
def test_a_record_of_another_form_is_skipped_and_counted(tmp_path: Path, record: bytes) -> None:
    valid = frame(b"S", STEP.pack(1, 1, 0, 0, 1, 0, 0) + bytes(4))
    (tmp_path / "a.bin").write_bytes(HEAD + NAMES + record + valid)
    damage = Damage()
    assert [record.step for record in read(tmp_path / "a.bin", damage) if isinstance(record, Signature)] == [1]
    assert damage.records == 1


def test_names_are_made_printable(tmp_path: Path) -> None:
    step = frame(b"S", STEP.pack(1, 1, 0, 0, 1, 0, 0) + bytes(4))
    (tmp_path / "a.bin").write_bytes(HEAD + frame(b"N", b'["a\\u001b[31m"]') + step)
    (record,) = [record for record in read(tmp_path / "a.bin") if isinstance(record, Signature)]
    assert all("\x1b" not in name for name in record.values)


def test_a_file_without_header_yields_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(NAMES + frame(b"S", STEP.pack(1, 1, 0, 0, 0, 0, 0)))
    assert not list(read(tmp_path / "a.bin"))


def test_marks_without_records_do_not_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(HEAD + b"\xf0\x7eS\xff\x3f" * 400_000)
    sums, real = [0], zlib.crc32

    def counted(data: bytes) -> int:
        sums[0] += len(data)
        return real(data)

    monkeypatch.setattr(signature_file.zlib, "crc32", counted)
    damage = Damage()
    assert list(read(tmp_path / "a.bin", damage)) == [HEADER] and damage.records == 1
    assert sums[0] < 1 << 28


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.bin")
    with pytest.raises(DataError, match="regular file"):
        list(read(tmp_path / "a.bin"))


def test_a_disk_that_takes_nothing_is_reported_once_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").write_text("in the way")
    file = SignatureFile(tmp_path / "folder" / "a.bin", HEADER)
    for step in range(3):
        file.step(signature(step))
    (tmp_path / "folder").unlink()
    file.step(signature(3))
    file.close()
    assert [record.step for record in read(tmp_path / "folder" / "a.bin") if isinstance(record, Signature)] == [0, 1, 2, 3]
    assert file.dropped == 0
    error = capsys.readouterr().err
    assert error.count("cannot be written") == 1 and error.count("written again") == 1
