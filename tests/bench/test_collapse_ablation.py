"""The experiments on collapse: each is one setting away from a method that is well, and the page says what came of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.bench.collapse_ablation import TRIALS, Trial, TrialResult, markdown, read_journal
from pipeline.config.load import flatten, load
from pipeline.reports.collapse_ablation import page as curves
from pipeline.tracking.journal import Journal


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.slug)
def test_every_trial_is_a_valid_config(trial: Trial) -> None:
    plain, changed = (flatten(load(trial.config, overrides).config) for overrides in ((), trial.settings))
    assert len([name for name in plain if plain[name] != changed.get(name)]) == sum(
        "local_repulsion" not in w for w in trial.settings
    )


def test_the_names_of_trials_are_their_own() -> None:
    assert len({trial.slug for trial in TRIALS}) == len(TRIALS)


def test_the_page_says_what_was_learnt_what_collapsed_and_what_failed() -> None:
    well, ill, gone = TRIALS[:3]
    results = [
        TrialResult(well, 10, 1280, {640: 0.25, 1280: 0.5}, 0.2, 0.123, {"feature_rank": 12.5}, {}),
        TrialResult(ill, 10, 1280, {1280: 0.1}, 0.2, 0.0, {"feature_rank": 1.0}, {"rank_collapse": "features in one direction"}),
        TrialResult(gone, failed="no memory"),
    ]
    text = markdown(results, {"cores": "2"}, "fovea bench collapse-ablation")
    assert "| byol | as it is | 1280 | 10 | 50.0% | 20.0% | 0.123 |  | 12.50 |  |  |" in text
    assert "- byol, as it is: 640: 25.0%, 1280: 50.0%" in text
    assert "- byol, without predictor: **rank_collapse**: features in one direction" in text
    assert "dino, as it is: no memory" in text


def test_the_curves_of_a_question_stand_together() -> None:
    well, ill, other = TRIALS[0], TRIALS[1], TRIALS[2]
    results = [
        TrialResult(well, 2, 128, {64: 0.25, 128: 0.5}, 0.2, curves={"feature_rank": {64: 3.0, 128: 9.0}}),
        TrialResult(ill, 2, 128, {64: 0.2, 128: 0.1}, 0.2, curves={"feature_rank": {64: 2.0, 128: 1.0}}),
        TrialResult(other, failed="no memory"),
    ]
    drawn = curves(results)
    assert drawn.count("<svg") == 2 and "byol: rank of the features" in drawn and "dino" not in drawn
    assert "as it is 50.0 %" in drawn and "without predictor 1<" in drawn and "untrained 20.0 %" in drawn


def test_metrics_and_alerts_are_read_from_a_runs_journals(tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    written = Journal(tmp_path / "tracking" / "journal-0.jsonl")
    written.metrics(5, {"train/loss": 2.5, "knn/k20": 0.25})
    written.metrics(10, {"train/loss": math.inf})
    written.tags({"alert/rank_collapse": "few directions", "fovea.other": "1"})
    written.close()
    metrics, alerts = read_journal(tmp_path)
    assert metrics == {"train/loss": {5: 2.5, 10: math.inf}, "knn/k20": {5: 0.25}}
    assert alerts == {"rank_collapse": "few directions"}
