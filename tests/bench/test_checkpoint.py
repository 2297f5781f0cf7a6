"""The bench of checkpoints runs, and what it writes is what it document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bench.checkpoint import Options, Result, markdown
from pipeline.errors import ConfigError
from tests.helpers.runs import ROOT, environment


def test_the_page_says_whether_the_aim_was_met() -> None:
    result = Result(parameters=1_000_000, size=16_000_000, step=1.0, waiting=0.5, beside=0.03, load=0.1, verify=0.1)
    page = markdown(result, Options(), {"cores": "2"}, "fovea bench checkpoint")
    assert "| training pauses, asynchronous save | 0.030 | 3.0% | 533 |" in page
    assert "3.0% of a step, below the target of 5%" in page
    result.beside = 0.2
    assert "20.0% of a step, not below" in markdown(result, Options(), {}, "")


def test_an_unknown_size_is_refused_before_anything_starts() -> None:
    from pipeline.bench.checkpoint import measure

    with pytest.raises(ConfigError, match=r"tiny, small, base, large"):
        measure(Options(model="huge"))


@pytest.mark.slow
def test_it_measures(tmp_path: Path) -> None:
    arguments = ["--model", "tiny", "--batch", "2", "--side", "32", "--prototypes", "16", "--saves", "1"]
    command = [sys.executable, "-m", "launch.cli.main", "bench", "checkpoint", *arguments, "--out", str(tmp_path / "result")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["size"] > 16 * 5_000_000
    for name in ("step", "waiting", "beside", "until_current", "verify", "load"):
        assert document[name] > 0
    assert "Cost of a checkpoint" in done.stdout
