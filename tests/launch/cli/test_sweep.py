"""``fovea sweep`` on this machine with real runs: checked first, killed and continued, halved, listed, nested in MLflow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.sweep.state import find, score_at
from pipeline.checkpoint import files as saved
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers import small_runs
from tests.helpers.commands import fovea
from tests.helpers.limits import deadline
from tests.helpers.runs import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_runs.make(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def words(folder: Path, name: str, *more: str) -> list[str]:
    return ["sweep", *small_runs.words(folder), "evaluation.knn.baselines=false", *more, "--directory", str(folder / name)]


def refused(*arguments: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert fovea(*arguments) == 2
    text = " ".join(capfd.readouterr().err.split())
    assert "Traceback" not in text
    return text


@pytest.mark.slow
def test_a_halved_sweep_killed_in_the_middle_continues_and_compares_the_same_step(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = words(folder, "halved", "schedule.lr.peak=[1e-2,3e-2,1e-1]", "--halving", "knn/k3")
    process = subprocess.Popen([sys.executable, "-m", "launch.cli.main", *arguments], env=environment(), cwd=ROOT)
    second, end = folder / "halved" / "001", deadline()
    while not saved.committed_checkpoints(second / "checkpoints") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=300) == -signal.SIGKILL
    first = (folder / "halved" / "000" / "outcome.json").stat().st_mtime_ns
    assert not (folder / "halved" / "decisions.json").exists()
    capfd.readouterr()
    while fovea(*arguments) and time.monotonic() < end:  # the kernel is still ending the run
        time.sleep(0.1)
    out = capfd.readouterr().out
    sweep = find(str(folder / "halved"))
    (compared,) = sweep.comparisons()
    assert set(compared.steps.values()) == {4}, "a third of twelve steps"
    for number in sweep.numbers:
        run = sweep.run(number)
        assert compared.scores[str(number)] == score_at(run, "knn/k3", 4) is not None
        steps = [one.step for one in saved.committed_checkpoints(run.path / "checkpoints")]
        assert max(steps) == (12 if number in compared.continued else 4), "the others have stopped at that very step"
    (winner,) = compared.continued
    assert winner == max(sweep.numbers, key=lambda n: (compared.scores[str(n)] or 0.0, -n))
    if winner:
        assert (folder / "halved" / "000" / "outcome.json").stat().st_mtime_ns == first, "it was not trained again"
    assert f"rung 0: member {winner:03d}: knn/k3" in out and out.count("is stopped") == 2
    rows = [row.split() for row in out.splitlines()[-3:]]
    assert rows[0][:3] == [f"{winner:03d}", "finished", "12"] and all(row[1] == "halved" for row in rows[1:])

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/halved/mlflow.db")
    (parent,) = [run for run in client.search_runs(["1"]) if "mlflow.parentRunId" not in run.data.tags]
    nested = {run.info.run_name: run for run in client.search_runs(["1"]) if run.info.run_id != parent.info.run_id}
    assert sorted(nested) == ["halved-000", "halved-001", "halved-002"]
    assert {run.data.tags["mlflow.parentRunId"] for run in nested.values()} == {parent.info.run_id}
    assert parent.info.run_name == "halved" and parent.info.status == "FINISHED"
    assert all("knn/k3" in run.data.metrics for run in nested.values()), "those stopped early have sent everything"

    assert fovea(*arguments) == 0, "nothing is left to do"
    assert "step" not in capfd.readouterr().err and len(RunDirectory(sweep.run(winner).path).attempts()) == len(
        sweep.run(winner).attempts()
    )
    assert fovea("sweep", "status", str(sweep.path)) == 0
    out = capfd.readouterr().out
    assert "3 members: 2 halved, 1 finished" in out and "rung 0: knn/k3" in out
    assert fovea("sweep", "table", str(sweep.path), "--score", "knn/k3") == 0
    assert capfd.readouterr().out.splitlines()[1].startswith(f"{winner:03d}")


@pytest.mark.slow
def test_a_failing_member_does_not_end_the_others_and_stop_starts_no_further(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "list.txt").write_text("data.shards=/nowhere/x-*.tar\nrun.seed=1 train.duration='2 steps'\n")
    arguments = ["sweep", str(folder / "toy.yaml"), f"data.index={folder / 'index'}", "tracking.enabled=false"]
    arguments += ["--list", str(folder / "list.txt"), "--directory", str(folder / "listed")]
    text = (folder / "toy.yaml").read_text().replace("none.tar", f"'{folder}/scenes/*train-*.tar'")
    (folder / "toy2.yaml").write_text(text)
    arguments[1] = str(folder / "toy2.yaml")
    assert fovea(*arguments) == 1
    out = capfd.readouterr().out
    assert "member 000 ended with 2; its messages are above" in out and ["001", "finished", "2"] in [
        row.split()[:3] for row in out.splitlines()
    ]
    assert fovea("sweep", "stop", str(folder / "listed")) == 0
    assert find(str(folder / "listed")).stopped
    capfd.readouterr()
    assert fovea("sweep", "status", str(folder / "listed")) == 0
    assert "1 finished" in capfd.readouterr().out


def test_every_member_is_checked_before_the_first_starts(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cases = (
        (("schedule.lr.peak=[1e-2,-1]",), "member 001 (", "schedule.lr.peak"),
        (("run.seed=[1,1]",), "is the same as member 000", "member 001"),
        (("train.global_batch_size=[8,9]", "launch.num_processes=2"), "member 001", "of 2 members"),
        (("schedule.lr.peek=[1e-2]",), "did you mean 'schedule.lr.peak'", "member 000"),
        (("run.seed=range(3)", "--halving", "knn/k20"), "has no score 'knn/k20'", "Choose one of knn/k3"),
        (("run.seed=range(2)", "--halving", "knn/k3"), "needs at least 3 members", "--halving"),
        (("run.seed=range(3)", "--halving", "knn/k3", "train.duration='2 steps'"), "2 steps are too few", "--halving"),
        (("run.seed=range(2)", "--max-jobs", "2"), "needs --cluster", "--max-jobs"),
        (("run.seed=range(3)", "--halving", "knn/k3", "--cluster", "x.yaml"), "needs --wait on a cluster", "--halving"),
        (("--list", str(folder / "no.txt")), "cannot be read", "no.txt"),
        (("run.seed=range(2)", "--name", "a/b"), "must consist of letters", "--name"),
    )
    for more, message, where in cases:
        answer = refused(*words(folder, "checked", *more), capfd=capfd)
        assert message in answer and (where in answer or where == "of 2 members"), answer
    assert not [path for path in (folder / "checked").rglob("*") if path.name != ".lock"], "nothing was started"
    assert "is not a sweep" in refused("sweep", "status", str(folder), capfd=capfd)


def test_one_sweep_at_a_time_in_a_directory(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import fcntl

    (folder / "busy").mkdir()
    with (folder / "busy" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "this sweep is running already" in refused(*words(folder, "busy", "run.seed=range(2)"), capfd=capfd)
    assert os.listdir(folder / "busy") == [".lock"]


def test_a_record_of_a_stranger_runs_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder / "foreign"
    path.mkdir()
    record = {"format": 1, "id": "0" * 12, "config": "c", "members": [["a=\x1b[2J"]], "fingerprints": ["f"]}
    (path / "sweep.json").write_text(json.dumps(record))
    assert fovea("sweep", "status", str(path)) == 0 and fovea("sweep", "table", str(path)) == 0
    assert "\x1b" not in capfd.readouterr().out
    assert os.listdir(path) == ["sweep.json"]
