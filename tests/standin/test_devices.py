"""Ranks on stand-in devices: each has a GPU of its own, whatever the variable that shows GPUs says, or is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.standin import process

pytestmark = pytest.mark.slow


def joined(tmp_path: Path, rank: int, world: int, devices: int, **variables: str) -> dict[str, str]:
    """What a rank is told when it joins: its device, or why not."""
    out = tmp_path / "joined.json"
    done = process.run("join", str(out), str(rank), str(world), devices=devices, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    document: dict[str, str] = json.loads(out.read_text())
    return document


def test_a_rank_beyond_the_visible_gpus_is_refused(tmp_path: Path) -> None:
    error = joined(tmp_path, 5, 8, 8, CUDA_VISIBLE_DEVICES="0,1,2,3")["error"]
    assert "local rank 5 has no GPU of its own: 8 ranks run on this node, but 4 GPUs are visible" in error
    assert "CUDA_VISIBLE_DEVICES='0,1,2,3'" in error and "Start 4 ranks per node" in error


def test_a_rank_uses_the_device_of_its_number_and_names_it_alike_however_it_is_shown(tmp_path: Path) -> None:
    first = joined(tmp_path, 3, 8, 8)
    assert first["device"] == "cuda:3"
    second = joined(tmp_path, 3, 8, 8, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")
    assert first["name"] == second["name"] and re.search(r"[0-9a-f]{8}-", first["name"])


@pytest.mark.parametrize(
    ("shown", "rank", "device", "gpu"),
    [
        ("GPU-06060606", 3, "cuda:0", 5),  # a launcher that shows each rank its own
        ("GPU-08080808-0808,GPU-03030303-0303", 1, "cuda:1", 2),
        ("6,2,GPU-01", 1, "cuda:1", 2),
    ],
)
def test_a_rank_uses_the_gpu_that_it_is_shown(tmp_path: Path, shown: str, rank: int, device: str, gpu: int) -> None:
    place = joined(tmp_path, rank, 4, 8, CUDA_VISIBLE_DEVICES=shown)
    assert place["device"] == device
    assert place["name"].endswith(f"{gpu + 1:02x}" * 6)


def test_parts_of_a_gpu_are_told_apart(tmp_path: Path) -> None:
    names = [joined(tmp_path, 0, 2, 8, CUDA_VISIBLE_DEVICES=f"MIG-{part}")["name"] for part in ("aa", "bb")]
    assert "MIG-aa" in names[0] and "MIG-bb" in names[1]  # the identifier may be the whole GPU's


def test_a_rank_that_is_shown_no_gpu_is_refused_where_rank_0_has_one(tmp_path: Path) -> None:
    error = joined(tmp_path, 3, 8, 8, CUDA_VISIBLE_DEVICES="")["error"]
    assert "rank 3 would use gloo and rank 0 nccl: only one of them sees GPUs (CUDA_VISIBLE_DEVICES='')" in error
