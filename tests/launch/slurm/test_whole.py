"""The promise in one test: a real Slurm of two nodes, a real S3 server, a real MLflow server, and everything goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm import status
from pipeline.data.pack import synthetic as scenes
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.cluster_runs import queue, supervisor_of, until, verdict
from tests.helpers.mlflow_server import MlflowServer
from tests.helpers.runs import ROOT, TOY, environment, recorded, train, weights
from tests.helpers.s3 import KEYS, upload
from tests.helpers.slurm import NEEDS_SLURM, Cluster, cluster

pytestmark = NEEDS_SLURM
STEPS = 240
SITE: dict[str, Any] = {
    **{
        "nodes": 2,
        "gpus_per_node": 0,
        "ranks_per_node": 1,
        "cpus_per_rank": 1,
        "memory": "100",
        "time": "30",
        "checkpoint_lead_time": 60,
    },
    **{"exclusive": False, "host_python": sys.executable, "local_paths": [], "preflight": {"disk_gb": 0.01}},
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    partitions = [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30",
        "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
    ]
    extra = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "KillWait": "30"}
    with cluster(tmp_path_factory.mktemp("slurm") / "c", extra=extra, partitions=partitions) as made:
        yield made


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "mlflow")
    server.start()
    yield server
    server.stop()


def _reach(run: RunDirectory, step: int, seconds: float = 2400) -> int:
    """Waits until any attempt is at a step; which attempt."""
    end = time.monotonic() + seconds
    while True:
        attempt = run.next_attempt() - 1
        if int(record.read(run.logs(attempt) / "train_seconds.json").get("step", -1)) >= step:
            return attempt
        logs = "\n".join(path.read_text()[-1500:] for path in sorted((run.path / "logs").rglob("*.log")))
        assert time.monotonic() < end and not record.final_state(run), f"step {step} was not reached\n{logs}"
        time.sleep(0.1)


def _next(run: RunDirectory, attempt: int, seconds: float = 2400) -> None:
    """Waits until the attempt after this one trains."""
    end = time.monotonic() + seconds
    while run.next_attempt() - 1 <= attempt or not (run.logs(attempt + 1) / "train_seconds.json").exists():
        assert time.monotonic() < end and not record.final_state(run), (
            record.final_state(run) or "the next attempt does not train"
        )
        time.sleep(0.2)


def _job(run: RunDirectory) -> int:
    """The job that trains now."""
    return int(record.read(run.path / "live.json")["job"])


def _ranks(run: RunDirectory) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"launch.cli.main" in words and str(run.path / "config.yaml").encode() in words and b"srun" not in words[0]:
                found.append(int(entry.name))
    return found


def test_submitted_once_interrupted_by_everything_it_ends_as_if_nothing_had_happened(
    slurm: Cluster, mlflow: MlflowServer, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", slurm.environment["PATH"])
    scenes.write(tmp_path / "scenes", train=320, val=24, size=32, seed=3, samples_per_shard=40)
    upload(s3_port, "cluster", {path.name: path for path in (tmp_path / "scenes").glob("*.tar")})
    config, profile = tmp_path / "toy.yaml", tmp_path / "site.yaml"
    config.write_text(TOY)
    profile.write_text(yaml.safe_dump(SITE))
    same = [f"train.duration={STEPS} steps"]
    reference = tmp_path / "reference"
    done = train(config, f"{tmp_path}/scenes/*train-*.tar", reference, *same)
    assert done.returncode == 0, done.stderr

    run = RunDirectory(tmp_path / "run")
    words = [sys.executable, "-m", "launch.cli.main", "submit", str(config), "--cluster", str(profile), *same]
    words += ["data.shards=s3://cluster/*train-*.tar", f"data.storage.endpoint=http://127.0.0.1:{s3_port}"]
    words += [f"data.storage.cache={tmp_path / 'cache'}", f"data.index={tmp_path / 'index'}", f"run.directory={run.path}"]
    words += ["tracking.enabled=true", f"tracking.uri={mlflow.uri}", "checkpoint.every=10 steps"]
    keys = {**environment(), **slurm.environment, **KEYS, "OMP_NUM_THREADS": "1"}
    submitted = subprocess.run(words, env=keys, cwd=ROOT, capture_output=True, text=True, check=False)
    assert submitted.returncode == 0, submitted.stderr

    attempt = _reach(run, 5)  # the warning that Slurm sends before a time limit
    slurm.call("scancel", "--batch", "-s", "USR2", str(_job(run)))
    _next(run, attempt)
    mlflow.stop()  # from here on the tracking server is away
    attempt = _reach(run, 60)  # a rank is killed
    os.kill(_ranks(run)[0], signal.SIGKILL)
    _next(run, attempt)
    attempt = _reach(run, 110)  # the administrator requeues
    slurm.call("scontrol", "requeue", str(_job(run)))
    _next(run, attempt)
    _reach(run, 140)  # an urgent job takes the nodes
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\n#SBATCH --partition=urgent --nodes=2 --exclusive --output=/dev/null\nsleep 2\n")
    attempt = run.next_attempt() - 1
    slurm.call("sbatch", str(urgent))
    _next(run, attempt)
    attempt = _reach(run, 170)  # the supervisor is killed, its ranks with it
    os.kill(supervisor_of(run), signal.SIGKILL)
    _next(run, attempt)
    _reach(run, 200)  # a person cancels the job and, as only a person can, resumes the run
    slurm.call("scancel", str(_job(run)))
    assert "cancelled (scancel)" in verdict(run)["why"]
    until(lambda: not queue(run), "a job of a cancelled run is left in the queue")
    mlflow.start()
    words = [sys.executable, "-m", "launch.cli.main", "resume", str(run.path)]
    resumed = subprocess.run(words, env=keys, cwd=ROOT, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    end = time.monotonic() + 300
    while not (over := record.final_state(run)):
        assert time.monotonic() < end, "\n".join(path.read_text()[-2000:] for path in (run.path / "logs").glob("batch-*"))
        time.sleep(0.5)
    assert over["state"] == "finished", over
    assert slurm.wait(_job(run), "COMPLETED", "FAILED") == "COMPLETED"
    until(lambda: not queue(run), "a job of a finished run is left in the queue")

    for rank in (0, 1):
        ours, theirs = recorded(run.path, rank), recorded(reference, rank)
        assert sorted(ours) == list(range(STEPS))
        assert ours == theirs, f"rank {rank} saw or computed something else"
    assert weights(run.path, STEPS) == weights(reference, STEPS)

    causes = [row["cause"] for row in record.endings(run)]
    assert causes == ["signal", "crash", "requeued", "preempted", "supervisor", "cancelled", "finished"], causes
    good = status.goodput(run)
    assert 0 < good.share < 1 and good.lost > 0 and good.waiting > 0
    print(status.table(status.status(run)))
    _everything_is_in_mlflow(mlflow, run, tmp_path)


def _everything_is_in_mlflow(mlflow: MlflowServer, run: RunDirectory, folder: Path) -> None:
    words = [sys.executable, "-m", "launch.cli.main", "mlflow", "sync", str(run.path)]
    done = subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow.uri)
    (experiment,) = [one for one in client.search_experiments() if one.name == "fovea"]
    (one,) = client.search_runs([experiment.experiment_id])
    steps = {point.step for point in client.get_metric_history(one.info.run_id, "train/loss")}
    assert steps == set(range(1, STEPS + 1)), "a point is missing"
    assert one.data.tags["fovea.state"] == "finished"
