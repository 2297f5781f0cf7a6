"""``fovea sweep`` on a real Slurm, with ranks that train nothing: a limit of jobs, a killed command, requeues, halving."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli.slurm import requeue
from launch.cli.sweep_run import Order, overview, train
from launch.slurm import render
from launch.slurm import slurm_commands as tools
from launch.slurm import submit as submission
from launch.slurm.profile import ClusterProfile
from launch.sweep.state import find
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record
from tests.helpers.cluster_runs import RANK, SITE, fovea, queue, until
from tests.helpers.runs import TOY
from tests.helpers.slurm import NEEDS_SLURM, Cluster, cluster

pytestmark = NEEDS_SLURM
Sweeping = Callable[..., int | None]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "c") as made:
        yield made


@pytest.fixture
def sweeping(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeping:
    """A function that runs ``fovea sweep`` with four members of one node each."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("launch.cli.sweep_run._POLL", 0.2)
    real = render.step
    (tmp_path / "toy.yaml").write_text(TOY + "evaluation: {knn: {enabled: true, k: [10]}}\n")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**SITE, "nodes": 1, "local_paths": [], "host_python": sys.executable}))
    words = ["srun", "--nodes=1", "--ntasks=1", "--kill-on-bad-exit=1", "--wait=5", "--unbuffered", "--open-mode=append"]

    def sweep(
        *settings: str, steps: int = 12, seconds: float = 0.1, scores: dict[str, float] | None = None, **options: Any
    ) -> int:
        plan = {"steps": steps, "seconds": seconds, "every": 4, "scores": scores or {}}

        def step(profile: ClusterProfile, run: Path, module: list[str] | None = None) -> list[str]:
            command = [*words, "--output=%LOGS%/rank-%t.log", sys.executable, str(RANK), str(run), json.dumps(plan)]
            return real(profile, run, module) if module else command

        monkeypatch.setattr("launch.slurm.render.step", step)
        usual: dict[str, Any] = {"name": "", "list": None, "max_jobs": None, "halving": "", "eta": 2, "drop_failed": False}
        fields = {**usual, "index": False, "wait": False, **options}
        texts = ("data.shards=/nowhere/x.tar", "tracking.enabled=false", *settings)
        site = str(tmp_path / "site.yaml")
        return train(Order(str(tmp_path / "toy.yaml"), texts, directory=tmp_path / "s", cluster=site, **fields))

    return sweep


def running(path: Path) -> list[int]:
    """Members whose jobs run."""
    sweep = find(str(path))
    return [n for n in sweep.numbers if any(state == "RUNNING" for _, state in queue(sweep.run(n)))]


def test_at_most_so_many_members_run_and_a_killed_command_continues(
    sweeping: Sweeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, calls = submission.submit, []

    def killed_in_the_third(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(submission, "submit", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        sweeping("run.seed=range(4)", steps=40, seconds=0.5, max_jobs=2)
    monkeypatch.setattr(submission, "submit", real)
    assert sweeping("run.seed=range(4)", steps=40, seconds=0.5, max_jobs=2) == 0
    out = capfd.readouterr().out
    assert "2 members submitted, 2 in the queue already, 0 done" in out
    sweep, most, requeued = find(str(tmp_path / "s")), 0, False

    def over() -> bool:
        nonlocal most, requeued
        here = running(sweep.path)
        most = max(most, len(here))
        if not requeued and 0 in here and len(queue(sweep.run(0))) == 2 and record.saved_step(sweep.run(0)) > 0:
            waiting = [job for job in tools.jobs_of(record.script(sweep.run(0))) if job.state == "PENDING"]
            assert "singleton" in waiting[0].dependency and "afterany" in waiting[0].dependency
            requeue(str(sweep.run(0).path))
            requeued = True
        return all(record.final_state(sweep.run(n)) for n in sweep.numbers)

    until(over, "the members do not end")
    assert requeued and most == 2
    assert [record.final_state(sweep.run(n))["state"] for n in sweep.numbers] == ["finished"] * 4
    assert len(record.endings(sweep.run(0))) == 2, "it came back after the next of its chain"
    assert sweeping("run.seed=range(4)", steps=40, seconds=0.5, max_jobs=2, wait=True) == 0
    assert "0 members submitted, 0 in the queue already, 4 done" in capfd.readouterr().out


def test_stop_cancels_what_waits_and_the_same_command_continues(
    sweeping: Sweeping, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweeping("run.seed=range(2)", steps=5000, max_jobs=1) == 0
    sweep = find(str(tmp_path / "s"))
    until(lambda: running(sweep.path) and record.saved_step(sweep.run(0)) > 0, "no member runs")
    assert "1 running, 1 waiting" in overview(sweep)
    assert "starts no further members" in fovea("sweep", "stop", str(sweep.path))
    until(lambda: all(not queue(sweep.run(n)) for n in sweep.numbers), "jobs are left")
    assert {record.final_state(sweep.run(n))["state"] for n in sweep.numbers} == {"stopped"}
    assert sweeping("run.seed=range(2)", steps=12, max_jobs=1, wait=True) == 0
    assert all(record.final_state(sweep.run(n))["state"] == "finished" for n in sweep.numbers)


def test_halving_waits_for_all_and_lets_the_best_go_on(
    sweeping: Sweeping, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scores = {"000": 0.1, "001": 0.4, "002": 0.3, "003": 0.2}
    settings = ("run.seed=range(4)", "train.duration='12 steps'")
    assert sweeping(*settings, scores=scores, halving="knn/k10", wait=True) == 0
    sweep = find(str(tmp_path / "s"))
    first, second = sweep.comparisons()
    assert (first.steps, first.continued) == ({str(n): 3 for n in range(4)}, (1, 2))
    assert (second.steps, second.continued) == ({"1": 6, "2": 6}, (1,))
    states = [record.final_state(sweep.run(n))["why"] for n in range(4)]
    assert states == ["stopped by request at step 3", "all 12 steps are done", "stopped by request at step 6", states[0]]
    assert "3 halved, 1 finished" in overview(sweep) and "halved" in capfd.readouterr().out


def test_a_refused_member_is_named(sweeping: Sweeping) -> None:
    with pytest.raises(LaunchError, match=r"can never run.*member 000; 0 were submitted before it"):
        sweeping("run.seed=range(2)", "cluster.time=30", "cluster.cpus_per_rank=99")
