"""Sends the end of a run that failed to its trackers: ``python -m launch.cli.send_end RUN``, started by its launcher."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pipeline.errors import FoveaError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import destination_of, shippers
from pipeline.tracking.ended import record_end
from pipeline.untrusted import printable

_PATIENCE = 50.0  # longest wait for all trackers, imports of their libraries included, seconds


def main() -> int:
    """Record the end in the run's journal and send it to the trackers of its settings; returns an exit code.

    An MLflow server that only the run names receives nothing, as with ``fovea mlflow sync``: the ranks noted the one they used.
    """
    run, end = RunDirectory(Path(sys.argv[1])), time.monotonic() + _PATIENCE
    try:
        config = run.settings()
        if not record_end(run):
            return 0
        target = destination_of(config.tracking, run.path) if "mlflow" in config.tracking.to else None
        above = run.sweep if target is not None and target.origin else None
        trackers = shippers(config.tracking, run.tracking, name=config.run.name, destination=target, log=_log, sweep=above)
        for tracker in trackers:
            tracker.start()
        behind = [one.tracker for one in trackers if not one.close(max(end - time.monotonic(), 0.0))]
    except FoveaError as error:
        print(f"fovea: {error}", file=sys.stderr)
        return 2
    return 1 if behind else 0


def _log(text: str) -> None:
    print(printable(text))


if __name__ == "__main__":
    sys.exit(main())
