"""Sends the records of a run that failed to its trackers: ``python -m launch.cli.tracked_end RUN``, started by its launcher."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cli.mlflow import send
from pipeline.errors import FoveaError
from pipeline.runtime.run_directory import RunDirectory

_PATIENCE = 20.0  # longest wait for a tracker, seconds


def main() -> int:
    """Entry of ``python -m launch.cli.tracked_end RUN``, with the trust in the run's settings that its training had."""
    from pipeline.tracking import destination_of, remember

    run = RunDirectory(Path(sys.argv[1]))
    try:
        target = destination_of(run.settings().tracking, run.path, trained=True)
        if target.origin:
            remember(target.uri)
        return 0 if send(run, None, _PATIENCE) is None else 1
    except FoveaError as error:
        print(f"fovea: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
