"""Snapshots of a run in host memory: checkpoints in a folder of a memory file system, which outlives the ranks, not the node.

A rank that starts in place of one that died reads them like any checkpoint, with any world size.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint.fragments import ShardedWeights
from pipeline.checkpoint.neighbours import NodePlace
from pipeline.checkpoint.writer import TEMPORARY, Checkpoints, Outcome, Saving
from pipeline.errors import CheckpointWriteError
from pipeline.methods.base import Method

_FAILURES = 3  # in a row, after which no more snapshots are taken


class Snapshots:
    """The snapshots of one run on this node; without a folder, or with an interval of 0, none are taken.

    A snapshot that cannot be written (the memory is full) never stops the run; its part is removed, and after three in a row no
    more are taken.

    Args:
        directory: a folder in host memory, such as :func:`launch.host_memory.folder` makes; ``None`` for none.
        every: interval in steps.
        group, nodes: as for :class:`pipeline.checkpoint.writer.Checkpoints`.
    """

    def __init__(
        self,
        directory: Path | None = None,
        every: int = 0,
        *,
        group: dist.ProcessGroup | None = None,
        nodes: NodePlace | None = None,
    ) -> None:
        self._directory, self._every, self._group, self._nodes = directory, every, group, nodes
        self._kept, self._begun = self._opened(), False

    def _opened(self) -> Checkpoints | None:
        if self._directory is None or not self._every:
            return None
        return Checkpoints(
            self._directory, keep_last=1, fewest=1, max_failures=_FAILURES + 1, group=self._group, nodes=self._nodes, private=True
        )

    @property
    def _leads(self) -> bool:
        return self._nodes.leads if self._nodes is not None else dist.get_rank() == 0

    @property
    def state(self) -> Saving:
        """This rank's state of the snapshot in progress."""
        return self._kept.state if self._kept is not None else Saving.IDLE

    def due(self, step: int, last: int) -> bool:
        """Whether a snapshot is taken after ``step`` steps of ``last``."""
        return self._kept is not None and self._every > 0 and step % self._every == 0 and step < last

    def begin(self, engine: ShardedWeights, method: Method, manifest_fields: dict[str, Any]) -> Outcome | None:
        """As :meth:`pipeline.checkpoint.writer.Checkpoints.begin`; none is begun if too many have failed."""
        before = self.finish()
        if self._kept is not None and self._every:
            if self._nodes is not None and self._nodes.leads and self._directory is not None and not self._begun:
                self._nodes.trim(self._directory)  # all ranks of the node have loaded it by now
            self._begun = True
            self._kept.begin(engine, method, manifest_fields)
        return before

    def poll(self, agreed: int) -> Outcome | None:
        """As :meth:`pipeline.checkpoint.writer.Checkpoints.poll`."""
        return self._heeded(self._kept.poll(agreed) if self._kept is not None else None)

    def finish(self) -> Outcome | None:
        """As :meth:`pipeline.checkpoint.writer.Checkpoints.finish`."""
        return self._heeded(self._kept.finish() if self._kept is not None else None)

    def _heeded(self, outcome: Outcome | None) -> Outcome | None:
        """Frees the memory of a snapshot that could not be written; the same on all ranks, as the outcome is."""
        if outcome is None or outcome.error is None or self._directory is None:
            return outcome
        if self._leads:
            for path in self._directory.glob(f"{TEMPORARY}*"):
                shutil.rmtree(path, ignore_errors=True)
            if self._nodes is not None:  # another node has not committed it
                shutil.rmtree(self._directory / f"step_{outcome.step:09d}", ignore_errors=True)
        if outcome.consecutive_failures < _FAILURES:
            return outcome
        self._every = 0
        error = CheckpointWriteError(
            f"{outcome.error.what}; no more snapshots are taken",
            where=str(self._directory),
            hint="Give /dev/shm more space before the next start; until then restarts continue from checkpoints",
        )
        return replace(outcome, error=error)

    def discard(self) -> None:
        """Deletes all snapshots; collective. For a run that goes back to an earlier step."""
        if self._kept is None or self._directory is None:
            return
        self._kept.finish()
        self._kept.release()  # it may still be deleting
        if self._leads:
            for path in self._directory.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        self._kept = self._opened()

    def close(self) -> None:
        """As :meth:`pipeline.checkpoint.writer.Checkpoints.close`."""
        if self._kept is not None:
            self._kept.close()
