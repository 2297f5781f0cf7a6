"""Headers of a checkpoint's tensor files: whatever stands there, readers end in one error and take no memory for it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.checkpoint.files import Saved, entry, read, verify
from pipeline.checkpoint.reader import read_student
from pipeline.checkpoint.tensor_writer import begins, write_tensors
from pipeline.errors import CheckpointError
from pipeline.models.tensor_files import opened, read_tensors


def rewritten(saved: Saved, name: str, content: bytes) -> Saved:
    """The checkpoint with other bytes in a file, and a manifest that agrees with them."""
    (saved.path / name).write_bytes(content)
    manifest = {**saved.manifest, "files": [entry(saved.path / file["name"]) for file in saved.manifest["files"]]}
    (saved.path / "manifest.json").write_text(json.dumps(manifest))
    return read(saved.path)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    files = [
        write_tensors(tmp_path / "rank_00000.safetensors", {"master/w": torch.arange(6.0)}),
        write_tensors(tmp_path / "whole.safetensors", {"frozen/f": torch.ones(2)}),
    ]
    manifest = {"format": 1, "step": 1, "shapes": {"w": [2, 3]}, "fragments": [{"w": [0, 6]}], "files": files}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return read(tmp_path)


HEADERS: list[Any] = [
    [],
    3,
    {"master/w": 3},
    {"master/w": {"dtype": "F32", "shape": [6], "data_offsets": [-8, 16]}},
    {"master/w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 1 << 60]}},
    {"master/w": {"dtype": "F32", "shape": [6], "data_offsets": [1e300, 24]}},
    {"master/w": {"dtype": "BF16", "shape": [12], "data_offsets": [0, 24]}},
    {"master/w": {"dtype": "F32", "shape": [6], "data_offsets": "ab"}},
    {"master/w": {"dtype": "F32", "shape": [6]}},
]


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "whole.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (1 << 60).to_bytes(8, "little") + b"{}", b"\x10" + bytes(7) + b"[" * 16, bytes(100)]
)
def test_a_file_that_its_digest_fits_and_that_holds_no_tensors_is_refused(saved: Saved, name: str, content: bytes) -> None:
    broken = rewritten(saved, name, content)
    verify(broken)
    with pytest.raises(CheckpointError):
        dict(read_student(broken))


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_headers_that_lie_are_refused(saved: Saved, header: Any) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(CheckpointError):
        dict(read_student(rewritten(saved, "rank_00000.safetensors", len(text).to_bytes(8, "little") + text + bytes(24))))


def test_no_memory_is_taken_for_elements_that_no_file_holds(saved: Saved) -> None:
    manifest = {**saved.manifest, "shapes": {"w": [1 << 40]}, "fragments": [{"w": [0, 1 << 40]}]}
    with pytest.raises(CheckpointError, match="are missing in the checkpoint"):
        dict(read_student(Saved(saved.path, manifest)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=64), size=st.integers(0, 2**64 - 1) | st.integers(0, 80))
def test_any_bytes_are_refused(tmp_path: Path, data: bytes, size: int) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + data)
    for reader in (read_tensors, lambda file: opened(file).__enter__()):
        try:
            reader(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
    with path.open("rb") as file, contextlib.suppress(ValueError):
        begins(file)
