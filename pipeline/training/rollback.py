"""Steps that a run leaves out: what led to a broken loss is not trained on again after the run went back to a checkpoint.

``<run>/skipped_steps.json`` outlives attempts, so that each later one leaves out the same global batches; all others keep their
numbers, samples and schedules. Steps just before the first broken one are left out too: replayed as they were, they would lead
to the very same weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pipeline.errors import TrainingError


class SkippedSteps:
    """The steps, and how often the run went back.

    Args:
        path: the file; need not be there.

    Raises:
        TrainingError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stretches: list[tuple[int, int]] = []
        try:
            self.stretches = [(int(first), int(last)) for first, last in json.loads(path.read_text())["steps"]]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise TrainingError(
                f"the list of steps to leave out cannot be read ({error})",
                where=str(path),
                hint="delete it to train on all steps",
            ) from error

    def __contains__(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self.stretches)

    @property
    def rollbacks(self) -> int:
        """How often the run went back."""
        return len(self.stretches)

    def add(self, first: int, last: int, *, write: bool) -> None:
        """Leave out the steps from ``first`` to ``last`` from now on.

        Args:
            first, last: both included.
            write: keep it on disk too; one rank does.
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
