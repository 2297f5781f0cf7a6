"""``fovea replay`` in tests: run it, and plant what it has to report: other images in a shard, other tensors in a checkpoint."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.helpers.runs import ROOT, environment


def replay(run: Path, *words: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``fovea replay`` with the packages of ``root``."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli.main", "replay", str(run), *words],
        env=environment() | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Times and bytes of all files of a run."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def replace_image(shard: Path, key: str, colour: tuple[int, int, int]) -> None:
    """Put another valid image of the same size in pixels and bytes into a shard, whose size and times stay as they are."""
    about = shard.stat()
    with tarfile.open(shard) as tar:
        member = next(one for one in tar if Path(one.name).stem == key and one.name.endswith((".jpg", ".jpeg", ".png", ".webp")))
        offset, size = member.offset_data, member.size
    content = bytearray(shard.read_bytes())
    old = Image.open(io.BytesIO(content[offset : offset + size]))
    buffer = io.BytesIO()
    Image.new("RGB", old.size, colour).save(buffer, old.format)
    new = _padded(buffer.getvalue(), size, str(old.format))
    assert Image.open(io.BytesIO(new)).size == old.size and len(new) == size
    content[offset : offset + size] = new
    shard.write_bytes(content)
    os.utime(shard, ns=(about.st_atime_ns, about.st_mtime_ns))


def _padded(image: bytes, size: int, kind: str) -> bytes:
    """The image with a comment that makes it ``size`` bytes long."""
    gap = size - len(image)
    if kind == "JPEG":  # a comment has four bytes besides its text
        assert gap >= 4, gap
        return image[:2] + b"\xff\xfe" + (gap - 2).to_bytes(2, "big") + bytes(gap - 4) + image[2:]
    assert kind == "PNG" and gap >= 16, (kind, gap)
    import zlib

    body = b"tEXt" + b"a\0" + b"b" * (gap - 14)
    chunk = (gap - 12).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return image[:33] + chunk + image[33:]


def edit_tensor(checkpoint: Path, rank: int, name: str) -> None:
    """Flip the last bit of the first element of a rank's tensor, and make the manifest's checksum match."""
    path = checkpoint / f"rank_{rank:05d}.safetensors"
    tensors = load_file(path)
    bits = tensors[name].view(np.uint32).copy()
    bits[0] ^= 1
    tensors[name] = bits.view(np.float32)
    save_file(tensors, path)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["name"] == path.name:
            file["size"], file["xxh3"] = path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
