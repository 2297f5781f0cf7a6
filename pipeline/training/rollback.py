"""Steps excluded from training after a rollback.

After a rollback to a checkpoint, the steps that led to a non-finite loss are skipped. ``<run>/skipped_steps.json`` outlives
attempts, so that later attempts skip the same global batches; all other steps keep their numbers, samples and schedules. A margin
of steps before the first non-finite one is skipped too: replayed unchanged, they would lead to the same weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.errors import DataError, TrainingError
from pipeline.untrusted import read_json


class SkippedSteps:
    """The skipped steps and the number of rollbacks.

    Args:
        path: the file; may be missing.

    Raises:
        TrainingError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stretches: list[tuple[int, int]] = []
        earlier = path.with_name("left_out.json")  # the name of the versions before
        try:
            document = read_json(path if path.exists() or not earlier.exists() else earlier)
            self.stretches = [(int(first), int(last)) for first, last in document["steps"]]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, OverflowError, OSError, DataError) as error:
            raise TrainingError(
                f"the list of skipped steps cannot be read ({error})",
                where=str(path),
                hint="Delete it to train on all steps",
            ) from error

    def __contains__(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.stretches)

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks."""
        return len(self.stretches)

    def add(self, first: int, last: int, *, write: bool) -> None:
        """Skip the steps from ``first`` to ``last`` from now on.

        Args:
            first, last: both inclusive.
            write: also write the file; done by one rank.
        """
        self.stretches.append((first, last))
        if not write:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with temporary.open("w") as file:
            json.dump({"steps": self.stretches}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
