"""How many of a checkpoint's files are open while it is read."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoint.files import Saved, rank_file
from pipeline.checkpoint.reader import _OPEN_FILES, _Pieces
from pipeline.errors import CheckpointError

RANKS, EACH = 100, 8


@pytest.fixture
def checkpoint(tmp_path: Path) -> Saved:
    for rank in range(RANKS):
        part = torch.arange(rank * EACH, (rank + 1) * EACH, dtype=torch.float32)
        save_file({"master/w": part, "teacher/w": -part}, tmp_path / rank_file(rank))
    return Saved(tmp_path, {"fragments": [{"w": [rank * EACH, EACH]} for rank in range(RANKS)]})


def open_files(folder: Path) -> int:
    here = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return sum(path.startswith(str(folder)) for path in here)


def test_a_rank_opens_only_the_files_that_hold_its_part(checkpoint: Saved) -> None:
    with closing(_Pieces(checkpoint)) as pieces:
        part = torch.empty(2 * EACH)
        pieces.fill(part, "master", "w", 30 * EACH + 3)
        assert part.tolist() == [float(30 * EACH + 3 + n) for n in range(2 * EACH)]
        assert open_files(checkpoint.path) == 3
    assert open_files(checkpoint.path) == 0


def test_reading_everything_opens_few_files_at_a_time(checkpoint: Saved) -> None:
    with closing(_Pieces(checkpoint)) as pieces:
        assert pieces.names("teacher") == {"w"}
        everything = pieces.read("teacher", "w", 0, RANKS * EACH)
        assert everything.tolist() == [-float(n) for n in range(RANKS * EACH)]
        assert open_files(checkpoint.path) == _OPEN_FILES
        with pytest.raises(CheckpointError, match="elements of teacher/w are missing"):
            pieces.read("teacher", "w", 0, 10 * RANKS * EACH)
    assert open_files(checkpoint.path) == 0


def test_a_damaged_file_is_named_when_it_is_needed(checkpoint: Saved) -> None:
    (checkpoint.path / rank_file(7)).write_bytes(b"damaged")
    with closing(_Pieces(checkpoint)) as pieces:
        assert pieces.read("master", "w", 0, 7 * EACH).tolist() == [float(n) for n in range(7 * EACH)]
        assert open_files(checkpoint.path) == 7
        with pytest.raises(CheckpointError, match="header cannot be read") as caught:
            pieces.read("master", "w", 7 * EACH, 1)
    assert rank_file(7) in str(caught.value)
