"""Notifications of a supervisor, for which no restart waits. Standard library only.

They are sent while the supervisor goes on. What a job has not delivered when it ends, and another takes over, the other sends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from launch import notifications
from launch.slurm.decide import Decision
from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory

_GRACE = 2.0  # seconds for which the end of a job may wait, for all of them, where another job takes over
_MOST = 20  # notifications that are handed to the next job


class Outbox:
    """The notifications of one job.

    Args:
        run: the run directory.
        settings: section ``notify`` of the submission, as JSON values.
        environment: the batch step's, which has the digest of the settings that may be used.
        log: writes a line to the batch log.
    """

    def __init__(
        self, run: RunDirectory, settings: Mapping[str, Any], environment: Mapping[str, str], log: Callable[[str], None]
    ) -> None:
        self._run, self._settings, self._log = run, settings, log
        self._usable = notifications.in_job(settings, environment)
        self._sent: list[notifications.Sending] = []

    def resume(self) -> None:
        """Send what the job before this one could not deliver."""
        rows = record.take_unsent(self._run)
        for row in rows[:_MOST] if self._usable else ():
            event, subject, lines, channels = (row.get(key) for key in ("event", "subject", "lines", "channels"))
            if isinstance(lines, list) and isinstance(channels, list):
                self._start(str(event), str(subject), [str(line) for line in lines], [str(one) for one in channels])

    def add(self, decision: Decision) -> None:
        """Notify the user of a decision, if the job was submitted with the settings of the run directory."""
        event = {"finish": "finished", "fail": "budget" if decision.spent else "failed"}.get(decision.action, "")
        if decision.action == "requeue":
            event = "excluded" if decision.exclude else "hang" if decision.cause == "hang" else ""
        if not event or not self._settings:
            return
        if not self._usable:
            self._log("nothing is notified: the settings of notify are not those with which this job was submitted")
            return
        try:
            self._start(event, *notifications.about(self._run, event, decision.why, decision.cause))
        except Exception as error:  # never the run's concern
            self._log(f"warning: nothing is notified ({type(error).__name__})")

    def close(self, *, continues: bool) -> None:
        """Wait for what is on its way: not long if the run continues, as another job waits for the end of this one.

        Args:
            continues: whether another job takes over.
        """
        unsent, end = [], time.monotonic() + _GRACE
        for sending in self._sent:
            missing = sending.wait(max(end - time.monotonic(), 0.0)) if continues else sending.wait()
            if missing and continues:
                row = {"event": sending.event, "subject": sending.subject, "lines": sending.lines, "channels": missing}
                unsent.append(row)
            sending.close("no answer yet; the next job sends it again" if continues else "no answer in time")
        if unsent:
            with contextlib.suppress(OSError):
                record.keep_unsent(self._run, unsent)

    def _start(self, event: str, subject: str, lines: list[str], only: list[str] | None = None) -> None:
        self._sent.append(notifications.Sending(self._settings, event, self._run.path, subject, lines, only))
