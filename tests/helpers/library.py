"""A small data set for the library's tests: two sets of shards with captions, classes and JSON."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def jpeg(seed: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side + 4, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, samples: dict[str, dict[str, bytes]], **options: Any) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def sample(number: int) -> dict[str, bytes]:
    """Members of a sample; which there are, and in which order, changes with the number."""
    members = {
        "cls": b"%d" % (number % 7),
        "jpg": jpeg(number),
        "json": json.dumps({"number": number, "tags": ["x"] * (number % 5)}).encode(),
        "txt": f"first {number}\nsecond {number}\n".encode(),
        "vec.bin": bytes([number % 256]) * (number * 37 % 1500),
    }
    return dict(sorted(members.items(), reverse=number % 3 == 0))


def make(folder: Path) -> None:
    """Writes a-0.tar, a-1.tar and a-2.tar (53 samples) and b-0.tar (20 samples)."""
    numbers = iter(range(1000))
    for name, count in (("a-0", 20), ("a-1", 15), ("a-2", 18), ("b-0", 20)):
        samples = {f"{name}/{number:04d}": sample(number) for number in (next(numbers) for _ in range(count))}
        write(folder / f"{name}.tar", samples, format=tarfile.GNU_FORMAT if name == "a-2" else tarfile.USTAR_FORMAT)
