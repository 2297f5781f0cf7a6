"""Runs on a real Slurm whose ranks train nothing: submitted, watched, and looked up in the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import render
from launch.slurm import slurm_commands as tools
from launch.slurm.profile import ClusterProfile
from launch.slurm.submit import submit
from pipeline.config.load import load
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from tests.helpers.limits import deadline
from tests.helpers.runs import ROOT, TOY
from tests.helpers.slurm import OTHER, Cluster

RANK = Path(__file__).with_name("cluster_rank.py")
SITE: dict[str, Any] = {
    "nodes": 2,
    "gpus_per_node": 0,
    "cpus_per_rank": 1,
    "memory": "50",
    "time": "30",
    "checkpoint_lead_time": 60,
    "exclusive": False,
    "host_python": sys.executable,
    "local_paths": (),
    "preflight": {"disk_gb": 0.01},
    "setup": [f"export PATH={OTHER}/bin:$PATH"] if OTHER else [],
}


Start = Callable[..., tuple[RunDirectory, int]]


def starter(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """A function that submits a run whose ranks follow a plan; it returns the run and its job."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    real = render.step

    def begin(
        acts: dict[str, Any] | None = None,
        *settings: str,
        steps: int = 8,
        seconds: float = 0.15,
        folder: str = "run",
        **profile: Any,
    ) -> tuple[RunDirectory, int]:
        config = tmp_path / "toy.yaml"
        config.write_text(TOY)
        run = RunDirectory(tmp_path / folder)
        plan = {"steps": steps, "seconds": seconds, "every": 4, "acts": acts or {}}
        words = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=5", "--unbuffered"]
        words += ["--open-mode=append", "--output=%LOGS%/rank-%t.log"]

        def step(profile: ClusterProfile, run: Path, module: list[str] | None = None, *log: str) -> list[str]:
            return real(profile, run, module, *log) if module else [*words, sys.executable, str(RANK), str(run), json.dumps(plan)]

        monkeypatch.setattr("launch.slurm.render.step", step)
        loaded = load(config, ["data.shards=/nowhere/x.tar", f"run.directory={run.path}", *settings])
        profile["setup"] = (*SITE["setup"], *profile.get("setup", ()))
        done = submit(loaded, ClusterProfile(**{**SITE, **profile}), index=False)
        assert done.job is not None
        return run, done.job

    return begin


def verdict(run: RunDirectory, seconds: float = 900) -> dict[str, Any]:
    """Waits for the final state of a run."""
    end = time.monotonic() + seconds
    while not (found := record.final_state(run)):
        assert time.monotonic() < end, f"no verdict: {[path.read_text() for path in (run.path / 'logs').glob('batch-*')]}"
        time.sleep(0.2)
    return found


def reach(run: RunDirectory, step: int, attempt: int = 0, seconds: float = 600) -> None:
    """Waits until an attempt is at a step."""
    end = time.monotonic() + seconds
    while int(record.read(run.logs(attempt) / "pulse" / "rank-0.json").get("step", -1)) < step:
        assert time.monotonic() < end, f"attempt {attempt} did not reach step {step}"
        time.sleep(0.05)


def causes(run: RunDirectory) -> list[str]:
    """Why each attempt ended."""
    return [str(row.get("cause")) for row in record.endings(run)]


def queue(run: RunDirectory) -> list[tuple[int, str]]:
    """Number and state of the run's jobs in Slurm's queue, as ``squeue`` shows them."""
    return [(job.id, job.state) for job in tools.jobs_of(record.script(run))]


def start_now(slurm: Cluster, job: int) -> None:
    """Spares a test the two minutes that a requeued job waits.

    Not in the same second: a node would take the new credential for the one that was revoked when the job was requeued.
    """
    time.sleep(2.1)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")


def until(condition: Callable[[], object], what: str) -> None:
    """Waits until a condition holds."""
    end = deadline()
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


def processes(*words: str) -> list[int]:
    """Processes whose command line contains all of these arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if all(word in argv for word in words):
                found.append(int(entry.name))
    return found


def supervisor_of(run: RunDirectory) -> int:
    """Process of the run's supervisor."""
    return processes("launch.slurm.supervisor", str(run.path))[0]


def ranks_of(run: RunDirectory) -> list[int]:
    """Processes of the run's ranks, without those of ``srun``."""
    return [pid for pid in processes(str(RANK), str(run.path)) if "srun" not in Path(f"/proc/{pid}/comm").read_text()]


def fovea(*words: str, code: int = 0, **variables: str) -> str:
    """Output of a command of fovea, which must end with a code."""
    command = [sys.executable, "-m", "launch.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, **variables})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr
