"""``fovea embed --cluster`` on a real Slurm of two nodes: requeued and killed, it gives the bytes of one process."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.slurm import slurm_commands as tools
from pipeline.config.load import show
from pipeline.data.embeddings.reader import Embeddings
from pipeline.data.pack import synthetic as scenes
from pipeline.methods.registry import build_seeded_method
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.cluster_runs import SITE, causes, fovea, queue, until, verdict
from tests.helpers.embeddings import content
from tests.helpers.evaluation import CPU, changed, toy, write_checkpoint
from tests.helpers.slurm import NEEDS_SLURM, Cluster, cluster

pytestmark = NEEDS_SLURM
MORE = ["--batch-size", "64", "--size", "128"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm") / "c") as made:
        yield made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, and beside it shards of several parts."""
    loaded = toy(tmp_path_factory.mktemp("embed"), "launch.backend=gloo", "tracking.enabled=false", "data.num_workers=0")
    folder = loaded.config.run.folder
    write_checkpoint(folder, changed(build_seeded_method(loaded.config, CPU), 1), config=loaded.config.model_dump(mode="json"))
    (folder / "config.yaml").write_text(show(loaded))
    for name, count in (("a", 4500), ("b", 2100), ("c", 50)):
        scenes.write(folder.parent / name, train=count, val=1, size=16, seed=3, samples_per_shard=count)
    return folder


@pytest.fixture
def words(slurm: Cluster, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a submission, with relative paths."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**SITE, "memory": "500"}))
    return [
        "embed",
        os.path.relpath(run, Path.cwd()),
        f"{run.parent}/[abc]/*train-*.tar",
        *MORE,
        "-c",
        str(tmp_path / "site.yaml"),
    ]


def test_requeued_and_killed_it_gives_the_bytes_of_one_process(words: list[str], tmp_path: Path) -> None:
    out, job = tmp_path / "out", RunDirectory(tmp_path / "out" / "job")
    record.request(job, f"{record.STOP}-0", "requeued")  # as `fovea requeue` writes it: the ranks stop after a batch
    answer = fovea(*words, "--out", str(out))
    assert f"job {record.job(job)['job']}" in answer and str(job.path) in answer
    until(lambda: causes(job)[:1] not in ([], ["None"]), "the first attempt does not end")
    assert causes(job)[0] == "requeued", record.endings(job)
    pulse = job.logs(1) / "pulse" / "rank-1.json"
    until(lambda: record.read(pulse).get("pid"), "the second attempt does not begin")
    os.kill(int(record.read(pulse)["pid"]), signal.SIGKILL)
    assert verdict(job)["state"] == "finished", causes(job)
    assert causes(job)[0] == "requeued" and causes(job)[-1] == "finished" and len(causes(job)) == 3
    until(lambda: not queue(job), "a finished job is in the queue")
    fovea(*words[:-2], "--out", str(tmp_path / "plain"))
    assert content(out) == content(tmp_path / "plain")
    assert Embeddings.open(out).document.counts["embedded"] == 6650
    status = fovea("status", str(job.path))
    assert "finished" in status and "Traceback" not in status
    assert "is complete already" in fovea(*words, "--out", str(out), code=2)
    assert "is a job of `fovea embed`" in fovea("resume", str(job.path), code=2)
    _overwritten_only_where_no_job_is(words, out, job)


def _overwritten_only_where_no_job_is(words: list[str], out: Path, job: RunDirectory) -> None:
    fovea(*words, "--out", str(out), "--overwrite", "cluster.options=[--hold]")
    assert "of this run is" in fovea(*words, "--out", str(out), code=2)
    assert not (out / "embeddings.json").exists()
    (out / "embeddings.json").write_text("of the job")
    assert "of this run is" in fovea(*words, "--out", str(out), "--overwrite", code=2)
    assert (out / "embeddings.json").read_text() == "of the job"
    tools.call("scancel", str(record.job(job)["job"]))


def test_an_error_of_the_ranks_ends_the_job_with_its_message(words: list[str], run: Path, tmp_path: Path) -> None:
    out, job = tmp_path / "out", RunDirectory(tmp_path / "out" / "job")
    copy = tmp_path / "copied"
    shutil.copytree(run.parent / "c", copy)
    index = [word.replace(f"{run.parent}/[abc]", str(copy)) for word in words]
    fovea(*index, "--out", str(out), "cluster.options=[--hold]")
    number = int(record.job(job)["job"])
    shard = next(copy.glob("*train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:3000])
    tools.call("scontrol", "release", str(number))
    final = verdict(job)
    assert final["state"] == "failed" and shard.name in final["why"], final
    assert not (out / "embeddings.json").exists()


def test_what_can_never_run_is_refused(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nodes 3 exceeds 2" in fovea(*words, "--out", str(out), "cluster.nodes=3", code=2)
    assert "is on a disk of one machine only" in fovea(*words, "--out", str(out), f"cluster.local_paths=[{tmp_path}]", code=2)
    assert not (out / "job" / "submit" / "job.json").exists() or not record.job(RunDirectory(out / "job")).get("job")
