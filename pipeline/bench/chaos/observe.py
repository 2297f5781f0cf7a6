"""Observes a run from outside, by the signatures of its steps: progress, repeated steps, equality with another run."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pipeline.training.signature_file import Signature, read

_NAME = re.compile(r"attempt-(\d{4,9})-rank-(\d{1,6})\.bin", re.ASCII)
_UNUSUAL = 5.0  # steps that take so many times the usual time count as standing still


def records(run: Path) -> dict[int, list[tuple[int, Signature]]]:
    """Attempt and signature of each recorded step, in order, by rank."""
    by_rank: dict[int, list[tuple[int, Signature]]] = defaultdict(list)
    for path in sorted((run / "signatures").glob("attempt-*.bin")):
        if match := _NAME.fullmatch(path.name):
            by_rank[int(match[2])] += [(int(match[1]), one) for one in read(path) if isinstance(one, Signature)]
    return dict(by_rank)


def repeated(run: Path) -> int:
    """Steps that rank 0 recorded more than once, each counted as often as it was executed again."""
    steps = [signature.step for _, signature in records(run).get(0, [])]
    return len(steps) - len(set(steps))


def differing(run: Path, reference: Path, samples_per_step: int) -> tuple[int, int]:
    """Compares the signatures of two runs.

    Args:
        run, reference: run directories, of the same number of ranks.
        samples_per_step: samples of a global batch.

    Returns:
        Records of steps, over all ranks and attempts, that are not bit-equal to the reference's, or are missing; and samples of
        steps whose global batch is another one, or is missing.
    """
    ours, theirs = records(run), records(reference)
    unequal, batches = 0, set[int]()
    for rank, expected in theirs.items():
        correct = {signature.step: signature for _, signature in expected}
        done = set[int]()
        for _, signature in ours.get(rank, []):
            done.add(signature.step)
            other = correct.get(signature.step)
            unequal += other is None or other.bits != signature.bits
            if other is None or other.samples != signature.samples:
                batches.add(signature.step)
        missing = correct.keys() - done
        unequal += len(missing)
        batches |= missing
    return unequal, len(batches) * samples_per_step


def weights(run: Path, step: int) -> dict[str, bytes]:
    """Every file of tensors of a checkpoint, by name; empty if there is none."""
    folder = run / "checkpoints" / f"step_{step:09d}"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class Progress(threading.Thread):
    """Notes when each step was first complete.

    Args:
        run: the run directory.
        interval: seconds between two looks.

    Attributes:
        times: monotonic time and number of complete steps, whenever the number rose.
        latest: steps complete in the newest attempt.
        firsts: monotonic time of the first step of each attempt.
        last: monotonic time of the last step of any attempt, new or repeated.
    """

    def __init__(self, run: Path, interval: float = 0.02) -> None:
        super().__init__(daemon=True)
        self.times: list[tuple[float, int]] = []
        self.firsts: dict[int, float] = {}
        self.latest, self.last = 0, 0.0
        self._run, self._interval = run, interval
        self._sizes: dict[Path, int] = {}
        self._over = threading.Event()
        self._looking = threading.Lock()

    @property
    def steps(self) -> int:
        """Complete steps, of any attempt."""
        return self.times[-1][1] if self.times else 0

    def run(self) -> None:
        """Looks until :meth:`close`."""
        while not self._over.wait(self._interval):
            self.look()

    def look(self) -> None:
        """Looks once."""
        with self._looking:
            self._look()

    def _look(self) -> None:
        for path in sorted((self._run / "signatures").glob("attempt-*-rank-0.bin")):
            try:
                size = path.stat().st_size
                if size == self._sizes.get(path):
                    continue
                self._sizes[path] = size
                now = time.monotonic()
                done = [one.step for one in read(path) if isinstance(one, Signature)]
            except OSError:
                continue
            if done:
                self.firsts.setdefault(int(path.name.split("-")[1]), now)
                self.latest, self.last = done[-1] + 1, now
                if max(done) + 1 > self.steps:
                    self.times.append((now, max(done) + 1))

    def close(self) -> None:
        """Ends the thread after a last look."""
        self._over.set()
        self.join()
        self.look()


def usual_step(times: Sequence[tuple[float, int]]) -> float:
    """Median seconds of a step; zero if there are fewer than two."""
    return statistics.median([(b - a) / (n - m) for (a, m), (b, n) in pairwise(times)] or [0.0])


def lost_seconds(times: Sequence[tuple[float, int]], fault: float, last: float = 0.0) -> float:
    """Time after a fault in which no step was completed for the first time, beyond the usual time of a step.

    Only gaps of more than five usual steps count, so that the noise of a busy machine hardly does; repeated steps count, since
    they are not completed for the first time.

    Args:
        times: moments and numbers of complete steps, see :class:`Progress`.
        fault: moment of the fault, on the same clock.
        last: moment of the last step of any attempt; later than the last of ``times`` if steps were repeated after all had been
            complete once, as when their checkpoints are lost.
    """
    usual = usual_step(times)
    lost = 0.0
    for (before, done), (after, done_after) in pairwise(times):
        expected = usual * (done_after - done)
        if after > fault and after - before > _UNUSUAL * expected:
            lost += after - before - expected
    return lost + max(last - times[-1][0], 0.0) if times else 0.0
