"""``fovea demo`` works for every method: its config loads with the demo's overrides, and a tiny one is run to its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.cli import demo
from pipeline.config.load import load
from pipeline.config.schema import METHODS
from pipeline.errors import ConfigError


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_a_config_that_takes_the_demos_settings(method: str, tmp_path: Path) -> None:
    name = demo.config_of(method)
    words = [
        "data.shards=x/*train-*.tar",
        "evaluation.knn.val_shards=x/*val-*.tar",
        "launch.num_processes=2",
        "tracking.experiment=e",
    ]
    words += demo._length(name, words, tmp_path, 5.0, 60)
    config = load(name, words).config
    assert config.method.name == method
    assert str(config.train.duration) == "60 steps" and str(config.checkpoint.every) == "15 steps"
    assert {str(every) for every in config.evaluation.enabled.values()} == {"6 steps"}
    assert "knn" in config.evaluation.enabled


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "clip", "distill"])
def test_a_demo_is_stopped_resumed_and_shown(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "TRAIN", 512)
    monkeypatch.setattr(demo, "VALIDATION", 64)
    monkeypatch.setattr(demo, "SIZE", 32)
    demo.run(minutes=1.0, method=method, data=None, directory=tmp_path, val=None, steps=8)
    (run,) = tmp_path.glob(f"{method}-*")
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["stop"], outcome["step"], outcome["attempt"]) == ("FINISHED", 8, 1)
    assert (run / "page.html").stat().st_size > 10_000
    assert "Results" in capfd.readouterr().out


@pytest.mark.slow
def test_the_speed_is_that_of_a_short_run_which_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TRAIN", 512)
    monkeypatch.setattr(demo, "VALIDATION", 64)
    monkeypatch.setattr(demo, "SIZE", 32)
    words = [*demo.shards_of(None, None, tmp_path), "launch.num_processes=1", "train.global_batch_size=16"]
    assert demo.images_per_second(demo.config_of("byol"), words, tmp_path) > 0
    assert not (tmp_path / ".probe").exists()


@pytest.mark.parametrize(("method", "minutes"), [("dino", 1.0), ("distill", 2.0)])
def test_too_short_a_time_is_refused_before_anything_is_drawn(method: str, minutes: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="minutes are too short"):
        demo.run(minutes=minutes, method=method, data=None, directory=tmp_path / "demo", val=None)
    assert not (tmp_path / "demo").exists()
