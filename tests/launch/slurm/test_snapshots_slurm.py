"""On a real Slurm: a rank is killed, a node is lost, and the ranks continue in the same job from snapshots in host memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import host_memory
from pipeline.data.pack import synthetic as scenes
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.cluster_runs import SITE, causes, reach, verdict
from tests.helpers.runs import ROOT, TOY, environment, recorded, train, weights
from tests.helpers.slurm import NEEDS_SLURM, Cluster, cluster

pytestmark = NEEDS_SLURM
STEPS = 150
LENGTH = (f"train.duration={STEPS} steps", "checkpoint.every=120 steps")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "c", nodes=3) as made:
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two ranks, beside its config and shards."""
    folder = tmp_path_factory.mktemp("reference")
    scenes.write(folder / "scenes", train=120, val=24, size=32, seed=3, samples_per_shard=40)
    (folder / "toy.yaml").write_text(TOY)
    done = train(folder / "toy.yaml", f"{folder}/scenes/*train-*.tar", folder / "run", *LENGTH)
    assert done.returncode == 0, done.stderr
    return folder


def submit(slurm: Cluster, reference: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **site: Any) -> RunDirectory:
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environment[name])
    profile, run = folder / "site.yaml", RunDirectory(folder / "run")
    profile.write_text(yaml.safe_dump({**SITE, "local_paths": [], "memory": "200", **site}))
    words = [sys.executable, "-m", "launch.cli.main", "submit", str(reference / "toy.yaml"), "--cluster", str(profile), *LENGTH]
    words += [f"data.shards={reference}/scenes/*train-*.tar", f"data.index={folder / 'index'}", f"run.directory={run.path}"]
    words += ["launch.restarts=3", "checkpoint.snapshot_every=2 steps"]
    keys = {**environment(), **slurm.environment, "OMP_NUM_THREADS": "1"}
    submitted = subprocess.run(words, env=keys, cwd=ROOT, capture_output=True, text=True, check=False)
    assert submitted.returncode == 0, submitted.stderr
    return run


def kill_rank(run: RunDirectory, attempt: int, rank: int) -> None:
    os.kill(int(record.read(run.logs(attempt) / "pulse" / f"rank-{rank}.json")["pid"]), signal.SIGKILL)


def resumed(run: RunDirectory, attempt: int) -> int:
    found = re.findall(r"resuming at step (\d+)", (run.logs(attempt) / "rank-0.log").read_text())
    return int(found[0])


def assert_undisturbed(run: RunDirectory, reference: Path) -> None:
    assert len({row["job"] for row in record.endings(run)}) == 1, "the job was left"
    assert not list(Path("/dev/shm").glob(f"{host_memory.path_of(run.path).name}*")), "snapshots are left in host memory"
    for rank in (0, 1):
        assert recorded(run.path, rank) == recorded(reference / "run", rank)
    assert weights(run.path, STEPS) == weights(reference / "run", STEPS)


def test_a_killed_rank_is_replaced_in_its_job_from_a_snapshot(
    slurm: Cluster, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submit(slurm, reference, tmp_path, monkeypatch, nodes=1, ranks_per_node=2)
    reach(run, 12)
    kill_rank(run, 0, 1)
    assert verdict(run)["state"] == "finished"
    assert causes(run) == ["crash", "finished"]
    assert 8 <= resumed(run, 1) < 120, "not from a snapshot"
    assert_undisturbed(run, reference)


def test_a_lost_node_is_replaced_by_one_that_stands_by_and_gets_the_snapshot_from_the_others(
    slurm: Cluster, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a rank is killed; the snapshot of the lost node's rank is then only in the memory of the other node."""
    run = submit(slurm, reference, tmp_path, monkeypatch, nodes=2, ranks_per_node=1, spare_nodes=1)
    reach(run, 12)
    kill_rank(run, 0, 1)
    reach(run, 40, attempt=1)
    slurm.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        assert verdict(run)["state"] == "finished"
    finally:
        slurm.call("scontrol", "update", "nodename=n2", "state=resume", check=False)
        shutil.rmtree(host_memory.path_of(run.path, "n2"), ignore_errors=True)  # of the lost node, which kills its processes
    log = "".join(path.read_text() for path in (run.path / "logs").glob("batch-*.log"))
    assert "n3 takes the place of n2" in log, log
    assert causes(run)[-1] == "finished" and len(causes(run)) == 3
    assert 8 <= resumed(run, 1) < 40 <= resumed(run, 2) + 6 < 120, "not from a snapshot"
    assert_undisturbed(run, reference)
