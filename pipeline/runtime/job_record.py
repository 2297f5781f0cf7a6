"""Reads and writes the files of a run on a cluster, in addition to those of every run. Standard library only.

<run>/submit/script.sbatch    the batch script as submitted to Slurm
<run>/submit/job.json         job number, cluster profile, launch command; read by the job itself
<run>/code/                   the code as submitted; a requeued job runs it, whatever happened to the checkout
<run>/control/stop            user request to stop the run, to be continued by ``fovea resume``
<run>/control/save            user request for a checkpoint
<run>/control/stop-0003       request to stop attempt 3 (time limit, preemption); the next attempt continues
<run>/control/now-3           user request to end attempt 3 without saving; the next attempt continues
<run>/final_state.json        the final state of the run, once it has ended
<run>/excluded.json           nodes that the run avoids, with reasons and until when
<run>/live.json               the job whose supervisor attends the run
<run>/work.json               samples that an embedding job has done, of how many
<run>/handover.json           the job whose supervisor cancelled it in favour of its successor
<run>/unsent.json             notifications that the next job sends
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

STOP, SAVE, NOW = "stop", "save", "now"
WORK = "work.json"
_UNSENT = "unsent.json"


def read(path: Path) -> dict[str, Any]:
    """Reads a JSON object; empty if the file is missing or incomplete."""
    try:
        document = read_json(path)
    except (OSError, DataError):
        return {}
    return document if isinstance(document, dict) else {}


def job(run: RunDirectory) -> dict[str, Any]:
    """Returns what was submitted."""
    return read(run.path / "submit" / "job.json")


def final_state(run: RunDirectory) -> dict[str, Any]:
    """Returns the final ``state`` of the run (finished, stopped or failed) and ``why``; empty while it has not ended."""
    return read(run.path / "final_state.json")


def end(run: RunDirectory, state: str, why: str) -> None:
    """Records the final state of the run."""
    run.write("final_state.json", {"state": state, "why": why, "t": round(time.time(), 3)})


def script(run: RunDirectory) -> Path:
    """Path of the batch script; Slurm shows it for every job of the run."""
    return run.path / "submit" / "script.sbatch"


def excluded(run: RunDirectory, now: float | None = None) -> dict[str, str]:
    """Returns the nodes to avoid, with reasons, in the order in which they were excluded; those that expired are left out.

    Args:
        run: the run directory.
        now: seconds since 1970; the current time by default.
    """
    now = time.time() if now is None else now
    return {node: row["why"] for node, row in _exclusions(run).items() if row["until"] > now}


def exclude(run: RunDirectory, nodes: dict[str, str], hours: float = 24.0) -> None:
    """Adds nodes to avoid for some hours."""
    if nodes:
        now = time.time()
        others = {node: row for node, row in _exclusions(run).items() if row["until"] > now and node not in nodes}
        added = {node: {"why": why, "t": round(now, 3), "until": round(now + hours * 3600, 3)} for node, why in nodes.items()}
        run.write("excluded.json", {**others, **added})


def forgive_nodes(run: RunDirectory) -> list[str]:
    """Removes all nodes to avoid; returns them."""
    nodes = list(excluded(run))
    (run.path / "excluded.json").unlink(missing_ok=True)
    return nodes


def excluded_until(run: RunDirectory) -> dict[str, float]:
    """Returns until when each node is avoided, seconds since 1970."""
    return {node: row["until"] for node, row in _exclusions(run).items()}


def _exclusions(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Entries of ``excluded.json``; those of earlier versions, a reason only, count from the file's last change."""
    path = run.path / "excluded.json"
    rows: dict[str, dict[str, Any]] = {}
    for node, row in read(path).items():
        if isinstance(row, str):
            with contextlib.suppress(OSError):
                begun = path.stat().st_mtime
                rows[node] = {"why": row, "t": begun, "until": begun + 24 * 3600.0}
        elif isinstance(row, dict) and isinstance(row.get("why"), str):
            t, until = row.get("t"), row.get("until")
            if isinstance(t, (int, float)) and isinstance(until, (int, float)):
                rows[node] = {"why": row["why"], "t": float(t), "until": float(until)}
    return dict(sorted(rows.items(), key=lambda item: item[1]["t"]))


def hand_over(run: RunDirectory, job: int) -> None:
    """Records that a supervisor cancels its own job in favour of its successor."""
    run.write("handover.json", {"job": job})


def handed_over(run: RunDirectory) -> int | None:
    """Returns the job that was last cancelled in favour of its successor."""
    number = read(run.path / "handover.json").get("job")
    return number if type(number) is int else None


def keep_unsent(run: RunDirectory, rows: list[dict[str, Any]]) -> None:
    """Records notifications that the next job sends."""
    run.write(_UNSENT, {"rows": rows})


def take_unsent(run: RunDirectory) -> list[dict[str, Any]]:
    """Removes the notifications that an earlier job could not deliver; returns them."""
    rows = read(run.path / _UNSENT).get("rows")
    with contextlib.suppress(OSError):
        (run.path / _UNSENT).unlink(missing_ok=True)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def request(run: RunDirectory, what: str, reason: str) -> Path:
    """Writes a request where the ranks look for it: ``stop``, ``save`` or ``stop-<attempt>``."""
    folder = run.path / "control"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{what}.{os.getpid()}"
    temporary.write_text(json.dumps({"reason": reason, "t": round(time.time(), 3)}))
    temporary.replace(folder / what)
    return folder / what


def pending_request(run: RunDirectory, what: str) -> dict[str, Any] | None:
    """Returns the request, if there is one."""
    path = run.path / "control" / what
    return read(path) if path.exists() else None


def clear(run: RunDirectory) -> None:
    """Removes the final state and the user's requests, so that the run can continue."""
    for path in (run.path / "final_state.json", run.path / _UNSENT, *(run.path / "control" / name for name in (STOP, SAVE))):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def failure(run: RunDirectory, attempt: int) -> dict[str, Any] | None:
    """Returns the failure record of the rank that failed first in an attempt."""
    return read(run.logs(attempt) / "failure.json") or None


def outcome(run: RunDirectory, attempt: int) -> dict[str, Any] | None:
    """Returns the outcome of an attempt, if it ended regularly."""
    document = read(run.path / "outcome.json")
    return document if document.get("attempt") == attempt else None


def saved_step(run: RunDirectory) -> int:
    """Returns the step of the newest checkpoint, or of an embedding job the samples that are done; -1 if there is neither."""
    steps = [path.name[5:] for path in run.checkpoints.glob("step_*") if (path / "manifest.json").exists()]
    done = read(run.path / WORK).get("done")
    work = done if type(done) is int and 0 <= done < 1 << 62 else -1
    return max((int(step) for step in steps if step.isdecimal()), default=work)


def endings(run: RunDirectory) -> list[dict[str, Any]]:
    """Returns one entry per attempt, in order: its start, and its end if known."""
    rows: dict[int, dict[str, Any]] = {}
    for row in run.attempts():
        number = int(row.get("attempt", -1))
        rest = {key: value for key, value in row.items() if key not in ("event", "t") and not key.endswith("_at")}
        rows.setdefault(number, {}).update(
            {**rest, f"{row['event']}ed_at" if row["event"] != "training" else "training_at": row["t"]}
        )
    return [rows[number] for number in sorted(rows) if number >= 0]


def last_sign(run: RunDirectory, row: dict[str, Any]) -> float:
    """Returns when an attempt gave its last sign of life, seconds since 1970: its start, its first step or a heartbeat.

    Args:
        run: the run directory.
        row: the attempt, as :func:`endings` returns it, with ``started_at``.
    """
    signs = [float(row["started_at"]), float(row.get("training_at", 0.0))]
    for path in (run.logs(int(row["attempt"])) / "pulse").glob("rank-*.json"):
        with contextlib.suppress(OSError):
            signs.append(path.stat().st_mtime)
    return max(signs)
