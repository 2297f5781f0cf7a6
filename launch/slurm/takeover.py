"""What a job finds of its run when it begins: other jobs, the end of its predecessor, attempts that were cut off.

Standard library only.
"""

from __future__ import annotations

from typing import Any

from launch.slurm import job_end
from launch.slurm import slurm_commands as tools
from launch.slurm.decide import AttemptResult, classify
from pipeline.errors import LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory

_CUT_OFF = {
    "TIMEOUT": ("time limit", "ended by Slurm at the time limit, before its supervisor could record its end"),
    "DEADLINE": ("time limit", "ended by Slurm at its deadline, before its supervisor could record its end"),
    "PREEMPTED": ("preempted", "ended by a preemption before its supervisor could record its end"),
    "CANCELLED": ("cancelled", "the job was cancelled (scancel) and ended before its supervisor could record it"),
    "NODE_FAIL": ("node", "its first node failed"),
    "BOOT_FAIL": ("node", "its first node failed"),
    "FAILED": ("supervisor", "its supervisor was killed, or failed (see the batch log)"),
    "OUT_OF_MEMORY": ("supervisor", "its supervisor was killed: out of memory"),
    "COMPLETED": ("supervisor", "its supervisor ended without a record (is a disk full?)"),
}


def rival(run: RunDirectory, job: int) -> int | None:
    """The job that attends the run instead of this one, if there is one; of two that begin at once, the lower number.

    Args:
        run: the run directory.
        job: this job.
    """
    held = record.read(run.path / "live.json").get("job")
    ids = [held] if type(held) is int else []
    try:
        jobs = tools.jobs_of(record.script(run), *ids)
    except LaunchError:
        return None
    running = [one.id for one in jobs if one.id != job and one.state in tools.RUNNING - {"COMPLETING"}]
    first = [number for number in running if number == held or number < job]
    return first[0] if first else None


def cancelled_predecessor(run: RunDirectory, job: int) -> int | None:
    """The job after which this one waited, if it was cancelled by a person: then the run was meant to end.

    Slurm knows for ``MinJobAge`` seconds (300 by default) after its end, the accounting longer. ``None`` where it is not
    known, for a job that a user has submitted, and where the supervisor cancelled its job to let this one go on.
    """
    before = _last_job(run)
    if before is None or before == job or record.job(run).get("job") == job or record.handed_over(run) == before:
        return None
    return before if job_end.of_ended(before) == "CANCELLED" else None


def close_dangling(run: RunDirectory) -> bool:
    """Record the end of attempts that were cut off, since their supervisor could not; returns whether there were any.

    Raises:
        OSError: the run directory cannot be written.
    """
    closed = False
    for row in record.endings(run):
        if "ended_at" not in row and "started_at" in row and "job" in row:
            number, after = int(row["attempt"]), record.saved_step(run)
            cause, why = _cut_off(run, row)
            t = round(record.last_sign(run, row), 3)  # the time since then was spent in the queue
            run.note("end", t=t, attempt=number, code=-1, cause=cause, why=why, after=after, action="requeue")
            closed = True
    return closed


def _cut_off(run: RunDirectory, row: dict[str, Any]) -> tuple[str, str]:
    number = int(row["attempt"])
    request = record.pending_request(run, f"{record.STOP}-{number}") or {}
    outcome = record.outcome(run, number)
    by_itself = outcome is not None and outcome.get("stop") in ("FINISHED", "USER_REQUEST")
    if not by_itself and (known := _CUT_OFF.get(job_end.of_ended(int(row["job"])))):
        return known if outcome is None else (known[0], f"{known[1]}; saved at step {outcome.get('step')}")
    if outcome is not None:
        return classify(AttemptResult(outcome=outcome, stop_reason=str(request.get("reason", ""))))
    if request.get("reason"):
        return str(request["reason"]), "cut off while it was stopping"
    return "node", "cut off: its first node failed, or the job was killed"


def _last_job(run: RunDirectory) -> int | None:
    rows = [row for row in record.endings(run) if type(row.get("job")) is int]
    return int(rows[-1]["job"]) if rows else None
