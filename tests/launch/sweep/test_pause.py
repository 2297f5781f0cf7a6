"""``train.pause_at``: evaluated, saved and stopped at exactly that step; what follows is bitwise the undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.sweep.state import score_at
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.runs import recorded, train, weights

pytestmark = pytest.mark.slow


def test_a_paused_run_is_evaluated_at_that_step_and_goes_on_exactly(
    undisturbed: Path, shards: str, config: Path, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "run")
    evaluation = ["evaluation.knn.enabled=true", "evaluation.knn.every='24 steps'", "evaluation.knn.k=[3]"]
    evaluation += ["evaluation.knn.baselines=false", "evaluation.log_images=false"]
    done = train(config, shards, run.path, *evaluation, "train.pause_at='10 steps'")
    assert done.returncode == 0, done.stderr + done.stdout
    outcome = json.loads((run.path / "outcome.json").read_text())
    assert (outcome["stop"], outcome["step"], outcome["steps"]) == ("USER_REQUEST", 10, 24)
    assert score_at(run, "knn/k3", 10) == outcome["scores"]["knn/k3"] and score_at(run, "knn/k3", 9) is None
    done = train(config, shards, run.path)
    assert done.returncode == 0 and "resuming at step 10" in done.stdout, done.stderr + done.stdout
    for rank in (0, 1):
        assert recorded(run.path, rank) == recorded(undisturbed, rank)
    assert weights(run.path, 24) == weights(undisturbed, 24)
