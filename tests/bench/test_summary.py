"""README's table of measurements is that of the kept results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench.summary import BEGIN, END, table, written

README = Path(__file__).parents[2] / "README.md"


def test_readme_shows_the_kept_results_and_no_others() -> None:
    text = README.read_text()
    assert written(text) == text, "run `fovea bench readme`"


def test_a_figure_follows_its_result(tmp_path: Path) -> None:
    cases = {"fovea": {"seconds": [2.0, 3.0], "peak": 1}, "open_clip": {"seconds": [5.0, 4.0], "peak": 1}}
    (tmp_path / "step-clip-cpu-20.json").write_text(json.dumps({"cases": cases}))
    (tmp_path / "resume-cpu.json").write_text(json.dumps({"fresh": [2.0], "resumed": [2.2]}))
    pages = "pipeline/bench/results"
    lines = table(tmp_path).splitlines()[2:]
    assert lines == [
        f"| [CLIP B/32 step, captions of 20 tokens]({pages}/step-clip-cpu.md) | 2.00 s | 4.00 s open_clip | 2.00 x faster |",
        f"| [first step from a checkpoint, verified]({pages}/resume-cpu.md) | 2.20 s | 2.00 s afresh | 1.10 x as long |",
    ]
    assert written(f"a\n{BEGIN}\nold\n{END}\nb", tmp_path).splitlines()[4:-1] == [*lines, END]


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError):
        written("nothing")
