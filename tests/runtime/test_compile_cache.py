"""Where compiled code is kept, and that a second start finds it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from pipeline.runtime.compile_cache import use_compile_cache

_START = """
import json, sys
from pipeline.runtime.compile_cache import use_compile_cache
use_compile_cache("somebody", 1)
import torch
from torch._dynamo.utils import counters
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
torch.manual_seed(0)
tower = build_tower(ModelSettings(embed_dim=16, depth=1, num_heads=2, patch_size=4), image_size=8)
tower.vit.blocks[0].compile(dynamic=False)
cls = tower(torch.ones(2, 3, 8, 8)).cls
cls.sum().backward()
kept = {**counters["inductor"], **counters["aot_autograd"]}
print(json.dumps({"sum": float(cls.double().square().sum()), **{k: v for k, v in kept.items() if "cache" in k}}))
"""


def _start(folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _START],
        env={**os.environ, "FOVEA_CACHE": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ on a CPU")
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    first, second = _start(tmp_path), _start(tmp_path)
    assert (tmp_path / "fovea-compiled-somebody").is_dir()
    assert first["autograd_cache_miss"] and not first.get("autograd_cache_hit")
    assert second["autograd_cache_hit"] == first["autograd_cache_miss"] and not second.get("autograd_cache_miss")
    assert not second.get("fxgraph_cache_miss")
    assert second["sum"] == first["sum"]


def test_the_code_lies_below_the_cache_of_the_node_and_never_in_the_scratch_of_a_job(tmp_path: Path) -> None:
    environment = {"FOVEA_CACHE": str(tmp_path), "SLURM_TMPDIR": "/scratch/job"}
    folder = use_compile_cache("somebody", 2, environment)
    assert folder == tmp_path / "fovea-compiled-somebody" and folder.stat().st_mode & 0o777 == 0o700
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == str(folder) and environment["TRITON_CACHE_DIR"] == str(folder / "triton")
    with mock.patch.object(tempfile, "gettempdir", lambda: str(tmp_path / "t")):
        assert use_compile_cache("somebody", 2, {"LOCAL_SCRATCH": "/scratch/job"}) == tmp_path / "t" / "fovea-compiled-somebody"


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(128, 8, 8), (64, 8, 8), (32, 8, 4), (4, 8, 1)])
def test_the_ranks_of_a_node_share_its_cores_while_they_compile(tmp_path: Path, cores: int, ranks: int, threads: int) -> None:
    environment = {"FOVEA_CACHE": str(tmp_path)}
    with mock.patch.object(os, "sched_getaffinity", lambda _: set(range(cores))):
        use_compile_cache("somebody", ranks, environment)
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads)


def test_variables_that_are_set_are_left_as_they_are(tmp_path: Path) -> None:
    set_before = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "mine"),
        "TRITON_CACHE_DIR": "/elsewhere",
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
        "FOVEA_CACHE": str(tmp_path),
    }
    environment = dict(set_before)
    assert use_compile_cache("somebody", 8, environment) == tmp_path / "mine"
    assert environment == set_before


@pytest.mark.parametrize("how", ["link", "writable", "owner", "file"])
def test_code_that_others_may_have_written_is_not_used(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, environment = tmp_path / "fovea-compiled-somebody", {"FOVEA_CACHE": str(tmp_path)}
    if how == "link":
        (tmp_path / "other").mkdir()
        folder.symlink_to(tmp_path / "other")
    elif how == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777 if how == "writable" else 0o700)
    with caplog.at_level(logging.WARNING), mock.patch.object(os, "geteuid", lambda: 1 if how == "owner" else os.getuid()):
        assert use_compile_cache("somebody", 1, environment) is None
    assert "TORCHINDUCTOR_CACHE_DIR" not in environment and "not kept there" in caplog.text
