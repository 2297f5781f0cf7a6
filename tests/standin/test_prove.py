"""Stages of ``fovea prove`` take their CUDA path on stand-in devices, compiled steps among them.

Kernels do nothing, so that losses are wrong. The waits of every method: ``python -m tests.helpers.standin.prove OUT methods``.
Other stages cannot run there: decode, stream and data need a GPU's decoder, run and ranks NCCL, small the capture of graphs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.prove.speed import _CONFIGS
from tests.helpers.standin import process

pytestmark = pytest.mark.slow


def rows_of(stage: str, folder: Path, uncompiled: str = "\0") -> list[dict[str, Any]]:
    """The rows of a stage, whose messages do not contain a text."""
    done = process.run("prove", str(folder / "rows.json"), stage)
    assert done.returncode == 0 and uncompiled not in done.stderr, done.stderr[-9000:]
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())["rows"]
    return rows


@pytest.mark.parametrize("stage", ["imports", "kernels"])
def test_the_stage_runs_to_its_end(stage: str, tmp_path: Path) -> None:
    rows = rows_of(stage, tmp_path)
    assert [row for row in rows if row["ok"] is False] == []
    named = {row["name"]: row["figure"] for row in rows}
    assert named["kernels"] == "triton" if stage == "kernels" else "device 7" in named


def test_speed_measures_eager_compiled_and_8_bit_steps_of_each_config_in_one_process(tmp_path: Path) -> None:
    rows = [row["name"].partition(", ") for row in rows_of("speed", tmp_path, uncompiled="hit config.recompile_limit")]
    forms = ("fovea", "fovea, compiled", "fovea, fp8", "fovea, compiled, fp8")
    for title in ("ViT-tiny-16", *_CONFIGS):
        assert [name for own, _, name in rows if own == title and name.startswith("fovea")] == list(forms)
