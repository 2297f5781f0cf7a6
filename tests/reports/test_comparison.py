"""Runs side by side: what they share, what they do not, what was lost and what broke off."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.reports.comparison import _metrics, gather, write
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import Journal
from tests.helpers.exported import DINO, checkpoint, settings


def made(folder: Path, *, width: int, score: float, interrupted: bool) -> Path:
    config = settings(DINO, embed_dim=width)
    saved, _ = checkpoint(folder, config, step=3)
    manifest = json.loads((saved.path / "manifest.json").read_text())
    manifest["data"] |= {"seen": 3072, "substituted": {"corrupt": 5}, "quarantine": {"7": "corrupt"}}
    (saved.path / "manifest.json").write_text(json.dumps(manifest))
    run = RunDirectory(folder)
    run.write("config.json", config.model_dump(mode="json"))
    run.write("plan.json", {"steps": 4})
    for attempt, first in ((0, 1), (1, 3)) if interrupted else ((0, 1),):
        run.note("start", attempt=attempt, ranks=2, resumed_from=None if attempt == 0 else 2)
        journal = Journal(run.journal(attempt))
        for step in range(first, 4):
            journal.metrics(step, {"train/loss": 9.0 - step, "perf/images_per_second": 100.0 * step})
            journal.metrics(step, {"knn/k10": score - 0.01 * step, "linear/rate": 0.1})
        if interrupted and attempt == 0:
            run.note("end", attempt=0, code=-15, why="the node was <preempted>")
        else:
            journal.tags({"fovea.state": "finished", "gpu": "none"})
            run.note("end", attempt=attempt, code=0)
        journal.close()
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / f"{saved.path.name}.json").write_text(json.dumps({"scores": {"linear/top1": score}}))
    return folder


def rows(page: str) -> dict[str, list[str]]:
    found = {}
    for row in re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", page):
        found.setdefault(row[0], re.findall(r"<td>(.*?)</td>", row[1]))
    return found


def test_the_page_tells_two_runs_apart(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / "a", width=32, score=0.5, interrupted=True),
        made(tmp_path / "b", width=48, score=0.7, interrupted=False),
    ]
    page = write(runs, tmp_path / "report.html").read_text()
    values = rows(page)
    assert values["steps"] == ["3 of 4", "3 of 4"]
    assert values["attempts"] == ["2", "1"]
    assert values["samples substituted"] == ["5 of 3\u202f072"] * 2
    assert values["images per second, median"] == ["200", "200"]
    assert values["model.embed_dim"] == ["32", "48"]
    assert values["knn/k10"] == ["0.4700 (best 0.4900 at step 1)", "0.6700 (best 0.6900 at step 1)"]
    assert values["linear/top1, fovea eval"] == ["0.5000 (step_000000003)", "0.7000 (step_000000003)"]
    assert "the node was &lt;preempted&gt;" in page and "<preempted>" not in page
    before, _, equal = page.partition("that are equal")
    assert "method.prototypes" in equal.partition("Settings")[2] and "method.prototypes" not in before
    assert page.count("<svg") == 4 - 2 + 1  # loss, images per second, k-NN; a rate is no score


def test_results_that_an_earlier_version_of_eval_wrote_are_on_the_page_too(tmp_path: Path) -> None:
    run = made(tmp_path / "a", width=32, score=0.5, interrupted=False)
    knn = {"trained": {"10": 0.61, "20": 0.62}, "untrained": {"10": 0.3}, "pixels": {"10": 0.2}}
    (run / "evaluation.json").write_text(json.dumps({"checkpoint": "step_000000003", "step": 3, "knn": knn}))
    values = rows(write([run], tmp_path / "report.html").read_text())
    assert values["knn/k10, fovea eval"] == ["0.6100 (step_000000003)"]
    assert values["knn/k20, fovea eval"] == ["0.6200 (step_000000003)"]
    assert values["baseline/random_init/knn/k10, fovea eval"] == ["0.3000 (step_000000003)"]
    assert values["baseline/pixels/knn/k10, fovea eval"] == ["0.2000 (step_000000003)"]
    assert values["linear/top1, fovea eval"] == ["0.5000 (step_000000003)"]
    (run / "evaluation.json").write_text('{"checkpoint": "step_000000003", "knn": [1]}')
    write([run], tmp_path / "report.html")


def test_what_is_no_run_is_refused_and_one_run_is_a_page_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a run directory"):
        write([tmp_path], tmp_path / "report.html")
    one = made(tmp_path / "a", width=32, score=0.5, interrupted=False)
    assert "The run toy" in write([one], tmp_path / "report.html").read_text()
    assert gather([one, one])[0].name == "toy"


def test_names_and_charts_of_a_hostile_run_are_bounded(tmp_path: Path) -> None:
    run = made(tmp_path / "a", width=32, score=0.5, interrupted=False)
    document = json.loads((run / "config.json").read_text())
    document["run"]["name"] = "<x>" * 10_000
    (run / "config.json").write_text(json.dumps(document))
    journal = Journal(RunDirectory(run).journal(7))
    for step in (1, 2):
        journal.metrics(step, {f"score/{i}": 1.0 for i in range(300)})
    journal.close()
    (summary,) = gather([run])
    assert len(summary.name) == 100
    assert len(_metrics([summary])) == 60
