"""``fovea checkpoint``: what a person is told of checkpoints that real ranks wrote, and weights out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from launch.cli.checkpoint import app
from pipeline.errors import CheckpointError, ConfigError, FoveaError
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import Toy, advance, build, snapshot


def _write(directory: str) -> dict[str, Any]:
    from pipeline.checkpoint.writer import Checkpoints

    method, engine = build(zero=2)
    store = Checkpoints(Path(directory), keep_last=9, keep_best="knn/k20")
    for step, score in ((1, 0.25), (2, 0.75), (3, 0.5)):
        advance(method, engine, step)
        facts = {
            "step": step,
            "applied": step,
            "skipped": 0,
            "samples_seen": 8 * step,
            "scores": {"knn/k20": score},
            "config": {"train": {"zero_stage": 2, "global_batch_size": 8}},
            "data": {"samples": 60, "fingerprint": "abc123"},
            "fovea": "0.1.0",
            "torch": torch.__version__,
        }
        store.save(engine, method, facts)
    end = snapshot(method, engine)
    engine.close()
    return end


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    run = tmp_path_factory.mktemp("run")
    return run, pool(2).run(_write, directory=str(run / "checkpoints"))


@pytest.fixture
def run(written: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written[0], tmp_path / "run"))


def told(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, FoveaError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_list_shows_each_with_its_marks_and_state(run: Path) -> None:
    (run / "checkpoints" / "step_000000001" / "whole.safetensors").unlink()
    (run / "checkpoints" / "step_000000009").mkdir()
    head, lost, first, second, third = told("list", run).splitlines()
    assert head.split() == ["checkpoint", "samples", "size", "ranks", "zero", "age", "marks", "state"]
    assert "its manifest cannot be read" in lost
    assert first.split()[:2] == ["step_000000001", "8"]
    assert "whole.safetensors is missing" in first
    assert "best knn/k20 0.7500" in second
    assert second.endswith("complete")
    assert "newest" in third
    rows = json.loads(told("list", run, "--json"))
    assert [row["step"] for row in rows] == [None, 1, 2, 3]
    assert rows[-1]["size"] > 1000


def test_verify_reads_every_byte_and_says_so_by_its_exit_code(run: Path) -> None:
    assert told("verify", run).count("complete") == 3
    path = run / "checkpoints" / "step_000000002" / "rank_00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    lines = told("verify", run, code=1).splitlines()
    assert lines[0] == "step_000000001: complete"
    assert "bytes have changed" in lines[1]
    assert "rank_00001.safetensors" in lines[1]
    assert told("verify", path.parent.with_name("step_000000003")) == "step_000000003: complete\n"
    told("verify", path.parent, code=1)


def test_inspect_shows_what_it_is_of_and_every_tensor(run: Path) -> None:
    text = told("inspect", run)
    for part in ("step_000000003", "abc123", "knn/k20 0.5000", "train.global_batch_size = 8", "2, ZeRO stage 2"):
        assert part in text
    tensors = told("inspect", run / "checkpoints" / "step_000000002", "--tensors")
    for line in (
        "F32   master/head.weight  [5, 7]",
        "F32   teacher/head.weight  [5, 7]",
        "F32   memory/center  [5]",
        "I64   frozen/seen  []",
    ):
        assert line in tensors
    assert json.loads(told("inspect", run, "--json"))["step"] == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_convert_puts_the_pieces_of_all_ranks_together(
    written: tuple[Path, list[dict[str, Any]]], tmp_path: Path, dtype: str
) -> None:
    end = written[1][0]
    told("convert", written[0], tmp_path / "teacher.safetensors", "--dtype", dtype)
    told("convert", written[0], tmp_path / "both.safetensors", "--dtype", dtype, "--weights", "both")
    teacher, both = (load_file(tmp_path / f"{name}.safetensors") for name in ("teacher", "both"))
    cast = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert teacher.keys() == end["teacher"].keys()
    assert all(torch.equal(teacher[name], tensor.to(cast)) for name, tensor in end["teacher"].items())
    student = {name.removeprefix("student."): tensor for name, tensor in both.items() if name.startswith("student.")}
    assert student.keys() == Toy().state_dict().keys()
    for name, weight in end["weights"].items():
        assert torch.equal(student[name], weight.to(cast)), name
    assert student["seen"].dtype == torch.int64
    assert {name.removeprefix("teacher.") for name in both if name.startswith("teacher.")} == teacher.keys()


def test_convert_refuses_what_it_must_not_touch(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "there.safetensors"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        told("convert", run, out)
    assert out.read_text() == "mine"
    told("convert", run, out, "--overwrite")
    (run / "checkpoints" / "step_000000003" / "rank_00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged"):
        told("convert", run / "checkpoints" / "step_000000003", tmp_path / "y")
    assert "of step 2" in told("convert", run, tmp_path / "z")
    assert not (tmp_path / "y").exists()


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    for verb in ("list", "verify", "inspect"):
        with pytest.raises(CheckpointError, match="not a run directory"):
            told(verb, tmp_path)
