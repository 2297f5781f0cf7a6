"""The tables of the READMEs are those of the kept results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.bench.summary import ALL, MAIN, RESULTS, main_table, table, update

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["README.md", "pipeline/bench/README.md"])
def test_readmes_show_the_kept_results_and_no_others(name: str) -> None:
    text = (ROOT / name).read_text()
    assert update(text) == text, "run `fovea bench readme`"


def test_every_kept_result_is_in_the_table_with_its_command_and_page() -> None:
    text = table()
    for path in RESULTS.glob("*.json"):
        assert f"`{json.loads(path.read_text())['command']}`" in text
    pages = set(re.findall(r"\]\((results/[^)]+)\)", text))
    assert {f"results/{path.name}" for path in RESULTS.glob("*.md")} == pages
    for page in re.findall(r"\]\(([^)]+)\)", main_table()):
        assert (ROOT / page).is_file()


def test_every_command_of_a_result_exists() -> None:
    from launch.cli.bench_methods import app

    commands = {
        (command.name or command.callback.__name__).replace("_", "-") for command in app.registered_commands if command.callback
    }
    for path in RESULTS.glob("*.json"):
        for name in re.findall(r"fovea bench ([a-z-]+)", json.loads(path.read_text())["command"]):
            assert name in commands, path.name


def test_a_figure_follows_its_result(tmp_path: Path) -> None:
    cases = {"fovea": {"seconds": [2.0, 3.0], "peak": 1}, "open_clip": {"seconds": [5.0, 4.0], "peak": 1}}
    (tmp_path / "step-clip-cpu-20.json").write_text(json.dumps({"command": "one", "cases": cases}))
    (tmp_path / "resume-cpu.json").write_text(json.dumps({"command": "two", "fresh": [2.0], "resumed": [2.2]}))
    step, resume = "CLIP B/32 step, captions of 20 tokens", "first step after a verified resume, CPU time"
    lines = table(tmp_path).splitlines()[2:]
    assert lines == [
        f"| [{step}](results/step-clip-cpu.md) | 2.00 s | 4.00 s open_clip | 2.00 x the speed | `one` |",
        f"| [{resume}](results/resume-cpu.md) | 2.20 s | 2.00 s fresh start | 1.10 x as long | `two` |",
    ]
    short = main_table(tmp_path).splitlines()[2:]
    assert short == [f"| [{step}](pipeline/bench/results/step-clip-cpu.md) | 2.00 s | 4.00 s open_clip | 2.00 x the speed |"]
    for (begin, end), rows in ((ALL, lines), (MAIN, short)):
        assert update(f"a\n{begin}\nold\n{end}\nb", tmp_path).splitlines()[4:-1] == [*rows, end]


def test_a_readme_without_markers_is_rejected() -> None:
    with pytest.raises(ValueError, match="must contain"):
        update("nothing")
