"""Signatures on disk: a compact record of every step of a run, with which ``fovea replay`` compares. Does not import torch.

``<run>/signatures/attempt-0000-rank-0.bin`` belongs to one rank of one attempt and is only appended to, so that a killed process
leaves at most one incomplete record at its end. A record is

    mark (2 bytes) | kind (1) | length (2) | payload | CRC-32 of kind, length and payload (4)

little-endian. Kinds: ``H`` who wrote the file (JSON, see :class:`Header`); ``N`` names of values that are new (JSON); ``S`` a
step; ``G`` names of groups of tensors (JSON); ``W`` digests of the groups in a checkpoint. A step is written without the names of
its values: a bit mask says which of the names so far they belong to.

A reader skips what is damaged and counts it. Within a file the same step may follow again after a rollback; the last is valid.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.runtime.append_file import AppendFile
from pipeline.untrusted import open_regular, parse_json, printable

STEP_BYTES = 200  # maximum size of a step's record, with up to 29 values
SKETCHES = 32  # bytes that distinguish samples
SCHEDULES = ("learning rate", "last layer's learning rate", "weight decay", "teacher momentum", "teacher temperature")
_MARK = b"\xf0\x7e"
_HEAD = struct.Struct("<2scH")
_STEP = struct.Struct("<QBQQQBB")  # step, applied, samples, inputs, mask of values, sketches, schedules
_NAMES = 64  # names of values in a file, bits of the mask
_GROUPS = 1024  # names of groups of tensors in a file
_PAYLOAD = 1 << 14  # maximum size of a payload, bytes
_READ = 4 << 30  # bytes that are read of a file
_TRIES = 10_000  # marks without a valid record after which the rest of a file is not read
_PENDING = 16 << 20  # bytes that wait for space on the disk


class Header(BaseModel):
    """Who wrote a file of signatures, and with what.

    Attributes:
        attempt: number of the attempt.
        rank: the rank.
        world: number of ranks.
        device: name of the device.
        threads: compute threads of the rank.
        zero_stage: ZeRO stage.
        micro_batch: samples of a forward pass.
        torch: version of torch.
        fovea: version of fovea.
        code: digest of fovea's source files.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    attempt: Annotated[int, Field(ge=0, lt=1 << 31)]
    rank: Annotated[int, Field(ge=0, lt=1_000_000)]
    world: Annotated[int, Field(ge=1, le=1_000_000)]
    device: Annotated[str, Field(max_length=200)] = ""
    threads: Annotated[int, Field(ge=0, lt=1 << 20)] = 0
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    micro_batch: Annotated[int, Field(ge=1, lt=1 << 40)] = 1
    torch: Annotated[str, Field(max_length=200)] = ""
    fovea: Annotated[str, Field(max_length=200)] = ""
    code: Annotated[str, Field(max_length=64)] = ""


@dataclass(frozen=True)
class Signature:
    """One rank's record of a step.

    Attributes:
        step: the step's number.
        applied: whether its gradients were applied.
        samples: sum modulo 2**64 of a hash of each sample's number and position in the global batch; sums over ranks are the same
            for any number of ranks.
        inputs: the same of a digest of each sample's views, tokens and masks.
        sketches: one byte of these hashes for each sample, or for each of 32 equal groups of them.
        values: loss terms (``term/<name>``, of this rank), and on rank 0 gradient norms (``norm/<network>``); fp32.
        schedules: on rank 0 the values of :data:`SCHEDULES`, else empty.
    """

    step: int
    applied: bool
    samples: int
    inputs: int
    sketches: bytes = b""
    values: Mapping[str, float] = field(default_factory=dict)
    schedules: tuple[float, ...] = ()

    @property
    def bits(self) -> tuple[object, ...]:
        """Everything but the step's number, with exact bits of its numbers: equal for equal steps, also where values are NaN."""
        values = tuple(sorted((name, struct.pack("<f", value)) for name, value in self.values.items()))
        schedules = struct.pack(f"<{len(self.schedules)}d", *self.schedules)
        return self.applied, self.samples, self.inputs, self.sketches, values, schedules


@dataclass(frozen=True)
class Weights:
    """Digests of one rank's part of a checkpoint, by kind of tensor and network, such as ``exp_avg/backbone``."""

    step: int
    digests: Mapping[str, str]


def sketched(count: int) -> list[range]:
    """The samples, of a rank's ``count``, that each byte of ``Signature.sketches`` covers."""
    groups = min(count, SKETCHES)
    bounds = [position * count // max(groups, 1) for position in range(groups + 1)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


class SignatureFile:
    """Appends to a file of signatures. What a full disk does not take waits in memory; an error is reported once.

    Args:
        path: the file; its directory is created.
        header: who writes it.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self._file = AppendFile(path, kept=_PENDING, what="signatures")
        self._names: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._append(b"H", header.model_dump_json().encode())
        self._file.flush()

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def dropped(self) -> int:
        """Records that were lost, since the disk took none for too long."""
        return self._file.dropped

    @property
    def written(self) -> int:
        """Bytes written."""
        return self._file.written

    def step(self, signature: Signature) -> None:
        """Appends a step; of more than 64 values over all steps of the file only the first are kept. Sketches are left out where
        the record would otherwise be longer than :data:`STEP_BYTES`.
        """
        if not signature.values.keys() <= self._names.keys():
            added = [name for name in signature.values if name not in self._names][: _NAMES - len(self._names)]
            if added:
                self._names |= {name: len(self._names) + position for position, name in enumerate(added)}
                self._append(b"N", json.dumps(added).encode())
        bits = sorted((self._names[name], value) for name, value in signature.values.items() if name in self._names)
        size = _HEAD.size + _STEP.size + 4 * len(bits) + 8 * len(signature.schedules) + 4
        sketches = signature.sketches if size + len(signature.sketches) <= STEP_BYTES else b""
        payload = _STEP.pack(
            signature.step,
            signature.applied,
            signature.samples,
            signature.inputs,
            sum(1 << bit for bit, _ in bits),
            len(sketches),
            len(signature.schedules),
        )
        values = struct.pack(f"<{len(bits)}f{len(signature.schedules)}d", *(value for _, value in bits), *signature.schedules)
        self._append(b"S", payload + sketches + values)
        self._file.flush()

    def weights(self, weights: Weights) -> None:
        """Appends the digests of a checkpoint; those of 8 bytes, in hexadecimal."""
        added = [name for name in weights.digests if name not in self._groups][: _GROUPS - len(self._groups)]
        for begin in range(0, len(added), 100):
            part = added[begin : begin + 100]
            self._groups |= {name: len(self._groups) + position for position, name in enumerate(part)}
            self._append(b"G", json.dumps(part).encode())
        entries = [
            (self._groups[name], bytes.fromhex(digest)) for name, digest in weights.digests.items() if name in self._groups
        ]
        body = b"".join(struct.pack("<H8s", number, digest) for number, digest in entries)
        self._append(b"W", struct.pack("<Q", weights.step) + body)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, kind: bytes, payload: bytes) -> None:
        self._file.append(_record(kind, payload))


def _record(kind: bytes, payload: bytes) -> bytes:
    body = kind + len(payload).to_bytes(2, "little") + payload
    return _MARK + body + zlib.crc32(body).to_bytes(4, "little")


# ---- reading ------------------------------------------------------------------------------------------------------------


@dataclass
class Damage:
    """What a reader has skipped in a file: the number of damaged or incomplete records."""

    records: int = 0


def read(path: Path, damage: Damage | None = None) -> Iterator[Header | Signature | Weights]:
    """Yields the valid records of a file in order. A file without a valid header yields nothing.

    Args:
        path: the file, which may be a stranger's.
        damage: counts what is skipped.

    Raises:
        DataError: the path is not a regular file.
        OSError: it cannot be read.
    """
    names: list[str] = []
    groups: list[str] = []
    header: Header | None = None
    for kind, payload in _records(path, damage or Damage()):
        try:
            if kind == b"H":
                header = Header.model_validate(parse_json(payload))
                yield header
            elif header is None:
                return
            elif kind in (b"N", b"G"):
                _add_names(payload, *((names, _NAMES) if kind == b"N" else (groups, _GROUPS)))
            elif kind == b"S":
                yield _signature(payload, names)
            elif kind == b"W":
                yield _weights(payload, groups)
        except (ValueError, ValidationError, struct.error, IndexError):
            if damage is not None:
                damage.records += 1


def _records(path: Path, damage: Damage) -> Iterator[tuple[bytes, bytes]]:
    """Kinds and payloads of the intact records; after a damaged one it continues at the next mark."""
    buffer, begin, left, tries, damaged = b"", 0, _READ, 0, False
    with os.fdopen(open_regular(path), "rb") as file:
        while tries <= _TRIES:
            if len(buffer) - begin < _HEAD.size + _PAYLOAD + 4 and left:
                more = file.read(min(1 << 20, left))
                left = left - len(more) if more else 0
                buffer, begin = buffer[begin:] + more, 0
            if begin >= len(buffer):
                return
            if (intact := _intact(buffer, begin)) is not None:
                kind, payload, begin = intact
                damaged = False
                yield kind, payload
                continue
            damage.records += not damaged
            damaged, tries = True, tries + 1
            after = buffer.find(_MARK, begin + 1)
            begin = after if after >= 0 else max(len(buffer) - 1, begin + 1)  # a mark may begin in the last byte


def _intact(buffer: bytes, begin: int) -> tuple[bytes, bytes, int] | None:
    """Kind, payload and end of the record at ``begin``, if it is one."""
    if len(buffer) - begin < _HEAD.size:
        return None
    mark, kind, length = _HEAD.unpack_from(buffer, begin)
    body = begin + _HEAD.size
    if mark != _MARK or length > _PAYLOAD or len(buffer) < body + length + 4:
        return None
    if zlib.crc32(buffer[begin + 2 : body + length]) != int.from_bytes(buffer[body + length : body + length + 4], "little"):
        return None
    return kind, buffer[body : body + length], body + length + 4


def _add_names(payload: bytes, names: list[str], most: int) -> None:
    added = parse_json(payload)
    if not isinstance(added, list) or len(names) + len(added) > most:
        raise ValueError("too many names")
    if not all(isinstance(name, str) and 0 < len(name) <= 200 for name in added):
        raise ValueError("not names")
    names += [printable(name) for name in added]


def _signature(payload: bytes, names: list[str]) -> Signature:
    step, applied, samples, inputs, mask, sketches, schedules = _STEP.unpack_from(payload)
    bits = [bit for bit in range(_NAMES) if mask >> bit & 1]
    if step >= 1 << 62 or schedules not in (0, len(SCHEDULES)) or sketches > SKETCHES:
        raise ValueError("not a step")
    if len(payload) != _STEP.size + sketches + 4 * len(bits) + 8 * schedules:
        raise ValueError("another length")
    numbers = struct.unpack_from(f"<{len(bits)}f{schedules}d", payload, _STEP.size + sketches)
    if not all(map(math.isfinite, numbers[len(bits) :])):
        raise ValueError("not finite")
    values = {names[bit]: number for bit, number in zip(bits, numbers, strict=False)}
    sketch = payload[_STEP.size : _STEP.size + sketches]
    return Signature(step, bool(applied), samples, inputs, sketch, values, tuple(numbers[len(bits) :]))


def _weights(payload: bytes, groups: list[str]) -> Weights:
    (step,) = struct.unpack_from("<Q", payload)
    if step >= 1 << 62:
        raise ValueError("not a step")
    return Weights(step, {groups[number]: digest.hex() for number, digest in struct.iter_unpack("<H8s", payload[8:])})
