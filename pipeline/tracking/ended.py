"""The state in which a run ended, for trackers, where its ranks could not record it: they crashed or were killed."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from pipeline.runtime import job_record
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking.journal import Journal, read

_BY_SIGNAL = (129, 130, 143)  # exit codes of a launch that a user ended: SIGHUP, SIGINT, SIGTERM


def record_end(run: RunDirectory) -> str:
    """Adds the state in which a run ended to the journal of its newest attempt, whose last state is that it runs.

    On a cluster the state is the final one of the run, on one host that of its last launch. The run may be a stranger's: nothing
    is written through a link.

    Args:
        run: the run directory.

    Returns:
        ``failed`` or ``stopped``; empty if nothing was added: the run goes on, was never tracked, or recorded its end itself.
    """
    attempts = [row for row in run.attempts() if row["event"] in ("start", "end") and row.get("attempt") is not None]
    if not attempts:
        return ""
    state, why, last = "", "", attempts[-1]
    if job_record.job(run):
        over = job_record.final_state(run)
        state, why = str(over.get("state", "")), str(over.get("why", ""))
    elif last["event"] == "end" and last.get("code"):
        state = "stopped" if last["code"] in _BY_SIGNAL else "failed"
        failure = job_record.failure(run, last["attempt"]) or {}
        why = str(failure.get("what") or f"the ranks ended with code {last['code']}")
    path = run.journal(last["attempt"])
    if state not in ("failed", "stopped") or run.tracking.is_symlink() or not _is_open_ended(path):
        return ""
    journal = Journal(path)
    journal.tags({"fovea.state": state, "fovea.stop": why})
    journal.close()
    return state


def _is_open_ended(path: Path) -> bool:
    """Whether the last state of a journal is ``running``; the line at which a kill cut it off is ended."""
    state = ""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with contextlib.closing(os.fdopen(descriptor, "r+b", buffering=0)) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return False
        for _, record in read(path):
            if record["kind"] == "tags":
                state = record["values"].get("fovea.state", state)
        if state == "running" and status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n":
            file.write(b"\n")
    return state == "running"
