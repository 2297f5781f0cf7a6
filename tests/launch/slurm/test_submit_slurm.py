"""Submissions to a real Slurm: what can never run, refusals that leave nothing, and two at the same time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm import slurm_commands as tools
from pipeline.data.pack import synthetic as scenes
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.cluster_runs import SITE, fovea, queue, until
from tests.helpers.runs import ROOT, TOY
from tests.helpers.slurm import NEEDS_SLURM, Cluster, cluster

pytestmark = NEEDS_SLURM


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    partitions = [
        "PartitionName=main Nodes=ALL Default=YES MaxTime=2:00:00 State=UP",
        "PartitionName=single Nodes=n1 MaxTime=INFINITE State=UP",
    ]
    with cluster(tmp_path_factory.mktemp("slurm") / "c", partitions=partitions) as made:
        yield made


@pytest.fixture
def words(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a submission whose job stays pending."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "toy.yaml").write_text(TOY)
    site: dict[str, Any] = {**SITE, "local_paths": [], "options": ["--hold"]}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    arguments = ["submit", str(tmp_path / "toy.yaml"), "--cluster", str(tmp_path / "site.yaml"), "--no-index"]
    return [*arguments, "data.shards=/nowhere/x.tar", f"run.directory={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("cluster.nodes=3", "nodes 3 exceeds 2"),
        ("cluster.time=3:00:00", "time 3:00:00 exceeds the limit of 2:00:00"),
        ("cluster.cpus_per_rank=9", "9 CPUs per node are available on 0 of 2 nodes"),
        ("cluster.gpus_per_node=1", "1 GPUs per node are available on 0 of 2 nodes"),
        ("cluster.partition=single", "nodes 2 exceeds 1"),
        ("cluster.partition=nowhere", "Choose one of main, single"),
        ("cluster.constraint=a100", "Invalid feature specification"),
    ],
)
def test_what_can_never_run_is_refused_and_leaves_no_run(words: list[str], tmp_path: Path, override: str, text: str) -> None:
    extra = ["train.global_batch_size=12"] if override == "cluster.nodes=3" else []
    answer = fovea(*words, override, *extra, code=2)
    assert text in answer and "Traceback" not in answer
    assert "partition" in answer and not (tmp_path / "run").exists()


def test_a_run_directory_with_a_blank_has_its_log_and_its_jobs(slurm: Cluster, words: list[str], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "my runs" / "run 1")
    fovea(*words, f"run.directory={run.path}")
    ((job, state),) = queue(run)
    assert state == "PENDING" and f"StdOut={run.path}/logs/batch-{job}.log\n" in slurm.call("scontrol", "show", "job", str(job))
    slurm.call("scontrol", "release", str(job))
    log = run.path / "logs" / f"batch-{job}.log"
    until(lambda: log.exists() and "takes over when this one ends" in log.read_text(), "the supervisor has not begun")
    assert len(queue(run)) == 2
    fovea("cancel", str(run.path))
    until(lambda: not queue(run), "a cancelled run is in the queue")


def test_a_refused_submission_of_an_old_run_keeps_it(words: list[str], tmp_path: Path) -> None:
    fovea(*words)
    fovea("cancel", str(tmp_path / "run"))
    fovea(*words, "cluster.nodes=1", "cluster.constraint=a100", code=2)
    assert (tmp_path / "run" / "config.json").exists()


def test_of_two_submissions_at_once_one_job_is_left(slurm: Cluster, words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli.main", *words]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    answers = [process.communicate()[0] for process in both]
    run = RunDirectory(tmp_path / "run")
    assert sorted(process.returncode for process in both) == [0, 2], answers
    refused = next(text for text, process in zip(answers, both, strict=True) if process.returncode)
    assert any(said in refused for said in ("is submitting this run", "of this run is pending", "at the same time")), refused
    assert queue(run) == [(record.job(run)["job"], "PENDING")]
    fovea("cancel", str(run.path))
    until(lambda: not queue(run), "a cancelled run is in the queue")
    assert record.final_state(run)["state"] == "stopped"


def test_an_excluded_node_is_avoided_unless_too_few_are_left_and_is_forgiven(words: list[str], tmp_path: Path) -> None:
    scenes.write(tmp_path / "data", train=40, val=8, size=32, samples_per_shard=20)  # resuming indexes the shards
    words = [*words, f"data.shards={tmp_path}/data/*train-*.tar"]
    run = RunDirectory(tmp_path / "run")
    record.exclude(run, {"n2": "its clock is 300 s away"})

    def excluded() -> str:
        nodes = tools.facts(int(record.job(run)["job"]))["ExcNodeList"]
        fovea("cancel", str(run.path))
        return nodes

    fovea(*words, "cluster.nodes=1")
    assert "excluded: n2: its clock is 300 s away (until" in fovea("status", str(run.path))
    assert excluded() == "n2"
    assert "too few nodes would be left: n2" in fovea("resume", str(run.path), "cluster.nodes=2")
    assert excluded() == "(null)"
    assert "forgiven: n2" in fovea("resume", str(run.path), "cluster.nodes=1", "--forgive-nodes")
    assert excluded() == "(null)" and "excluded" not in fovea("status", str(run.path))


def test_doctor_compares_a_profile_with_its_partition(words: list[str], tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    assert "the profile fits partition main: 2 nodes" in fovea_any("doctor", "-c", str(site))
    profile = {**yaml.safe_load(site.read_text()), "gpus_per_node": 8, "time": "3:00:00"}
    site.write_text(yaml.safe_dump(profile))
    said = fovea_any("doctor", "-c", str(site))
    assert "8 GPUs per node are available on 0 of 2 nodes" in said and "time 3:00:00 exceeds the limit of 2:00:00" in said


def fovea_any(*arguments: str) -> str:
    """Output of a command, whatever its exit code: what else this host lacks is not the matter."""
    command = [sys.executable, "-m", "launch.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
