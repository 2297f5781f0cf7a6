"""Results files: merged under a lock, bounded on reading, and those of earlier versions under today's names."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation import results
from pipeline.evaluation.results import EvalResult, by_network, current_metric, split_metric
from pipeline.evaluation.standalone import planned_steps
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.limits import LONG

CHECKPOINT = "step_000000003"


def test_evaluations_of_one_checkpoint_that_end_at_once_keep_each_others_scores(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    file = results.write(run, EvalResult(CHECKPOINT, 3, scores={"knn/k10": 0.5}))
    second = EvalResult(CHECKPOINT, 3, scores={"linear/top1": 0.7})
    other = threading.Thread(target=results.write, args=(run, second), daemon=True)
    with (run.path / "evaluations" / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other.start()
        other.join(1.0)
        assert other.is_alive(), "it reads what the first is about to replace"
    other.join(LONG)
    assert json.loads(file.read_text())["scores"] == {"knn/k10": 0.5, "linear/top1": 0.7}
    assert results.read_all(run) == {CHECKPOINT: EvalResult(CHECKPOINT, 3, scores={"knn/k10": 0.5, "linear/top1": 0.7})}
    assert results.is_evaluated(run, CHECKPOINT) and not results.is_evaluated(run, "step_000000004")


BROKEN = ["[]", "null", "1e999", '{"scores": []}', '{"scores": {"trained": 1}, "step": "x"}', "[" * 200_000, "fifo"]


@pytest.mark.parametrize("content", BROKEN)
def test_foreign_records_of_a_run_neither_block_nor_end_an_evaluation(tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path)
    for name in (f"evaluations/{CHECKPOINT}.json", "plan.json", "evaluation.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if content == "fifo":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_text(content)
    assert planned_steps(run) is None
    file = results.write(run, EvalResult(CHECKPOINT, 3, scores={"knn/k1": 0.5}))
    assert json.loads(file.read_text())["scores"]["knn/k1"] == 0.5
    assert results.read_all(run)[CHECKPOINT].step == 3


@pytest.mark.parametrize("target", ["folder", "nothing"])
def test_results_are_not_written_through_a_link(tmp_path: Path, target: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "evaluations").symlink_to(tmp_path / ("elsewhere" if target == "folder" else "made"))
    with pytest.raises(ConfigError, match="evaluations: must be a folder of the run itself"):
        results.write(RunDirectory(tmp_path / "run"), EvalResult(CHECKPOINT, 3, scores={"knn/k1": 0.5}))
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["fifo", "link", "dangling"])
def test_a_lock_that_is_no_file_is_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "run" / "evaluations").mkdir(parents=True)
    (tmp_path / "secret").write_text("kept")
    path = tmp_path / "run" / "evaluations" / ".lock"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("secret" if kind == "link" else "made"))
    results.write(RunDirectory(tmp_path / "run"), EvalResult(CHECKPOINT, 3, scores={"knn/k1": 0.5}))
    assert path.is_file() and not path.is_symlink()
    assert (tmp_path / "secret").read_text() == "kept" and not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", [True, "1", None, [1], {"a": {"b": 1}}, 10**400, -(10**400), float("inf")])
def test_what_is_no_number_is_no_score(tmp_path: Path, value: Any) -> None:
    (tmp_path / "evaluations").mkdir()
    document = {"step": value, "scores": {"knn/k1": 0.5, "linear/top1": value, "trained": {"knn/k5": value}}}
    (tmp_path / "evaluations" / f"{CHECKPOINT}.json").write_text(json.dumps(document))
    (result,) = results.read_all(RunDirectory(tmp_path)).values()
    assert result.scores == {"knn/k1": 0.5} and result.step == 0


def test_files_of_earlier_versions_have_todays_names(tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    nested = {"trained": {"linear/top1": 0.7, "knn/k10": 0.62}, "untrained": {"linear/top1": 0.2}}
    (tmp_path / "evaluations" / f"{CHECKPOINT}.json").write_text(json.dumps({"step": 3, "scores": nested}))
    knn = {"trained": {"10": 0.61, "20": 0.6}, "untrained": {"10": 0.3}, "pixels": {"10": 0.2}}
    for checkpoint, expected in ((CHECKPOINT, 0.62), ("step_000000006", 0.61)):
        (tmp_path / "evaluation.json").write_text(json.dumps({"checkpoint": checkpoint, "step": 6, "knn": knn}))
        scores = results.read_all(RunDirectory(tmp_path))[checkpoint].scores
        assert scores["knn/k10"] == expected, "the file of the checkpoint is newer"
        assert scores["baseline/random_init/knn/k10"] == 0.3 and scores["baseline/pixels/knn/k10"] == 0.2
        assert ("baseline/random_init/linear/top1" in scores) == (checkpoint == CHECKPOINT)


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("knn/k10", "knn/k10"),
        ("untrained/k10", "baseline/random_init/knn/k10"),
        ("untrained/linear/top1", "baseline/random_init/linear/top1"),
        ("start/k5", "baseline/init_from/knn/k5"),
        ("pixels/k5", "baseline/pixels/knn/k5"),
        ("segmentation/pixels", "segmentation/pixels"),
        ("baseline/pixels/knn/k5", "baseline/pixels/knn/k5"),
        ("pixels", "pixels"),
    ],
)
def test_metrics_of_earlier_journals_have_todays_names(old: str, name: str) -> None:
    assert current_metric(old) == name


def test_scores_are_split_by_what_was_evaluated() -> None:
    assert split_metric("baseline/init_from/retrieval/image_to_text/recall@1") == (
        "init_from",
        "retrieval/image_to_text/recall@1",
    )
    assert split_metric("baseline/pixels") == ("", "baseline/pixels")
    scores = {"baseline/pixels/knn/k1": 0.1, "knn/k1": 0.3, "baseline/random_init/knn/k1": 0.2}
    assert by_network(scores) == {"": {"knn/k1": 0.3}, "random_init": {"knn/k1": 0.2}, "pixels": {"knn/k1": 0.1}}
    assert list(by_network(scores)) == ["", "random_init", "pixels"]
