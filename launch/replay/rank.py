"""One rank of a replay: ``python -m launch.replay.rank CONFIG.json 0 CHECKPOINT``, started by ``fovea replay``.

It trains as :mod:`launch.rank_main` does, in a scratch directory, and stops after the last step of the request beside the
config, ``replay.json``. Where the run has a checkpoint, it compares instead of saving.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict

from launch import rank_main
from launch.progress import LineLogger, MessageLogger
from launch.rank_data import agreed_inputs
from launch.rank_main import RankContext
from pipeline.checkpoint.digests import group_digests
from pipeline.checkpoint.files import read
from pipeline.checkpoint.reader import differing
from pipeline.checkpoint.snapshot import Staging
from pipeline.checkpoint.writer import Checkpoints
from pipeline.errors import CheckpointError
from pipeline.runtime.versions import fovea_version

if TYPE_CHECKING:
    from pipeline.checkpoint.fragments import ShardedWeights
    from pipeline.methods.base import Method

REQUEST = "replay.json"
_NEVER = 1 << 62


class Request(BaseModel):
    """What the ranks of a replay do, beside the settings.

    Attributes:
        first: first step that is dumped.
        until: last step.
        checkpoints: checkpoints of the run to compare with, by step.
        excluded: numbers of samples that are substituted as bad ones are.
        dump: folder for batches, activations and gradients; ``None`` for none.
        accumulation: micro-batches per rank of the run, if the replay has as large ones; ``None`` otherwise.
    """

    model_config = ConfigDict(frozen=True)

    first: int
    until: int
    checkpoints: dict[int, Path] = {}
    excluded: list[int] = []
    dump: Path | None = None
    accumulation: int | None = None

    @classmethod
    def of(cls, scratch: Path) -> Self:
        """Reads the request in a scratch directory."""
        return cls.model_validate_json((scratch / REQUEST).read_text())


def tensors_file(scratch: Path, rank: int) -> Path:
    """Where a rank writes how its tensors compare with those of checkpoints, one JSON line each."""
    return scratch / f"tensors-rank-{rank}.jsonl"


class Comparison(Checkpoints):
    """Compares with the run's checkpoints where a run saves its own.

    Args:
        scratch: the scratch directory.
        rank: this rank.
        checkpoints: the run's checkpoints, by step; the same on all ranks.
    """

    def __init__(self, scratch: Path, rank: int, checkpoints: dict[int, Path]) -> None:
        super().__init__(scratch / "checkpoints")
        self._rank, self._saved, self._output = rank, checkpoints, tensors_file(scratch, rank)

    def save(self, engine: ShardedWeights, method: Method, manifest_fields: dict[str, Any]) -> Path:
        """Compares the current state with the run's checkpoint of this step, if there is one, and takes its digests."""
        step = int(manifest_fields["step"])
        on_gpu = any(fragment.master.is_cuda for fragment in engine.fragments())
        snapshot = Staging().take(engine, method, unsharded=self._rank == 0, copy=on_gpu)
        self.digests = group_digests({**snapshot.pieces, **snapshot.unsharded})
        if step in self._saved:
            line: dict[str, Any] = {"step": step, "tensors": len(snapshot.pieces) + len(snapshot.unsharded), "differing": []}
            try:
                line["differing"] = [asdict(one) for one in differing(read(self._saved[step]), snapshot)]
            except CheckpointError as error:
                line["error"] = str(error)
            with self._output.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return self.directory


class _Progress(LineLogger):
    """Prints the steps of a replay on stderr, of those that it executes.

    Args:
        global_batch: samples of a step.
        end: one past the last step.
    """

    def __init__(self, global_batch: int, end: int) -> None:
        super().__init__(global_batch, sys.stderr)
        self._end = end

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None:
        """Print one line."""
        super().step(done, min(total, self._end), loss, rate, scores, scores_step)


def replay(rank: RankContext) -> None:
    """From joining the process group to leaving it, in place of a training run; see :func:`launch.rank_main.train`."""
    from launch.replay.dump import Dump
    from pipeline.runtime import process_group as distributed
    from pipeline.training.build import assemble

    config, world, run, checkpoint = rank.config, rank.world, rank.run, rank.checkpoint
    request = Request.of(run.path)
    show = _Progress(config.train.global_batch_size, request.until + 1) if world.rank == 0 else MessageLogger()
    trainer = assemble(
        config,
        agreed_inputs(config, world, rank.inputs),
        world,
        run,
        attempt=rank.attempt,
        resume=checkpoint,
        manifest_fields={"fovea": fovea_version()},
        requests=rank.requests,
        journal=None,
        logger=show,
        watchdog=rank.watchdog,
        excluded=request.excluded,
    )
    trainer.checkpoints = comparison = Comparison(run.path, world.rank, request.checkpoints)
    first = trainer.progress.step
    trainer.plan = replace(
        trainer.plan,
        pause_at=request.until + 1,
        evaluate_every=0,
        checkpoint_every=math.gcd(*(step for step in request.checkpoints if step > first)),
        max_nonfinite=_NEVER,
        rollback_after=None,
        asynchronous=False,
        save_evaluated=None,
        accumulation=request.accumulation,
    )
    dump = Dump(request.dump, trainer, request.first) if request.dump is not None else None
    comparison.save(trainer.engine, trainer.method, {"step": first})
    if trainer.signatures is not None:
        trainer.signatures.weights(first, comparison.digests)
    trainer.run()
    if dump is not None:
        dump.close()
    trainer.engine.close()
    distributed.leave()


if __name__ == "__main__":
    rank_main.leave(rank_main.main(replay))
