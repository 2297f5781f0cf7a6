"""Status of a run: queue, heartbeat, attempts, and goodput."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.slurm.job_end import of_ended
from launch.slurm.submit import living
from pipeline.errors import ConfigError, LaunchError
from pipeline.runtime import job_record as record
from pipeline.runtime.clock import clock
from pipeline.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class Goodput:
    """Use of the wall time since submission, in seconds.

    Attributes:
        wall: from the submission, or the first start, to the end or to now.
        advanced: steps whose result is in the newest checkpoint, or in the running attempt.
        lost: steps that had to be repeated.
        starting: from an attempt's start to its first step.
        waiting: no attempt was running (queue).
        other: evaluations, checkpoints, shutdown of attempts.
        by_cause: waiting, starting and lost seconds due to interruptions, by their cause.
    """

    wall: float = 0.0
    advanced: float = 0.0
    lost: float = 0.0
    starting: float = 0.0
    waiting: float = 0.0
    other: float = 0.0
    by_cause: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the wall time that advanced training."""
        return self.advanced / self.wall if self.wall > 0 else 0.0


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


def find(name: str) -> RunDirectory:
    """Find a run by its directory, or by its name below ``runs``.

    Raises:
        ConfigError: no such run.
    """
    for path in (Path(name), Path("runs") / name):
        if (path / "config.json").is_file():
            return RunDirectory(path.absolute())
    raise ConfigError(f"{name} is not a run", hint="Give its directory, or its name below runs/; `fovea runs` lists them")


def goodput(run: RunDirectory, rows: list[dict[str, Any]] | None = None) -> Goodput:
    """Compute the goodput of a run from its own records.

    Args:
        run: the run directory.
        rows: its attempts; by default as recorded.
    """
    rows = [row for row in (record.endings(run) if rows is None else rows) if "started_at" in row]
    if not rows:
        return Goodput()
    submitted = [row["t"] for row in run.attempts() if row["event"] == "submit"]
    first = min([rows[0]["started_at"], *submitted[:1]])
    end = float(rows[-1].get("ended_at", time.time()))
    waiting = starting = trained = 0.0
    causes: dict[str, float] = {}
    before, cause = first, "queue"
    for row in rows:
        gap = max(row["started_at"] - before, 0.0)
        last = row.get("ended_at", end)
        begin = row.get("training_at", last)
        waiting += gap
        starting += begin - row["started_at"]
        trained += max(last - begin, 0.0)
        causes[cause] = causes.get(cause, 0.0) + gap + (begin - row["started_at"])
        before, cause = last, str(row.get("cause", "unknown"))
    advanced, lost = _steps_seconds(run, rows)
    causes = {name: seconds for name, seconds in causes.items() if seconds > 0}
    other = max(trained - advanced - lost, 0.0)
    return Goodput(max(end - first, 0.0), min(advanced, end - first), lost, starting, waiting, other, causes)


def _steps_seconds(run: RunDirectory, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of steps that count, and of those that had to be repeated."""
    newest = max((path for path in run.checkpoints.glob("step_*")), default=None)
    kept = float(record.read(newest / "manifest.json").get("seconds", 0.0)) if newest is not None else 0.0
    done = 0.0
    for row in rows:
        last = record.read(run.logs(int(row["attempt"])) / "train_seconds.json")
        done += float(last.get("seconds", 0.0)) - float(last.get("began", 0.0))
    if done <= kept or record.final_state(run).get("state") == "finished":
        return kept, max(done - kept, 0.0)
    unsaved = record.read(run.logs(int(rows[-1]["attempt"])) / "train_seconds.json") if "ended_at" not in rows[-1] else {}
    current = max(
        float(unsaved.get("seconds", 0.0)) - kept, 0.0
    )  # steps of a running attempt since its last checkpoint are not lost
    return kept + current, max(done - kept - current, 0.0)


def status(run: RunDirectory) -> Status:
    """Determine the status of a run.

    Raises:
        ConfigError: one of its records has a wrong type.
    """
    try:
        return _status(run)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(
            f"a record of the run is damaged ({type(error).__name__})",
            where=str(run.path),
            hint="See its attempts.jsonl, outcome.json and final_state.json",
        ) from error


def _status(run: RunDirectory) -> Status:
    silent = ""
    try:
        jobs = living(run)
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
        why = f"on {jobs[0].nodes}, {jobs[0].left} left of this attempt" if jobs else "on this machine"
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
    return Status(
        str(run.path),
        state,
        why,
        max(step, 0),
        int(outcome.get("steps", 0)) or _steps(run),
        age,
        jobs[0].id if jobs else None,
        rows,
        goodput(run, rows),
        {str(name): float(value) for name, value in dict(outcome.get("scores", {})).items()},
        {job.id: job.state for job in jobs},
        {node: f"{why} (until {_moment(record.excluded_until(run)[node])})" for node, why in record.excluded(run).items()},
    )


def _cut_off(run: RunDirectory, row: dict[str, Any]) -> None:
    """Complete the row of an attempt that no job runs any more and whose end is not recorded."""
    if "ended_at" not in row and "started_at" in row:
        beats = [row["started_at"], row.get("training_at", 0.0)]
        for path in (run.logs(int(row["attempt"])) / "pulse").glob("rank-*.json"):
            with contextlib.suppress(OSError):
                beats.append(path.stat().st_mtime)
        row.update(ended_at=max(beats), cause="cut off", why="its end is not recorded; the time is that of its last heartbeat")


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


def as_json(one: Status) -> str:
    """Format as JSON."""
    return json.dumps({**asdict(one), "goodput": {**asdict(one.goodput), "share": one.goodput.share}}, indent=1)


def _ended(run: RunDirectory, attempt: int) -> bool:
    return any(line.get("event") == "end" and line.get("attempt") == attempt for line in run.attempts())
