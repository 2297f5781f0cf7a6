"""Stages of ``fovea prove`` take their CUDA path on stand-in devices, and compiled steps do too.

Kernels do nothing, so that losses are wrong. The other stages cannot run there: decode, stream and data need a GPU's decoder, run
and ranks NCCL, small the capture of CUDA graphs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bench.prove.methods import CONFIGS
from tests.helpers.standin import process
from tests.helpers.standin.recorder import Record

pytestmark = pytest.mark.slow


def rows_of(stage: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a stage."""
    done = process.run("prove", str(folder / "rows.json"), stage)
    assert done.returncode == 0, done.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())["rows"]
    return rows


def test_every_method_takes_its_steps_without_a_wait(tmp_path: Path) -> None:
    rows = rows_of("methods", tmp_path)
    assert [row["figure"] for row in rows if row["bar"] == "taken"] == [], "an error ended a method"
    waits = [row for row in rows if "waits of the host" in row["name"]]
    assert [row["name"].partition(":")[0] for row in waits] == list(CONFIGS)
    assert {row["figure"] for row in waits} == {"0"}


@pytest.mark.parametrize("stage", ["imports", "kernels"])
def test_the_stage_runs_to_its_end(stage: str, tmp_path: Path) -> None:
    rows = rows_of(stage, tmp_path)
    assert [row for row in rows if row["ok"] is False] == []
    named = {row["name"]: row["figure"] for row in rows}
    assert named["kernels"] == "triton" if stage == "kernels" else "device 7" in named


def test_speed_measures_eager_compiled_and_8_bit_steps_in_one_process(tmp_path: Path) -> None:
    names = [row["name"].partition(", ")[2] for row in rows_of("speed", tmp_path)]
    forms = ("fovea", "fovea, compiled")
    assert [name for name in names if name.startswith("fovea")] == [*forms, *(f"{form}, fp8" for form in forms)]


def test_a_compiled_step_launches_what_inductor_made_and_waits_nowhere(tmp_path: Path) -> None:
    model = ("model.timm_name=null", "model.embed_dim=192", "model.num_heads=3", "model.patch_size=16", "model.depth=2")
    text = ("method.text.architecture=null", "method.text.width=512", "method.text.num_heads=8", "method.text.depth=2")
    words = ("clip/vit_b16_cc12m", *model, *text, "train.global_batch_size=128", "train.compile=auto", "--steps=4")
    done = process.run("method_step", str(tmp_path / "step.json"), *words)
    assert done.returncode == 0, done.stderr[-4000:]
    record = Record.from_json(json.loads((tmp_path / "step.json").read_text())["records"][-1])
    assert any(call.name.startswith("triton triton_") for call in record.calls)
    assert record.blocks == []
