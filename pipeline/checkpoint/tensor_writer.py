"""Writes tensors to a safetensors file with fsync and checksum, without blocking other threads.

The public format is: eight bytes with the length of a JSON header, the header, the raw tensors. The safetensors package reads
the files; it does not write them, because it copies everything while holding Python's global lock and cannot checksum what it
writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipeline.checkpoint.files import CHECKSUM, CHECKSUMS
from pipeline.untrusted import printable

_HEADER = 256 << 20  # maximum size of a header in bytes
_PIECE = 16 << 20  # bytes written before other threads get a turn
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Writes tensors of any device and syncs the file.

    Args:
        path: the file; an existing one is replaced.
        tensors: tensors by name. They must not change during the call.
        metadata: entries for the header, as safetensors allows them.

    Returns:
        Name, size and checksum of the file as listed in a manifest. The checksum is of the bytes in memory, so it reveals
        write errors.

    Raises:
        OSError: the disk is full, or the file cannot be created.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # large items first, so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _TYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = CHECKSUMS[CHECKSUM](), 0
    with path.open("wb", buffering=0) as file:
        for piece in (memoryview(len(text).to_bytes(8, "little") + text), *(p for n in names for p in _pieces(tensors[n]))):
            digest.update(piece)
            size += len(piece)
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())
    return {"name": path.name, "size": size, CHECKSUM: digest.hexdigest()}


def begins(file: BinaryIO) -> dict[str, int]:
    """Offset of each fp32 tensor's raw values in an open safetensors file, in bytes from its start.

    Raises:
        ValueError: the header cannot be read, or a tensor has another dtype or lies outside the file.
    """
    size, file_size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if size > min(file_size, _HEADER):
        raise ValueError(
            f"its length of {size} bytes is more than the file's" if size > file_size else f"it is {size} bytes long"
        )
    try:
        header = json.loads(file.read(size))
        offsets = {name: (entry["data_offsets"], entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
        checked = {name: _begin(name, begin, end, kind, file_size - 8 - size) for name, ((begin, end), kind) in offsets.items()}
    except (AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ValueError("it lacks the tensors' offsets") from error
    return {name: 8 + size + begin for name, begin in checked.items()}


def _begin(name: str, begin: object, end: object, kind: object, most: int) -> int:
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end <= most:
        raise ValueError(f"{printable(name, limit=80)} lies outside the file")
    if kind != "F32":
        raise ValueError(f"{printable(name, limit=80)} must be F32")
    return begin


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        raw = flat.view(torch.uint8).numpy().data
        yield from (raw[begin : begin + _PIECE] for begin in range(0, len(raw), _PIECE))
