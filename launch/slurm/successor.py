"""The job that takes over when a run's job ends: submitted, found and cancelled. Standard library only.

A run comes back by a second job, not by requeueing its own. When an attempt begins, its supervisor submits the same batch script
with ``--dependency=afterany:JOB``; the successor costs no allocation while it waits. Compared with ``scontrol requeue``:

- It is eligible at once when the job ends. Slurm sets a requeued job's begin time to ``cred_expire`` (120 s) after the end of its
  batch step, when nothing of the job is left that could change it.
- It takes over however the job ends: supervisor killed, batch log on a full disk, time limit passed with hung processes.
- The job's number changes, and two entries of the queue belong to a run.

The job is still submitted with ``--requeue``. Where a person requeues it (``scontrol requeue``), it comes back itself, held if
requested, and its supervisor cancels the successor, which would otherwise take over if that job were cancelled. Where Slurm
requeues it (preemption by requeue, a lost node), the supervisor, if it still runs, cancels its own job instead, so that the
successor is eligible at once. Where no second job may be submitted (a limit of jobs per user), the supervisor logs that, tries
again at the end of the attempt, and then requeues the job itself. ``requeue_mode: requeue`` never submits a successor.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.slurm import slurm_commands as tools
from launch.slurm.slurm_commands import Job
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory

_SINGLETON = "--dependency=singleton"  # of a sweep: no two jobs of one name at the same time


def waiting(run: RunDirectory, job: int, *, limit: float = 60.0) -> list[Job]:
    """Successors of a job in the queue: normally one.

    Raises:
        LaunchError: Slurm does not answer.
    """
    depends = f":{job}("
    jobs = tools.jobs_of(record.script(run), limit=limit)
    return [one for one in jobs if one.state == "PENDING" and depends in one.dependency]


def ensure(run: RunDirectory, job: int, exclude: Sequence[str] = (), delay: float = 0.0) -> int:
    """Submit the successor of a job, unless it is in the queue; returns its job ID.

    Args:
        run: the run directory.
        job: the job that it waits for.
        exclude: nodes to avoid.
        delay: seconds from now before which it may not start.

    Raises:
        LaunchError: Slurm refuses it, or does not answer.
    """
    nodes, begin = ",".join(exclude), f"now+{delay:.0f}"
    present = waiting(run, job)
    if not present:
        alone = ",singleton" if _SINGLETON in (record.job(run).get("profile") or {}).get("options", ()) else ""
        options = [f"--dependency=afterany:{job}{alone}", *([f"--exclude={nodes}"] if nodes else [])]
        return tools.submit(record.script(run), *options, *([f"--begin={begin}"] if delay else []))
    for surplus in present[1:]:
        tools.cancel(surplus.id)
    changes = [*([f"ExcNodeList={nodes}"] if nodes else []), *([f"StartTime={begin}"] if delay else [])]
    if changes:
        tools.call("scontrol", "update", f"JobId={present[0].id}", *changes)
    return present[0].id


def cancel(run: RunDirectory, job: int, *, limit: float = 60.0) -> list[int]:
    """Cancel the successors of a job; returns their job IDs.

    Raises:
        LaunchError: Slurm does not answer.
    """
    cancelled = []
    for one in waiting(run, job, limit=limit):
        tools.cancel(one.id, limit=limit)
        cancelled.append(one.id)
    return cancelled
