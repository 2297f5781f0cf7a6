"""``fovea bench all``: every benchmark of speed and memory runs at minimal size, and none is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.bench import benchmarks
from launch.cli.bench_learning import app
from pipeline.bench import dense_features
from tests.helpers.runs import ROOT, environment


@pytest.mark.slow
def test_all_benchmarks_run_at_minimal_size_and_each_keeps_its_page(tmp_path: Path) -> None:
    # In a process of its own: DeepSpeed knows one process group a process, and another test may have ended one here.
    command = [sys.executable, "-m", "launch.cli.main", "bench", "all", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {name for name, *_ in benchmarks()}
    assert {path.stem for path in tmp_path.glob("*.md")} == {path.stem for path in tmp_path.glob("*.json")} == names
    commands = {command.callback for command in app.registered_commands}
    left = {
        command.__name__
        for command in commands - {getattr(command, "func", command) for _, command, *_ in benchmarks()}
        if command
    }
    assert left == {
        "all_",
        "adaptation",
        "chaos",
        "curation",
        "failures",
        "guidance",
        "kills",
        "large_job",
        "loaders",
        "methods",
        "collapse_ablation",
        "dense_features",
        "peers",
        "readme",
        "small_batches",
        "snapshots",
        "startup",
    }


def test_a_bench_of_runs_that_is_killed_keeps_those_that_had_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> Iterator[dense_features.RunResult]:
        yield dense_features.RunResult("clip", 0, 640, 1.0, 0.5, 0.1, 0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(dense_features, "measure", killed)
    done = CliRunner().invoke(app, ["dense-features", "--shards", "none.tar", "--out", str(tmp_path / "kept")])
    assert done.exit_code == 130
    assert [run["miou"] for run in json.loads((tmp_path / "kept.json").read_text())["runs"]] == [0.5]
    assert "| clip | 0 | 640 |" in (tmp_path / "kept.md").read_text()
