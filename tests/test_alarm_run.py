"""An alarm as a person meets it: on the screen, and in the journal that MLflow is fed from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.pack import synthetic as scenes
from pipeline.tracking.journal import read
from tests.helpers.runs import TOY, train


@pytest.mark.slow
def test_a_run_that_collapses_says_so_once_on_the_screen_and_in_the_journal(tmp_path: Path) -> None:
    scenes.write(tmp_path, train=120, val=24, size=32, seed=3, samples_per_shard=40)
    config, directory = tmp_path / "toy.yaml", tmp_path / "run"
    config.write_text(TOY)
    done = train(
        config,
        str(tmp_path / "*train-*.tar"),
        directory,
        "train.duration=150 steps",
        "train.log_every=5",
        "checkpoint.every=150 steps",
        "evaluation.knn.enabled=false",
        "launch.num_processes=1",
        "schedule.teacher_temperature.start=0.8",
        "schedule.teacher_temperature.peak=0.8",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    said = [line for line in (done.stdout + done.stderr).splitlines() if "have become uniform" in line]
    assert len(said) == 1
    assert "the teacher's temperature (0.8)" in said[0] and "lower schedule.teacher_temperature" in said[0]
    (journal,) = (directory / "tracking").glob("journal-*.jsonl")
    records = [record for _, record in read(journal)]
    values = [record["values"] for record in records if record["kind"] == "metrics"]
    assert sum("alert/uniform_targets" in value for value in values) == 1
    assert any(record["kind"] == "tags" and "alert/uniform_targets" in record["values"] for record in records)
    logged = next(value for value in values if "train/mask_ratio" in value)
    assert 0.1 < logged["train/mask_ratio"] < 0.2
    assert {
        "train/target_entropy",
        "train/dino_loss_vs_log_k",
        "train/feature_rank",
        "train/teacher_student_top1_agreement",
    } <= logged.keys()
