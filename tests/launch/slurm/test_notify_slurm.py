"""Notifications of a job's supervisor on a real Slurm, with ranks that train nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import profile as profiles
from launch.slurm import slurm_commands as tools
from launch.slurm.submit import submit
from pipeline.config.load import load
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import Journal, Shipper, remember
from tests.helpers.cluster_runs import Start, causes, queue, reach, starter, until, verdict
from tests.helpers.slurm import NEEDS_SLURM, Cluster, cluster

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "c", nodes=3) as made:
        yield made


@pytest.fixture
def start(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return starter(slurm, tmp_path, monkeypatch)


def writing(file: Path) -> dict[str, Any]:
    """A section notify whose program appends its event and text to a file."""
    return {"command": ["sh", "-c", f'echo "<$FOVEA_EVENT>" >> {file}; cat >> {file}']}


def sent(run: RunDirectory) -> list[tuple[str, str]]:
    """Events and results as recorded."""
    file = run.path / "notifications.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(row["event"], row["result"]) for row in rows]


def test_a_hang_and_the_end_are_notified_and_a_hanging_program_holds_nothing_up(start: Start, tmp_path: Path) -> None:
    # It ends only when the next attempt has begun, so whoever waits for it before that waits until it is given up.
    section = writing(tmp_path / "mail")
    begun = tmp_path / "run" / "logs" / "attempt-0001"
    section["command"][2] = f"while [ ! -e {begun} ]; do sleep 0.1; done; {section['command'][2]}"
    run, _ = start({"0": [5, "freeze"]}, hang_timeout=3, notify={**section, "timeout": 120})
    assert verdict(run)["state"] == "finished" and causes(run) == ["hang", "finished"]
    until(lambda: len(sent(run)) == 3, "not all were notified")
    assert sent(run)[0] == ("hang", "no answer yet; the next job sends it again")
    assert sorted(sent(run)[1:]) == [("finished", "sent"), ("hang", "sent")]
    text = (tmp_path / "mail").read_text()
    assert "<hang>" in text and "no rank sent a heartbeat" in text and f"next: fovea logs {run.path}" in text
    assert "<finished>" in text and "all 8 steps are done" in text and f"next: fovea report {run.path}" in text


def test_a_node_at_fault_is_notified_and_avoided_and_so_is_a_hang_within_a_job(
    slurm: Cluster, start: Start, tmp_path: Path
) -> None:
    acts = {"0": [3, "broken"], "1": [5, "freeze"]}
    run, job = start(acts, "launch.restarts=1", hang_timeout=20, notify=writing(tmp_path / "mail"))
    assert verdict(run)["state"] == "finished" and causes(run) == ["node", "hang", "finished"]
    first, second, third = record.endings(run)
    assert first["job"] == job != second["job"] == third["job"], "the second restart is within the job"
    (bad,) = record.excluded(run)
    assert bad in first["nodes"].replace("[1-2]", "1,n2") and bad not in tools.nodes(second["nodes"])
    until(lambda: len(sent(run)) == 3, "not all were notified")
    assert sent(run) == [("excluded", "sent"), ("hang", "sent"), ("finished", "sent")]
    text = (tmp_path / "mail").read_text()
    assert "a node is excluded: uncorrectable ECC error" in text and f"fovea resume {run.path} --forgive-nodes" in text


def test_a_failure_and_a_spent_budget_name_the_reason(start: Start, tmp_path: Path) -> None:
    section = writing(tmp_path / "mail")
    section["command"][2] += f"; cat {tmp_path}/run/final_state.json >> {tmp_path}/mail"
    run, _ = start({"0": [3, "refuse"]}, notify=section)
    assert verdict(run)["state"] == "failed"
    until(lambda: sent(run) == [("failed", "sent")], "not notified")
    text = (tmp_path / "mail").read_text()
    assert "no such shard" in text and '"state": "failed"' in text, "the state can be read when the notification arrives"
    slow = {"command": ["sleep", "1000"], "timeout": 0.5}
    run, _ = start({"0": [2, "crash"], "1": [3, "crash"]}, folder="b", budgets={"crash": 1}, notify=slow)
    assert "2 attempts ended by crash, 1 are allowed" in verdict(run)["why"]
    until(lambda: sent(run), "not recorded")
    assert sent(run)[0][0] == "budget" and sent(run)[0][1] != "sent"


def test_a_run_that_fails_is_failed_in_mlflow(start: Start, tmp_path: Path) -> None:
    run, uri = RunDirectory(tmp_path / "run"), f"sqlite:///{tmp_path}/mlflow.db"
    journal = Journal(run.journal(0))  # as if its ranks had recorded it, and been killed then
    journal.tags({"fovea.state": "running"})
    journal.close()
    shipper = Shipper(run.tracking, uri=uri, experiment="fovea", name="toy")
    shipper.ship()
    remember(uri)
    start({"0": [3, "refuse"]}, "tracking.enabled=true", f"tracking.uri={uri}", export_env=("XDG_STATE_HOME",))
    assert verdict(run)["state"] == "failed"
    client, number = shipper.connected()

    def state() -> tuple[str, str]:
        one = client.get_run(number)
        return one.info.status, one.data.tags["fovea.why"] if one.info.status == "FAILED" else ""

    until(lambda: state() == ("FAILED", "no such shard"), "MLflow does not know it")


def test_a_command_written_into_the_run_directory_later_is_never_run(start: Start, tmp_path: Path) -> None:
    run, _ = start(steps=40, notify=writing(tmp_path / "mail"))
    reach(run, 1)
    facts, evil = record.job(run), {"command": ["touch", str(tmp_path / "evil")]}
    profile = {**facts["profile"], "notify": {**facts["profile"]["notify"], **evil}}
    run.write("submit/job.json", {**facts, "notify": {**facts["notify"], **evil}, "profile": profile})
    record.request(run, f"{record.STOP}-0", "requeued")  # the job that takes over reads the record again
    assert verdict(run)["state"] == "finished" and len(causes(run)) == 2

    def log() -> str:
        return "".join(path.read_text() for path in (run.path / "logs").glob("batch-*.log"))

    until(lambda: "not those with which this job was submitted" in log(), "the supervisor decided nothing")
    assert not sent(run) and not (tmp_path / "evil").exists()
    until(lambda: not queue(run), "a job is left")
    record.clear(run)
    submit(load(run.path / "config.yaml", []), profiles.again(record.job(run)["profile"]), named=False, index=False)
    assert record.job(run)["notify"] == {}, "nor is it by a job that `fovea resume` submits"
