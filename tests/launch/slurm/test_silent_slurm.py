"""Commands where Slurm does not answer, and on runs that have ended: nothing is taken for dead, and nothing changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.cli.slurm import cancel, requeue, stop
from launch.slurm import status
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run on a cluster whose job trains, and a machine whose Slurm does not answer."""
    made = RunDirectory(tmp_path / "run")
    made.write("config.json", {})
    made.write("submit/job.json", {"job": 7})
    record.script(made).write_text("#!/bin/bash\n")
    made.note("start", attempt=0, job=7, ranks=2, nodes="n[1-2]", before=-1)
    pulse = made.logs(0) / "pulse" / "rank-0.json"
    pulse.parent.mkdir(parents=True)
    pulse.write_text(json.dumps({"step": 5}))
    programs(tmp_path, monkeypatch, {"squeue": "echo 'squeue: error: Unable to contact slurm controller' >&2; exit 1"})
    return made


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, str]) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in made.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_a_run_of_which_slurm_says_nothing_is_not_called_dead(run: RunDirectory) -> None:
    one = status.status(run)
    assert one.state == "unknown" and "Slurm does not answer; the last heartbeat was" in one.why
    assert one.step == 5 and json.loads(status.as_json(one))["state"] == "unknown"


@pytest.mark.parametrize("command", [cancel, requeue, lambda name: stop(name, now=True)])
def test_a_command_that_needs_slurm_fails_and_changes_nothing(run: RunDirectory, command: object) -> None:
    before = sorted(path.name for path in run.path.rglob("*"))
    with pytest.raises(LaunchError, match="Unable to contact slurm controller"):
        command(str(run.path))  # type: ignore[operator]
    assert sorted(path.name for path in run.path.rglob("*")) == before


def test_a_missing_squeue_is_no_empty_queue(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="squeue is not on the PATH"):
        cancel(str(run.path))
    assert not record.final_state(run)


def test_a_stop_reaches_the_ranks_without_slurm(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    stop(str(run.path), now=False)
    assert record.pending_request(run, record.STOP)
    out = capsys.readouterr()
    assert "saves and stops" in out.out and "Unable to contact" in out.err


@pytest.mark.parametrize("state", ["finished", "failed", "stopped"])
@pytest.mark.parametrize("command", [cancel, lambda name: stop(name, now=False), lambda name: stop(name, now=True)])
def test_an_ended_run_stays_as_it_is(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, command: object
) -> None:
    programs(tmp_path, monkeypatch, {"squeue": ""})
    record.end(run, state, "all 24 steps are done")
    before = (run.path / "final_state.json").read_text()
    command(str(run.path))  # type: ignore[operator]
    assert (run.path / "final_state.json").read_text() == before
    assert not record.pending_request(run, record.STOP)


def test_a_job_that_is_left_of_an_ended_run_is_cancelled(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "\x1f".join(("9", "PENDING", "Dependency", "N/A", "1:00", "", "0:00", "toy", "(null)", str(record.script(run))))
    programs(tmp_path, monkeypatch, {"squeue": f"echo '{line}'", "scancel": f"echo $* >> '{tmp_path}/cancelled'"})
    record.end(run, "finished", "all 24 steps are done")
    cancel(str(run.path))
    assert (tmp_path / "cancelled").read_text() == "9\n" and record.final_state(run)["state"] == "finished"
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize(("left", "text"), [("1:02:03", "1:02:03 left"), ("INVALID", "ending soon"), ("UNLIMITED", "no limit")])
def test_the_time_left_is_shown_where_slurm_knows_it(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, text: str
) -> None:
    line = "\x1f".join(("9", "RUNNING", "None", "N/A", left, "n[1-2]", "0:00", "toy", "(null)", str(record.script(run))))
    programs(tmp_path, monkeypatch, {"squeue": f"echo '{line}'"})
    one = status.status(run)
    assert one.state == "running" and text in one.why and "INVALID" not in one.why


def test_a_run_that_only_waits_is_stopped_in_the_queue(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "\x1f".join(("9", "PENDING", "Resources", "N/A", "1:00", "", "0:00", "toy", "(null)", str(record.script(run))))
    programs(tmp_path, monkeypatch, {"squeue": f"echo '{line}'", "scancel": f"echo $* >> '{tmp_path}/cancelled'"})
    stop(str(run.path), now=False)
    assert (tmp_path / "cancelled").read_text() == "9\n" and record.final_state(run)["state"] == "stopped"
