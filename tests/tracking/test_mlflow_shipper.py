"""The shipper against a real MLflow: one run however many attempts, nothing twice, nothing lost, and nobody waits for it."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import LaunchError
from pipeline.tracking import EvalDestination, Journal, Shipper, eval_destinations
from tests.helpers.limits import LONG, hang_limit


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database; making one takes seconds, copying it none."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@dataclass
class Bench:
    """A run's tracking folder beside a database, and what the shippers said."""

    folder: Path
    database: Path
    said: list[str] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.database}"

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    @property
    def run(self) -> Any:
        (run,) = self.runs()
        return run

    def runs(self) -> list[Any]:
        experiment = self.client.get_experiment_by_name("tests")
        return list(self.client.search_runs([experiment.experiment_id])) if experiment else []

    def journal(self, attempt: int = 0) -> Journal:
        return Journal(self.folder / f"journal-{attempt:04d}.jsonl")

    def shipper(self, uri: str | None = None) -> Shipper:
        return Shipper(self.folder, uri=uri or self.uri, experiment="tests", name="toy", log=self.said.append)

    def history(self, key: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(self.run.info.run_id, key)]


@pytest.fixture
def bench(tmp_path: Path, template: Path) -> Bench:
    shutil.copy(template, tmp_path / "mlflow.db")
    return Bench(tmp_path / "run" / "tracking", tmp_path / "mlflow.db")


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def test_everything_a_journal_says_arrives(bench: Bench, tmp_path: Path) -> None:
    bench.folder.mkdir(parents=True)
    report = bench.folder.parent / "report.html"
    report.write_text("<html></html>")
    journal = bench.journal()
    journal.params({"schedule.lr.peak": 0.1, "long": "x" * 9000})
    journal.tags({"fovea.state": "running", "fovea.attempt": 0})
    for step in range(5):
        journal.metrics(step, {"train/loss": 5.0 - step, "lr": 0.1})
    journal.artifact(report)
    shipper = bench.shipper()
    shipper.start()
    assert shipper.close(60)
    run = bench.run
    assert run.info.run_name == "toy"
    assert run.info.status == "RUNNING"
    assert run.data.params["schedule.lr.peak"] == "0.1"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["fovea.attempt"] == "0"
    assert bench.history("train/loss") == [(step, 5.0 - step) for step in range(5)]
    assert [file.path for file in bench.client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert not bench.said


def test_the_next_attempt_goes_on_with_the_same_run_and_doubles_no_point(bench: Bench) -> None:
    first = bench.journal(0)
    for step in range(6):
        first.metrics(step, {"loss": float(step)})
    bench.shipper().ship()
    number = bench.run.info.run_id
    second = bench.journal(1)
    for step in range(4, 9):
        second.metrics(step, {"loss": float(step), "late": 1.0})
    bench.shipper().ship()
    assert bench.run.info.run_id == number
    assert bench.history("loss") == [(step, float(step)) for step in range(9)]
    assert bench.history("late") == [(step, 1.0) for step in range(4, 9)]
    before = (bench.folder / "cursor.json").read_bytes()
    bench.shipper().ship()
    assert (bench.folder / "cursor.json").read_bytes() == before


def test_the_state_of_the_run_is_told(bench: Bench) -> None:
    shipper = bench.shipper()
    for attempt, (state, status) in enumerate(
        [("running", "RUNNING"), ("stopped", "KILLED"), ("running", "RUNNING"), ("finished", "FINISHED")]
    ):
        bench.journal(attempt).tags({"fovea.state": state})
        shipper.ship()
        assert bench.run.info.status == status
        assert bench.run.data.tags["fovea.state"] == state
    last = json.loads((bench.folder / "journal-0003.jsonl").read_text())
    assert bench.run.info.end_time == int(last["t"] * 1000)


def test_a_setting_that_changed_between_attempts_becomes_a_tag(bench: Bench) -> None:
    bench.journal(0).params({"data.num_workers": 1, "schedule.lr.peak": 0.1})
    bench.shipper().ship()
    bench.journal(1).params({"data.num_workers": 4, "schedule.lr.peak": 0.1, "new": 1})
    bench.shipper().ship()
    assert bench.run.data.params == {"data.num_workers": "1", "schedule.lr.peak": "0.1", "new": "1"}
    assert {key: value for key, value in bench.run.data.tags.items() if key.startswith("changed.")} == {
        "changed.data.num_workers": "4"
    }


def test_numbers_that_are_none_arrive(bench: Bench) -> None:
    journal = bench.journal()
    journal.metrics(0, {"nan": math.nan, "inf": math.inf, "fine": 1.0})
    bench.shipper().ship()
    assert math.isnan(bench.history("nan")[0][1])
    assert bench.history("inf")[0][1] > 1e308
    assert bench.history("fine") == [(0, 1.0)]


def test_thousands_of_points_arrive(bench: Bench) -> None:
    journal = bench.journal()
    for step in range(1500):
        journal.metrics(step, {"a": 1.0, "b": 2.0})
    bench.shipper().ship()
    assert [step for step, _ in bench.history("a")] == list(range(1500))
    assert len(bench.history("b")) == 1500


def test_a_connection_that_breaks_in_the_middle_doubles_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    journal = bench.journal()
    for step in range(800):
        journal.metrics(step, {"a": float(step), "b": 0.0})
    real, calls, sent = MlflowClient.log_batch, [], []

    def flaky(self: Any, run_id: str, **what: Any) -> Any:
        calls.append(what)
        if len(calls) == 2:
            raise ConnectionError("reset by peer")
        sent.extend(what.get("metrics", ()))
        return real(self, run_id, **what)

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    with pytest.raises(ConnectionError):
        bench.shipper().ship()
    assert 0 < len(sent) < 1600
    bench.shipper().ship()
    assert len(sent) == len({(point.key, point.step) for point in sent}) == 1600
    assert bench.history("a") == [(step, float(step)) for step in range(800)]


def test_what_mlflow_refuses_is_named_once_and_holds_up_nothing_else(bench: Bench) -> None:
    journal = bench.journal()
    for step in range(3):
        journal.metrics(step, {"good": 1.0, "b*d": 2.0, "fine": 3.0})
    bench.shipper().ship()
    assert len(bench.history("good")) == len(bench.history("fine")) == 3
    assert len(bench.said) == 1
    assert "'b*d'" in bench.said[0]
    shipper = bench.shipper()
    shipper.start()
    assert shipper.close(30)


def test_the_torn_end_of_a_killed_attempt_is_not_waited_for(bench: Bench) -> None:
    bench.journal(0).metrics(0, {"loss": 1.0})
    with (bench.folder / "journal-0000.jsonl").open("a") as file:
        file.write('{"t": 1, "kind": "metr')
    bench.journal(1).metrics(1, {"loss": 2.0})
    shipper = bench.shipper()
    shipper.start()
    assert shipper.close(30)
    assert bench.history("loss") == [(0, 1.0), (1, 2.0)]


def test_a_deleted_run_is_replaced_by_a_new_one_that_has_everything(bench: Bench) -> None:
    journal = bench.journal()
    journal.metrics(0, {"loss": 1.0})
    shipper = bench.shipper()
    shipper.ship()
    old = bench.run.info.run_id
    bench.client.delete_run(old)
    journal.metrics(1, {"loss": 2.0})
    shipper.start()
    wait_for(lambda: bool(bench.runs()) and bench.history("loss") == [(0, 1.0), (1, 2.0)])
    assert shipper.close(30)
    assert bench.run.info.run_id != old


def test_another_server_gets_a_run_of_its_own_with_everything(bench: Bench, template: Path, tmp_path: Path) -> None:
    bench.journal().metrics(0, {"loss": 1.0})
    bench.shipper().ship()
    shutil.copy(template, tmp_path / "second.db")
    bench.shipper(f"sqlite:///{tmp_path / 'second.db'}").ship()
    bench.database = tmp_path / "second.db"
    assert bench.history("loss") == [(0, 1.0)]


def test_a_broken_artifact_store_holds_up_no_metrics(bench: Bench) -> None:
    bench.folder.mkdir(parents=True)
    run = bench.folder.parent
    (run / "report.html").write_text("one")
    (bench.folder / "artifacts").write_text("a file where a folder should be")
    journal = bench.journal(0)
    journal.artifact(run / "report.html")
    journal.artifact(run / "never made.html")
    journal.metrics(0, {"loss": 1.0})
    with pytest.raises(Exception, match="artifacts"):
        bench.shipper().ship()
    journal.metrics(1, {"loss": 2.0})
    with pytest.raises(Exception, match="artifacts"):
        bench.shipper().ship()
    assert bench.history("loss") == [(0, 1.0), (1, 2.0)]
    (bench.folder / "artifacts").unlink()
    bench.shipper().ship()
    assert [file.path for file in bench.client.list_artifacts(bench.run.info.run_id)] == ["report.html"]
    assert bench.said == [f"{run / 'never made.html'} is gone and cannot be sent to MLflow"]


def test_a_server_that_is_away_blocks_no_writer_and_gets_everything_when_it_comes_back(bench: Bench, template: Path) -> None:
    bench.database = bench.database.parent / "not yet" / "mlflow.db"
    bench.database.parent.write_text("")  # a file in the way: no database can be made there
    shipper = bench.shipper()
    shipper.start()
    journal = bench.journal()
    for step in range(300):  # a writer that waited for the database would wait for ever
        journal.metrics(step, {"loss": float(step)})
    wait_for(lambda: bool(bench.said))
    bench.database.parent.unlink()
    bench.database.parent.mkdir()
    shutil.copy(template, bench.database)
    wait_for(lambda: bool(bench.runs()) and len(bench.history("loss")) == 300)
    assert shipper.close(LONG)
    assert len(bench.said) == 1, "an outage is told once"
    assert "journal keeps everything" in bench.said[0]


def test_closing_does_not_wait_for_a_server_that_is_away(bench: Bench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    bench.journal().metrics(0, {"loss": 1.0})
    shipper = bench.shipper(f"http://127.0.0.1:{port}")
    shipper.start()
    wait_for(lambda: bool(bench.said))
    with hang_limit(200):
        assert not shipper.close(1)
    bench.shipper().ship()
    assert bench.history("loss") == [(0, 1.0)]


@pytest.mark.slow
def test_a_real_server_that_comes_up_during_the_run_gets_everything(bench: Bench, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    bench.folder.mkdir(parents=True)
    (bench.folder.parent / "report.html").write_text("<html></html>")
    journal = bench.journal()
    shipper = bench.shipper(f"http://127.0.0.1:{port}")
    shipper.start()
    for step in range(50):
        journal.metrics(step, {"loss": float(step)})
    wait_for(lambda: bool(bench.said))
    words = ["server", "--backend-store-uri", bench.uri, "--artifacts-destination", str(tmp_path / "store"), "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--workers", "1"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
    )
    try:
        for step in range(50, 100):
            journal.metrics(step, {"loss": float(step)})
        journal.artifact(bench.folder.parent / "report.html")
        journal.tags({"fovea.state": "finished"})
        wait_for(lambda: bool(bench.runs()) and bench.run.info.status == "FINISHED", 150)
        assert shipper.close(30)
        assert bench.history("loss") == [(step, float(step)) for step in range(100)]
        assert [path.name for path in (tmp_path / "store").rglob("*.html")] == ["report.html"]
        assert len(bench.said) == 1
    finally:
        server.terminate()
        server.wait(LONG)


# ---- beside a run's training ------------------------------------------------------------------------------------------------


def aside_of(bench: Bench, name: str, value: float, joins: str = "../cursor.json") -> tuple[Path, EvalDestination]:
    folder, aside = bench.folder / name, EvalDestination(bench.uri, "tests", "by hand", joins)
    journal = aside.begin(folder)
    journal.metrics(3, {"eval/score": value})
    journal.close()
    return folder, aside


def test_it_joins_the_run_and_a_second_answer_for_a_step_is_kept(bench: Bench) -> None:
    journal = bench.journal()
    journal.metrics(3, {"train/loss": 1.0})
    journal.tags({"fovea.state": "stopped"})
    bench.shipper().ship()
    before = (bench.folder / "cursor.json").read_bytes()
    for name, value in (("eval-a", 0.25), ("eval-b", 0.5)):
        folder, aside = aside_of(bench, name, value)
        aside.shipper(folder).ship()
        aside.shipper(folder).ship()  # what was accepted is not sent again
    assert bench.history("eval/score") == [(3, 0.25), (3, 0.5)]
    assert bench.run.info.status == "KILLED"
    assert (bench.folder / "cursor.json").read_bytes() == before
    assert eval_destinations(bench.folder) == [
        (bench.folder / name, EvalDestination(bench.uri, "tests", "by hand", "../cursor.json")) for name in ("eval-a", "eval-b")
    ]


def test_it_waits_for_the_run_and_makes_none(bench: Bench) -> None:
    folder, aside = aside_of(bench, "eval-a", 0.25)
    told: list[str] = []
    shipper = aside.shipper(folder, told.append)
    shipper.start()
    assert not shipper.close(30)
    assert bench.runs() == [] and "the run itself is not there yet" in told[0]
    bench.journal().metrics(1, {"train/loss": 2.0})
    bench.shipper().ship()
    aside.shipper(folder).ship()
    assert bench.history("eval/score") == [(3, 0.25)]


def test_of_itself_it_has_a_run_of_its_own(bench: Bench) -> None:
    folder, aside = aside_of(bench, "eval-a", 0.25, joins="")
    aside.shipper(folder).ship()
    assert bench.run.info.run_name == "by hand" and bench.history("eval/score") == [(3, 0.25)]


def test_a_deleted_experiment_is_named_with_what_to_do(bench: Bench) -> None:
    journal = bench.journal()
    journal.metrics(0, {"loss": 1.0})
    bench.shipper().ship()
    bench.client.delete_experiment(bench.client.get_experiment_by_name("tests").experiment_id)
    journal.metrics(1, {"loss": 0.5})
    shipper = bench.shipper()
    shipper.start()
    assert not shipper.close(60)
    assert isinstance(shipper.trouble, LaunchError) and "tracking.experiment" in shipper.trouble.hint
    assert len(bench.said) == 1 and "the experiment 'tests' is deleted" in bench.said[0]


def test_members_of_a_sweep_that_ship_at_once_have_one_parent(bench: Bench, tmp_path: Path) -> None:
    sweep = tmp_path / "lr_sweep"
    folders = [sweep / f"{number:03d}" / "tracking" for number in range(3)]
    shippers = []
    for folder in folders:
        with_scores = Journal(folder / "journal-0000.jsonl")
        with_scores.metrics(1, {"train/loss": 1.0})
        with_scores.close()
        name = folder.parent.name
        shippers.append(Shipper(folder, uri=bench.uri, experiment="tests", name=name, log=bench.said.append, sweep=sweep))
    for shipper in shippers:
        shipper.start()
    assert all(shipper.close(LONG) for shipper in shippers), bench.said
    runs = {run.info.run_name: run for run in bench.runs()}
    assert sorted(runs) == ["000", "001", "002", "lr_sweep"]
    parent = runs.pop("lr_sweep").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent}


def test_the_run_of_a_sweep_ends_with_its_last_member_and_goes_on_with_the_first_that_is_resumed(
    bench: Bench, tmp_path: Path
) -> None:
    sweep = tmp_path / "lr_sweep"
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps({"members": [["run.seed=0"], ["run.seed=1"]]}))

    def reports(number: int, *states: str, attempt: int = 0) -> str:
        folder = sweep / f"{number:03d}" / "tracking"
        journal = Journal(folder / f"journal-{attempt:04d}.jsonl")
        for state in states:
            journal.tags({"fovea.state": state})
        journal.close()
        name = f"lr_sweep-{number:03d}"
        Shipper(folder, uri=bench.uri, experiment="tests", name=name, log=bench.said.append, sweep=sweep).ship()
        (parent,) = [run for run in bench.runs() if run.info.run_name == "lr_sweep"]
        return f"{parent.info.status} {parent.data.tags.get('fovea.state', '')}".strip()

    assert reports(0, "running", "finished").startswith("RUNNING"), "the other has not begun"
    assert reports(1, "running") == "RUNNING running"
    shutil.rmtree(sweep / "001")  # it begins again as another run of MLflow's, and this one goes on for ever
    assert reports(1, "running") == "RUNNING running"
    assert reports(1, "stopped") == "KILLED stopped"
    assert reports(1, "running", attempt=1) == "RUNNING running"
    assert reports(1, "finished", attempt=2) == "FINISHED finished"
    (sweep / "sweep.json").write_text("[")
    assert reports(1, "running", attempt=3) == "RUNNING running", "a damaged record stops no member"
    assert not bench.said


def test_a_sweep_whose_folder_of_records_is_a_link_gets_nothing(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    sweep = tmp_path / "foreign"
    folder = sweep / "000" / "tracking"
    journal = Journal(folder / "journal-0000.jsonl")
    journal.metrics(1, {"train/loss": 1.0})
    journal.close()
    (sweep / "tracking").symlink_to(tmp_path / "elsewhere")
    shipper = Shipper(folder, uri=bench.uri, experiment="tests", name="000", log=bench.said.append, sweep=sweep)
    shipper.start()
    assert not shipper.close(LONG) and "not a link" in bench.said[0]
    assert not list((tmp_path / "elsewhere").iterdir())
