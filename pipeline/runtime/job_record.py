"""What a run on a cluster keeps about itself, beside what every run keeps. Standard library only.

<run>/submit/script.sbatch    the batch script, as it was handed to Slurm
<run>/submit/job.json         the job's number, the profile, how ranks are started; read by the job itself
<run>/code/                   the code that was submitted; a requeued job runs it, whatever became of the checkout
<run>/control/stop            a person wants the run to stop, to be taken up by ``fovea resume``
<run>/control/save            a person wants a checkpoint now
<run>/control/stop-0003       attempt 3 has to stop (time limit, preemption); the next goes on
<run>/final_state.json            how the run ended for good, if it has
<run>/excluded.json           nodes that it keeps away from, with the reasons
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_json

STOP, SAVE = "stop", "save"


def read(path: Path) -> dict[str, Any]:
    """A JSON object of a file; empty if there is none or it is torn."""
    try:
        found = read_json(path)
    except (OSError, DataError):
        return {}
    return found if isinstance(found, dict) else {}


def job(run: RunDirectory) -> dict[str, Any]:
    """What was submitted."""
    return read(run.path / "submit" / "job.json")


def verdict(run: RunDirectory) -> dict[str, Any]:
    """How the run ended for good: ``state`` (finished, stopped or failed) and ``why``; empty while it has not."""
    return read(run.path / "final_state.json")


def end(run: RunDirectory, state: str, why: str) -> None:
    """Say how the run ended for good."""
    run.write("final_state.json", {"state": state, "why": why, "t": round(time.time(), 3)})


def excluded(run: RunDirectory) -> dict[str, str]:
    """Nodes to keep away from, with the reasons."""
    return read(run.path / "excluded.json")


def exclude(run: RunDirectory, nodes: dict[str, str]) -> None:
    """Keep away from these nodes too."""
    if nodes:
        run.write("excluded.json", {**excluded(run), **nodes})


def ask(run: RunDirectory, what: str, reason: str) -> Path:
    """Leave a request where the ranks look: ``stop``, ``save`` or ``stop-<attempt>``."""
    folder = run.path / "control"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{what}.{os.getpid()}"
    temporary.write_text(json.dumps({"reason": reason, "t": round(time.time(), 3)}))
    temporary.replace(folder / what)
    return folder / what


def asked(run: RunDirectory, what: str) -> dict[str, Any] | None:
    """The request, if there is one."""
    path = run.path / "control" / what
    return read(path) if path.exists() else None


def clear(run: RunDirectory) -> None:
    """Take back a verdict and a person's requests: the run is to go on."""
    for path in (run.path / "final_state.json", run.path / "control" / STOP, run.path / "control" / SAVE):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def failure(run: RunDirectory, attempt: int) -> dict[str, Any] | None:
    """What the rank that failed first in an attempt said of itself."""
    return read(run.logs(attempt) / "failure.json") or None


def outcome(run: RunDirectory, attempt: int) -> dict[str, Any] | None:
    """How an attempt ended, if it ended in order."""
    found = read(run.path / "outcome.json")
    return found if found.get("attempt") == attempt else None


def saved_step(run: RunDirectory) -> int:
    """Step of the newest checkpoint, -1 if there is none."""
    steps = [path.name[5:] for path in run.checkpoints.glob("step_*") if (path / "manifest.json").exists()]
    return max((int(step) for step in steps if step.isdigit()), default=-1)


def endings(run: RunDirectory) -> list[dict[str, Any]]:
    """One row an attempt, in order: its start, and what became of it if that is known."""
    rows: dict[int, dict[str, Any]] = {}
    for row in run.attempts():
        number = int(row.get("attempt", -1))
        rest = {key: value for key, value in row.items() if key not in ("event", "t")}
        rows.setdefault(number, {}).update(
            {**rest, f"{row['event']}ed_at" if row["event"] != "training" else "training_at": row["t"]}
        )
    return [rows[number] for number in sorted(rows) if number >= 0]
