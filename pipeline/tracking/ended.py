"""The state in which a run ended, for trackers, where its ranks could not record it: they crashed or were killed."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

from pipeline.runtime import job_record
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import read
from pipeline.untrusted import hide_secrets

_BY_SIGNAL = (129, 130, 143)  # exit codes of a launch that a user ended: SIGHUP, SIGINT, SIGTERM
_SAVING = 900.0  # seconds after which the ranks of a job that was cancelled are gone


def record_end(run: RunDirectory) -> str:
    """Adds the state in which a run ended to its newest journal, if the last state there is that it runs.

    On a cluster the state is the final one of the run, on one host that of its last launch. The run may be a stranger's: nothing
    is written through a link.

    Args:
        run: the run directory.

    Returns:
        ``failed`` or ``stopped``; empty if nothing was added: the run goes on, was never tracked, or recorded its end itself.
    """
    rows = [row for row in run.attempts() if row["event"] in ("start", "end") and row.get("attempt") is not None]
    starts = [row for row in rows if row["event"] == "start"]
    if not starts:
        return ""
    last, state, why = rows[-1], "", ""
    over = job_record.final_state(run) if "job" in starts[-1] else {}  # started by a job of Slurm, which may start it again
    noted = over.get("t")
    gone = type(noted) is float and time.time() - _SAVING > noted  # a cancelled job may have been killed before it noted its end
    if last["event"] != "end" and not gone:
        return ""
    if "job" in starts[-1]:
        state, why = str(over.get("state", "")), str(over.get("why", ""))
    elif last.get("code"):
        state = "stopped" if last.get("signal") is True or last["code"] in _BY_SIGNAL else "failed"
        failure = job_record.failure(run, last["attempt"]) or {}
        why = str(failure.get("what") or f"the ranks ended with code {last['code']}")
    if state not in ("failed", "stopped") or run.tracking.is_symlink():
        return ""
    # An attempt that ended before it had a journal, without its data for instance, leaves the state to an earlier one.
    journals = [path for path in sorted(run.tracking.glob("journal-*.jsonl")) if path.name <= run.journal(last["attempt"]).name]
    if not journals:
        return ""
    return state if _add(journals[-1], {"fovea.state": state, "fovea.why": hide_secrets(why)}) else ""


def _add(path: Path, tags: dict[str, str]) -> bool:
    """Adds tags to a journal whose last state is ``running``; the line at which a kill cut it off is ended."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        status, state = os.fstat(descriptor), ""
        if not stat.S_ISREG(status.st_mode):
            return False
        for _, record in read(Path(f"/proc/self/fd/{descriptor}")):  # the same file, whatever the path leads to by now
            if record["kind"] == "tags":
                state = record["values"].get("fovea.state", state)
        if state != "running":
            return False
        torn = status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n"
        row = {"t": round(time.time(), 3), "kind": "tags", "values": tags}
        line = (b"\n" if torn else b"") + json.dumps(row).encode() + b"\n"
        try:
            return file.write(line) == len(line)
        except OSError:  # a full disk: the next call adds it
            return False
