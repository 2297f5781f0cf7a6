"""W&B without a network: what its offline directories hold, over attempts, kills and outages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.tracking import Journal, wandb_files, wandb_shipper
from pipeline.tracking.shipper import new_cursor
from pipeline.tracking.wandb_shipper import WandbShipper, mode
from tests.helpers.wandb_files import contents

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def journal(run: Path, attempt: int = 0) -> Journal:
    return Journal(run / "tracking" / f"journal-{attempt:04d}.jsonl")


def ship(run: Path) -> None:
    said: list[str] = []
    one = WandbShipper(run / "tracking", project="vision", name="toy", log=said.append)
    one.start()
    assert one.close(300), (one.trouble, said)
    assert not said


def test_one_run_over_attempts_has_every_point_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = journal(run)
    first.params({"schedule.lr.peak": 0.1})
    for step in range(6):
        first.metrics(step, {"loss": float(step)})
    first.tags({"fovea.state": "stopped"})
    ship(run)
    second = journal(run, 1)
    for step in range(4, 9):
        second.metrics(step, {"loss": float(step), "late": 1.0})
    (run / "sheets").mkdir()
    Image.new("RGB", (12, 8)).save(run / "sheets" / "views.png")
    (run / "sheets" / "scores.csv").write_text("class,score\ncat,0.5\n")
    (run / "sheets" / "settings.yaml").write_text("a: 1\n")
    for name in ("views.png", "scores.csv", "settings.yaml"):
        second.artifact(run / "sheets" / name)
    second.tags({"fovea.state": "failed"})
    ship(run)
    known = contents(run / "wandb")
    assert (len(known.ids), known.names, known.projects) == (1, {"toy"}, {"vision"})
    assert known.series("loss") == [(step, float(step)) for step in range(9)]
    assert known.series("late") == [(step, 1.0) for step in range(4, 9)]
    assert known.config["schedule.lr.peak"] == "0.1"
    assert known.summary["fovea.state"] == "failed"
    assert known.codes == [0, 1]
    (image,), (table,) = known.series("sheets/views"), known.series("sheets/scores")
    assert (image[0], image[1]["width"], image[1]["height"]) == (8, 12, 8)
    assert (table[1]["ncols"], table[1]["nrows"]) == (2, 1)
    assert "sheets/settings.yaml" in known.files


KILLED = """
import os, sys
from pathlib import Path
from pipeline.tracking.wandb_shipper import WandbShipper
one = WandbShipper(Path(sys.argv[1]) / "tracking", project="vision", name="toy")
one.ship()
os.kill(os.getpid(), 9)
"""


def test_a_rank_killed_with_9_loses_nothing_that_was_accepted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    one = journal(run)
    for step in range(300):
        one.metrics(step, {"loss": float(step)})
    done = subprocess.run([sys.executable, "-c", KILLED, str(run)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    for step in range(300, 310):
        one.metrics(step, {"loss": float(step)})
    ship(run)
    known = contents(run / "wandb")
    assert known.series("loss") == [(step, float(step)) for step in range(310)]
    assert len(known.ids) == 1


def test_rows_of_an_earlier_attempt_are_counted_when_its_process_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run-x.wandb"
    with path.open("w"):
        assert wandb_files.is_open(path)
    assert not wandb_files.is_open(path)
    run, events = tmp_path / "run", []
    journal(run).metrics(0, {"loss": 0.0})
    cursor = new_cursor("https://api.wandb.ai//vision", "abc1") | {"sessions": ["offline-run-20260101_000000-abc1"]}
    (run / "tracking" / "cursor-wandb.json").write_text(json.dumps(cursor))
    monkeypatch.setattr(wandb_shipper, "is_open", lambda path: events.append("open") or len(events) < 3)
    monkeypatch.setattr(wandb_shipper, "logged", lambda path: events.append("counted") or 0)
    ship(run)
    assert events == ["open", "open", "open", "counted"]


def test_its_variables_are_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://bob:hunter2@wandb.example.org")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode() == "offline"
    for name, value in (("PROJECT", "theirs"), ("NAME", "named"), ("RUN_ID", "abc-1"), ("DIR", str(tmp_path / "elsewhere"))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = tmp_path / "run"
    journal(run).metrics(0, {"loss": 1.0})
    ship(run)
    known = contents(tmp_path / "elsewhere" / "wandb")
    assert "hunter2" not in (run / "tracking" / "cursor-wandb.json").read_text()
    assert (known.ids, known.names, known.projects) == ({"abc-1"}, {"named"}, {"theirs"})
    monkeypatch.setenv("WANDB_PROJECT", "another")
    monkeypatch.delenv("WANDB_RUN_ID")
    ship(run)
    assert contents(tmp_path / "elsewhere" / "wandb").series("loss") == [(0, 1.0)] * 2  # a run of its own, with everything


def test_a_server_that_is_away_delays_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by wandb.init, as without a network; later the same records arrive."""
    import wandb

    run, said = tmp_path / "run", []
    journal(run).metrics(0, {"loss": 1.0})

    def away(**_: object) -> None:
        raise wandb.errors.CommError("no network\nsecond line")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb, "init", away)
        one = WandbShipper(run / "tracking", project="vision", name="toy", log=said.append)
        one.start()
        assert not one.close(60)
    assert len(said) == 1
    assert "W&B at https://api.wandb.ai//vision (offline) accepts no records now (no network)" in said[0]
    ship(run)
    assert contents(run / "wandb").series("loss") == [(0, 1.0)]
