"""The event file, read back by TensorBoard's own reader: one file over attempts, nothing twice, nothing lost."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.tracking import Journal, check_installed, described, shippers
from pipeline.tracking.settings import TrackingSettings
from pipeline.tracking.tensorboard_shipper import TensorBoardShipper


def journal(run: Path, attempt: int = 0) -> Journal:
    return Journal(run / "tracking" / f"journal-{attempt:04d}.jsonl", clock=lambda: 1000.0 + attempt)


def shipper(run: Path, said: list[str] | None = None) -> TensorBoardShipper:
    return TensorBoardShipper(run / "tracking", log=said.append if said is not None else print)


def files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").iterdir())


def read_back(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    return reader


def history(run: Path, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read_back(run).Scalars(key)]


def test_metrics_settings_images_and_tables_are_read_back(tmp_path: Path) -> None:
    one, said = journal(tmp_path), []
    one.params({"schedule.lr.peak": 0.1, "run.name": "a|b"})
    for step in range(5):
        one.metrics(step, {"train/loss": 5.0 - step, "train/odd": float("nan")})
    sheets = tmp_path / "sheets"
    sheets.mkdir()
    Image.new("RGB", (12, 8), (255, 0, 0)).save(sheets / "views.png")
    (sheets / "scores.csv").write_text("class,score\ncat,0.5\ndog,0.25\n")
    (sheets / "settings.yaml").write_text("a: 1\n")
    (sheets / "page.html").write_text("<p>")
    for name in ("views.png", "scores.csv", "settings.yaml", "page.html"):
        one.artifact(sheets / name)
    one.tags({"fovea.state": "finished"})
    shipper(tmp_path, said).ship()
    reader = read_back(tmp_path)
    assert history(tmp_path, "train/loss") == [(step, 5.0 - step) for step in range(5)]
    assert all(math.isnan(point.value) for point in reader.Scalars("train/odd"))
    assert reader.Scalars("train/loss")[0].wall_time == 1000.0
    (image,) = reader.Images("sheets/views")
    assert (image.step, image.width, image.height) == (4, 12, 8)
    assert image.encoded_image_string == (sheets / "views.png").read_bytes()
    text = {tag: reader.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"]}
    assert "| schedule.lr.peak | 0.1 |" in text["settings/text_summary"]
    assert "a\\|b" in text["settings/text_summary"]
    table = ["| class | score |", "|---|---|", "| cat | 0.5 |", "| dog | 0.25 |"]
    assert text["sheets/scores/text_summary"].splitlines() == table
    assert text["sheets/settings/text_summary"] == "    a: 1"
    assert set(reader.SummaryMetadata("settings/text_summary").plugin_data.plugin_name.split()) == {"text"}
    assert [line for line in said if "page.html" in line] == said
    assert len(files(tmp_path)) == 1


def test_the_next_attempt_continues_the_file_and_doubles_no_point(tmp_path: Path) -> None:
    first = journal(tmp_path)
    for step in range(6):
        first.metrics(step, {"loss": float(step)})
    shipper(tmp_path).ship()
    second = journal(tmp_path, 1)
    for step in range(4, 9):
        second.metrics(step, {"loss": float(step), "late": 1.0})
    shipper(tmp_path).ship()
    assert len(files(tmp_path)) == 1
    assert history(tmp_path, "loss") == [(step, float(step)) for step in range(9)]
    assert history(tmp_path, "late") == [(step, 1.0) for step in range(4, 9)]


def test_what_a_killed_process_wrote_beyond_its_cursor_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = journal(tmp_path)
    one.metrics(0, {"loss": 0.0})
    shipper(tmp_path).ship()
    for step in range(1, 4):
        one.metrics(step, {"loss": float(step)})
    killed = shipper(tmp_path)
    monkeypatch.setattr(killed, "_write_cursor", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        killed.ship()
    (path,) = files(tmp_path)
    with path.open("ab") as file:
        file.write(b"torn")
    assert len(history(tmp_path, "loss")) == 4
    shipper(tmp_path).ship()
    assert history(tmp_path, "loss") == [(step, float(step)) for step in range(4)]


def test_a_deleted_file_is_replaced_by_one_that_has_everything(tmp_path: Path) -> None:
    one = journal(tmp_path)
    one.metrics(0, {"loss": 0.0})
    running = shipper(tmp_path)
    running.ship()
    files(tmp_path)[0].unlink()
    one.metrics(1, {"loss": 1.0})
    running.ship()
    assert history(tmp_path, "loss") == [(0, 0.0), (1, 1.0)]


def test_a_full_disk_delays_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    journal(tmp_path).metrics(0, {"loss": 0.0})
    running = shipper(tmp_path, said)
    connect = running._connect

    def without_space() -> None:
        connect()
        running._file = open("/dev/full", "r+b")  # noqa: SIM115 - the shipper closes it, which fails too

    with monkeypatch.context() as patch:
        patch.setattr(running, "_connect", without_space)
        running.start()
        assert not running.close(60)
    assert isinstance(running.trouble, OSError) and running.trouble.errno == errno.ENOSPC
    assert len(said) == 1 and "No space left" in said[0]
    running = shipper(tmp_path, said)
    running.start()
    assert running.close(60)
    assert history(tmp_path, "loss") == [(0, 0.0)]


def test_a_folder_that_cannot_be_made_delays_and_loses_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    one = journal(tmp_path)
    one.metrics(0, {"loss": 0.0})
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    running = shipper(tmp_path, said)
    running.start()
    assert not running.close(60)
    assert running.trouble is not None
    assert len(said) == 1 and "the journal keeps everything" in said[0]
    (tmp_path / "tensorboard").unlink()
    running = shipper(tmp_path, said)
    running.start()
    assert running.close(60)
    assert history(tmp_path, "loss") == [(0, 0.0)]


def test_a_foreign_run_cannot_have_other_files_written(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    run = tmp_path / "run"
    one = journal(run)
    one.metrics(0, {"loss": 0.0})
    (run / "tensorboard").mkdir()
    cursor = {"uri": "tensorboard", "run_id": "../../victim", "offsets": {}, "steps": {}, "artifacts": [], "size": 0}
    (run / "tracking" / "cursor-tensorboard.json").write_text(json.dumps(cursor))
    (run / "tensorboard" / "events.out.tfevents.0.fovea").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        shipper(run).ship()
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_foreign_runs_folder_may_not_be_a_link(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "events.out.tfevents.7.fovea").write_text("precious")
    journal(run).metrics(0, {"loss": 0.0})
    (run / "tensorboard").symlink_to(outside)
    cursor = {"uri": "tensorboard", "run_id": "7", "offsets": {}, "steps": {}, "artifacts": [], "size": 3}
    (run / "tracking" / "cursor-tensorboard.json").write_text(json.dumps(cursor))
    with pytest.raises(ConfigError, match="not a link"):
        shipper(run).ship()
    assert (outside / "events.out.tfevents.7.fovea").read_text() == "precious"


def test_a_file_that_cannot_be_shown_delays_no_other(tmp_path: Path) -> None:
    one, said = journal(tmp_path), []
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.truncate(40 << 20)
    (tmp_path / "settings.yaml").write_text("a: 1\n")
    for name in ("broken.png", "large.jsonl", "settings.yaml"):
        one.artifact(tmp_path / name)
    shipper(tmp_path, said).ship()
    assert [line.partition(" ")[0] for line in said] == ["broken.png", "large.jsonl"]
    assert any("settings" in tag for tag in read_back(tmp_path).Tags()["tensors"])


def test_trackers_that_are_chosen_and_not_installed_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    chosen = TrackingSettings(to=("wandb", "tensorboard"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(ConfigError, match=r"wandb is not installed.*pip install 'fovea\[wandb\]'"):
        check_installed(chosen)
    check_installed(TrackingSettings(to=("wandb",), enabled=False))
    check_installed(TrackingSettings(to=("tensorboard",)))
    made = shippers(TrackingSettings(to=("tensorboard",)), tmp_path, name="toy", destination=None, log=print)
    assert [one.tracker for one in made] == ["TensorBoard"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert described(chosen, None) == "W&B offline (WANDB_MODE) · TensorBoard in tensorboard/"
    assert described(TrackingSettings(enabled=False, to=("wandb",)), None) == ""
