"""Status of a run: queue, heartbeat, attempts, and goodput."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.slurm.forecast import Forecast, forecast, pauses
from launch.slurm.goodput import Goodput, goodput
from launch.slurm.job_end import of_ended
from launch.slurm.profile import seconds
from launch.slurm.slurm_commands import Job, user_jobs
from launch.slurm.submit import living
from launch.slurm.training_state import Cost, TrainingState, cost, training_state
from pipeline.errors import ConfigError, LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.clock import clock
from pipeline.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class Status:
    """Status of one run, as shown by ``fovea status``.

    Attributes:
        run: run directory.
        state: finished, stopped, failed, running, waiting, idle, or unknown where Slurm does not answer.
        why: explanation of the state.
        step, steps: steps done and in total; 0 where not known.
        age: seconds since the last heartbeat.
        job: ID of the running or pending job.
        attempts: one row each.
        goodput: see :class:`Goodput`.
        scores: the latest evaluation.
        jobs: number and state of the run's jobs in the queue.
        excluded: nodes that the run avoids, with the reasons and until when.
        training: what the newest attempt reports.
        cost: what the run has used.
        forecast: when it will be done; ``None`` unless it trains.
    """

    run: str
    state: str
    why: str
    step: int
    steps: int
    age: float | None
    job: int | None
    attempts: list[dict[str, Any]]
    goodput: Goodput
    scores: dict[str, float]
    jobs: dict[int, str] = field(default_factory=dict)
    excluded: dict[str, str] = field(default_factory=dict)
    training: TrainingState = field(default_factory=TrainingState)
    cost: Cost = field(default_factory=Cost)
    forecast: Forecast | None = None


def find(name: str) -> RunDirectory:
    """Find a run by its directory, or by its name below ``runs``.

    Raises:
        ConfigError: no such run.
    """
    for path in (Path(name), Path("runs") / name):
        if (path / "config.json").is_file():
            return RunDirectory(path.absolute())
    raise ConfigError(f"{name} is not a run", hint="Give its directory, or its name below runs/; `fovea runs` lists them")


def status(run: RunDirectory, listed: Sequence[Job] | LaunchError | None = None) -> Status:
    """Determine the status of a run.

    Args:
        run: the run directory.
        listed: the queue entries of this user, or why Slurm does not answer, if that is known.

    Raises:
        ConfigError: one of its records has a wrong type.
    """
    try:
        return _status(run, listed)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"a record of the run is damaged ({type(error).__name__})",
            where=str(run.path),
            hint="See its attempts.jsonl, outcome.json and final_state.json",
        ) from error


def queue_of(runs: Sequence[RunDirectory]) -> list[Job] | LaunchError | None:
    """Queue entries of the owners of some runs, who may be other users; why Slurm does not answer; ``None`` without jobs."""
    owners = set()
    for run in runs:
        if record.job(run):
            with contextlib.suppress(OSError):
                owners.add(record.script(run).stat().st_uid)
    if not owners:
        return None
    try:
        return user_jobs(owners)
    except LaunchError as error:
        return error


def _status(run: RunDirectory, listed: Sequence[Job] | LaunchError | None) -> Status:
    silent = ""
    try:
        if isinstance(listed, LaunchError):
            if record.job(run):
                raise listed
            listed = ()
        jobs = living(run, listed)
    except LaunchError as error:
        jobs, silent = [], str(error)
    over = record.final_state(run)
    rows = record.endings(run)
    attempt = int(rows[-1]["attempt"]) if rows else -1
    step, age = record.saved_step(run), None
    for path in (run.logs(attempt) / "pulse").glob("rank-*.json") if attempt >= 0 else ():
        with contextlib.suppress(OSError):
            run_age = time.time() - path.stat().st_mtime
            age = run_age if age is None else min(age, run_age)
            step = max(step, int(record.read(path).get("step", 0)))
    outcome = record.read(run.path / "outcome.json")
    if record.job(run) and not silent and rows and not any(job.state in ("RUNNING", "COMPLETING") for job in jobs):
        _cut_off(run, rows[-1])
    if over:
        state, why = str(over["state"]), str(over["why"])
    elif any(job.state in ("RUNNING", "COMPLETING") for job in jobs) or (
        not jobs and not record.job(run) and age is not None and age < 30 and not _ended(run, attempt)
    ):
        state = "running"
        why = _where(jobs[0]) if jobs else "on this machine"
    elif jobs:
        state = "waiting"
        start = f", expected {jobs[0].start}" if jobs[0].start not in ("", "N/A") else ""
        why = f"{jobs[0].reason}{start}"
    elif silent:
        seen = f"the last heartbeat was {age:.0f} s ago" if age is not None else "it has sent no heartbeat yet"
        state, why = "unknown", f"Slurm does not answer; {seen} ({silent})"
    elif outcome.get("stop") == "FINISHED":
        state, why = "finished", f"all {outcome.get('steps')} steps are done"
    else:
        again = "`fovea resume` resumes it" if record.job(run) else "the same `fovea train` command resumes it"
        state, why = "idle", f"{_last_job(run, rows)}; {again}"
    steps = int(outcome.get("steps", 0)) or _steps(run)
    training = training_state(run, attempt, steps, trains=state in ("running", "unknown"))
    coming = None
    if training.seconds_left is not None and state in ("running", "unknown"):
        coming = _forecast(run, rows, training.seconds_left, jobs[0].left if jobs else "")
    return Status(
        str(run.path),
        state,
        why,
        max(step, 0),
        steps,
        age,
        jobs[0].id if jobs else None,
        rows,
        goodput(run, rows),
        _scores(run, outcome),
        {job.id: job.state for job in jobs},
        {node: f"{why} (until {_moment(record.excluded_until(run)[node])})" for node, why in record.excluded(run).items()},
        training,
        cost(run, rows, left=coming.busy if coming is not None else None),
        coming,
    )


def _forecast(run: RunDirectory, rows: list[dict[str, Any]], left: float, of_job: str) -> Forecast:
    """When the run is done; ``of_job`` is the time left of its job, as ``squeue`` prints it."""
    profile = record.job(run).get("profile") or {}
    limit = attempt = None
    with contextlib.suppress(ValueError, TypeError, KeyError):  # UNLIMITED, or no job
        lead = float(profile["checkpoint_lead_time"])
        limit, attempt = seconds(of_job) - lead, seconds(str(profile["time"])) - lead
    submitted = [float(row["t"]) for row in run.attempts() if row["event"] == "submit"]
    return forecast(time.time(), left, limit, attempt, pauses(rows, submitted[0] if submitted else None))


def _scores(run: RunDirectory, outcome: dict[str, Any]) -> dict[str, float]:
    """Scores of the latest evaluation: at the end of the last attempt, or in the newest checkpoint."""
    newest = max(run.checkpoints.glob("step_*/manifest.json"), default=None)
    scores = outcome.get("scores") or (record.read(newest).get("scores") if newest is not None else None) or {}
    return {str(name): float(value) for name, value in dict(scores).items()}


def _where(job: Job) -> str:
    """Nodes and remaining time of a running job; Slurm prints INVALID beyond the limit."""
    left = "no limit" if job.left == "UNLIMITED" else "ending soon"
    return f"on {job.nodes}, " + (f"{job.left} left of this attempt" if ":" in job.left else left)


def _cut_off(run: RunDirectory, row: dict[str, Any]) -> None:
    """Complete the row of an attempt that no job runs any more and whose end is not recorded."""
    if "ended_at" not in row and "started_at" in row:
        row.update(ended_at=record.last_sign(run, row), cause="cut off", why="its end is not recorded")


def _moment(t: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(t))


def _last_job(run: RunDirectory, rows: list[dict[str, Any]]) -> str:
    """What became of the last job of a run that has no job in the queue."""
    numbers = [record.job(run).get("job"), *(row.get("job") for row in rows)]
    job = max((number for number in numbers if type(number) is int), default=None)
    state = of_ended(job) if job is not None else ""
    if not state:
        return "no process of the run is running"
    return f"job {job} was cancelled" if state == "CANCELLED" else f"its last job {job} ended as {state}"


def ended(run: RunDirectory) -> dict[str, Any]:
    """Final state of a run and the reason: as recorded by its supervisor, or by its last rank 0; empty while it has not ended."""
    over, outcome = record.final_state(run), record.read(run.path / "outcome.json")
    if not over and outcome.get("stop") == "FINISHED":
        return {"state": "finished", "why": f"all {outcome.get('steps')} steps are done"}
    return over


def _steps(run: RunDirectory) -> int:
    """Total steps of the run, as logged by its last attempt."""
    return int(record.read(run.path / "plan.json").get("steps", 0))


def table(one: Status) -> str:
    """Format for the terminal."""
    done = f"step {one.step}" + (f" of {one.steps}" if one.steps else "")
    lines = [
        f"{Path(one.run).name}: {one.state}: {one.why}",
        f"  {done}" + (f", last heartbeat {one.age:.0f} s ago" if one.age is not None else ""),
    ]
    if one.jobs:
        lines[-1] += ", " + ", ".join(f"job {number} {state.lower()}" for number, state in one.jobs.items())
    lines += [f"  excluded: {node}: {why}" for node, why in one.excluded.items()]
    lines += _training_lines(one)
    if one.scores:
        lines.append("  " + "  ".join(f"{name} {value:.3f}" for name, value in one.scores.items()))
    g = one.goodput
    if g.wall:
        parts = {
            "advanced": g.advanced,
            "in the queue": g.waiting,
            "starting": g.starting,
            "done again": g.lost,
            "other": g.other,
        }
        durations = ", ".join(f"{name} {clock(seconds)}" for name, seconds in parts.items() if seconds >= 1)
        lines.append(f"  goodput {g.share:.0%} of {clock(g.wall)}: {durations}")
    for row in one.attempts:
        begun = _moment(row["started_at"]) if "started_at" in row else "?"
        what = f"{row.get('cause')}: {row.get('why')}" if "cause" in row else "ended" if "ended_at" in row else "alive"
        lines.append(f"  attempt {row['attempt']}  {begun}  {row.get('ranks', '?')} ranks  {row.get('nodes', '')}  {what}")
    return "\n".join(lines)


def _training_lines(one: Status) -> list[str]:
    t, c = one.training, one.cost
    parts = [f"loss {t.loss:.4f}"] if t.loss is not None else []
    parts += [f"{t.images_per_second:.0f} images/s"] if t.images_per_second is not None else []
    if t.gpu_use is not None:
        memory = f", {t.gpu_memory:.0%} of their memory in use" if t.gpu_memory is not None else ""
        idle = f" (those of node {t.idle_node[0]}: {t.idle_node[1]:.0%})" if t.idle_node is not None else ""
        parts.append(f"GPUs {t.gpu_use:.0%} busy{idle}{memory}")
    lines = [", ".join(parts)] * bool(parts)
    if (f := one.forecast) is not None and t.seconds_left is not None:
        further = f" with {f.attempts} further attempt{'s' * (f.attempts > 1)} and the queue as before" if f.attempts else ""
        lines.append(f"{clock(t.seconds_left)} of steps left, done {_moment(f.end)}{further or ' if not interrupted'}")
    if c.hours:
        unit = "GPU" if c.gpus else "process"
        price = f", {c.price:.2f} at the profile's price" if c.price is not None else ""
        more = f"; {c.hours_left:.2f} more to the end" if c.hours_left is not None else ""
        more += f", {c.price_left:.2f}" if c.price_left is not None else ""
        lines.append(f"{c.hours:.2f} {unit} hours{price}{more}")
    return [f"  {text}" for text in [*lines, *t.waits, *t.errors]]


def as_json(one: Status) -> str:
    """Format as JSON."""
    return json.dumps({**asdict(one), "goodput": {**asdict(one.goodput), "share": one.goodput.share}}, indent=1)


def _ended(run: RunDirectory, attempt: int) -> bool:
    return any(line.get("event") == "end" and line.get("attempt") == attempt for line in run.attempts())
