"""``fovea bench all``: every bench of speed and memory runs at toy size, and none is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.bench_all import acts, app
from pipeline.bench import dense


@pytest.mark.slow
def test_all_benches_run_at_toy_size_and_each_keeps_its_page(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--all", "--tiny", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    names = {name for name, *_ in acts()}
    assert {path.stem for path in tmp_path.glob("*.md")} == {path.stem for path in tmp_path.glob("*.json")} == names
    commands = {command.callback for command in app.registered_commands}
    left = {command.__name__ for command in commands - {act for _, act, *_ in acts()} if command}
    assert left == {"everything", "methods", "collapse", "dense", "readme"}


def test_a_bench_of_runs_that_is_killed_keeps_those_that_had_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> Iterator[dense.Found]:
        yield dense.Found("clip", 0, 640, 1.0, 0.5, 0.1, 0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(dense, "measure", killed)
    done = CliRunner().invoke(app, ["dense", "--shards", "none.tar", "--out", str(tmp_path / "kept")])
    assert done.exit_code == 130
    assert [run["miou"] for run in json.loads((tmp_path / "kept.json").read_text())["runs"]] == [0.5]
    assert "| clip | 0 | 640 |" in (tmp_path / "kept.md").read_text()
