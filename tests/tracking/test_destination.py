"""Which MLflow server a run's journal goes to: settings, environment, what the run recorded, its own file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.tracking import destination
from pipeline.tracking.destination import unanswered
from pipeline.tracking.mlflow_database import uri_of
from pipeline.tracking.settings import TrackingSettings

NAMED = {"MLFLOW_TRACKING_URI": "http://env:5000", "MLFLOW_EXPERIMENT_NAME": "env"}


def test_without_anything_it_is_a_file_in_the_run(tmp_path: Path) -> None:
    chosen = destination(TrackingSettings(), tmp_path, {})
    assert (chosen.uri, chosen.experiment, chosen.origin) == (uri_of(tmp_path / "mlflow.db"), "fovea", "")


def test_the_settings_win_over_the_environment(tmp_path: Path) -> None:
    chosen = destination(TrackingSettings(uri="http://mine:1", experiment="mine"), tmp_path, NAMED)
    assert (chosen.uri, chosen.experiment, chosen.origin) == ("http://mine:1", "mine", "tracking.uri")


def test_the_environment_is_heeded_and_named(tmp_path: Path) -> None:
    chosen = destination(TrackingSettings(), tmp_path, NAMED)
    assert (chosen.uri, chosen.experiment) == ("http://env:5000", "env")
    assert str(chosen) == "http://env:5000 (MLFLOW_TRACKING_URI)"
    assert destination(TrackingSettings(), tmp_path, {"MLFLOW_TRACKING_URI": "  "}).origin == ""


def test_another_shell_still_knows_what_the_environment_named(tmp_path: Path) -> None:
    destination(TrackingSettings(), tmp_path, NAMED).record(tmp_path / "tracking")
    later = destination(TrackingSettings(), tmp_path, {})
    assert (later.uri, later.experiment) == ("http://env:5000", "env")
    moved = destination(TrackingSettings(), tmp_path, {"MLFLOW_TRACKING_URI": "http://other"})
    assert moved.uri == "http://other"
    (tmp_path / "tracking" / "destination.json").write_text("[damaged")
    assert destination(TrackingSettings(), tmp_path, {}).origin == ""


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    shown = str(destination(TrackingSettings(uri="https://me:secret@host/x?token=abc"), tmp_path, {}))
    assert "secret" not in shown and "abc" not in shown and "host" in shown


@pytest.mark.parametrize("content", ["[" * 200_000, '{"uri": "http://h", "origin": "\\u001b[2J"}', "fifo"])
def test_a_foreign_record_neither_blocks_nor_speaks(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tracking" / "destination.json"
    file.parent.mkdir()
    if content == "fifo":
        os.mkfifo(file)
    else:
        file.write_text(content)
    assert destination(TrackingSettings(), tmp_path, {}).origin == ""


@pytest.mark.parametrize("uri", ["http://[::1", "http://host:port", "http://[1.2.3:80", "https://", "sqlite:///x.db", ""])
def test_an_address_that_is_none_is_no_error_here(uri: str) -> None:
    assert isinstance(unanswered(uri), str)
