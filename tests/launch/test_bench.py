"""``fovea bench all``: every bench of speed and memory runs at toy size, and none is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.bench import app


@pytest.mark.slow
def test_all_benches_run_at_toy_size_and_each_keeps_its_page(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["all", "--tiny", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert (
        {path.stem for path in tmp_path.glob("*.md")}
        == {path.stem for path in tmp_path.glob("*.json")}
        == names - {"all", "methods", "collapse", "dense", "readme"}
    )
