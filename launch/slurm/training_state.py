"""What the newest attempt of a run reports (loss, speed, expected end, waits, errors), and what the run has cost."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.runtime import job_record as record
from pipeline.runtime.run_directory import RunDirectory
from pipeline.tracking import journal

_TAIL = 1 << 20  # bytes of a journal that are searched for the latest record
_NODE = re.compile(r"system/node(\d{1,6})/\w+")
_LONG = 30.0  # seconds in one phase after which a rank is named


@dataclass(frozen=True)
class TrainingState:
    """What the newest attempt reports.

    Attributes:
        loss: the latest logged loss.
        images_per_second: the latest logged speed.
        seconds_left: time that the remaining steps take at this speed.
        gpu_use: share of the time in which the GPUs were busy, latest logged, mean of the nodes; ``None`` without GPUs.
        gpu_memory: share of the GPUs' memory in use.
        idle_node: the node whose GPUs were busy least, if by 10 points less than the mean: number and share.
        waits: ranks that have been in one phase for long, such as reading data.
        errors: the first failures of the last attempts, newest first, with rank and node.
    """

    loss: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    gpu_use: float | None = None
    gpu_memory: float | None = None
    idle_node: tuple[int, float] | None = None
    waits: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """What a run has used, over all attempts.

    Attributes:
        hours: ranks times hours of attempts: GPU hours, or those of processes on a cluster without GPUs.
        gpus: whether they are GPU hours.
        price: in the profile's currency; ``None`` where it names no price.
        hours_left: further hours until the run is done; ``None`` where that is not known.
        price_left: their price.
    """

    hours: float = 0.0
    gpus: bool = False
    price: float | None = None
    hours_left: float | None = None
    price_left: float | None = None


def training_state(run: RunDirectory, attempt: int, steps: int, *, trains: bool) -> TrainingState:
    """Read what an attempt reports.

    Args:
        run: the run directory.
        attempt: its newest attempt; -1 for none.
        steps: total steps of the run; 0 where not known.
        trains: whether the attempt is running.
    """
    if attempt < 0:
        return TrainingState()
    step, seen, latest = 0, 0.0, {}
    for step_, values in _metrics(run, attempt):
        if "perf/images_per_second" in values:
            step, seen, latest = step_, values.get("perf/samples_seen", 0.0), values
    rate = latest.get("perf/images_per_second")
    left = max(steps - step, 0) * (seen / step) / rate if rate and step and steps else None
    waits = _waits(run, attempt) if trains else []
    use, memory = _of_nodes(latest, "gpu_share"), _of_nodes(latest, "gpu_memory_share")
    mean = sum(use.values()) / len(use) if use else None
    least = min(use.items(), key=lambda item: item[1], default=None)
    return TrainingState(
        latest.get("train/loss"),
        rate,
        left,
        mean,
        sum(memory.values()) / len(memory) if memory else None,
        least if least is not None and mean is not None and mean - least[1] >= 0.1 else None,
        waits,
        _errors(run, attempt),
    )


def _of_nodes(values: dict[str, float], name: str) -> dict[int, float]:
    """A system metric of each node, by its number."""
    matches = {_NODE.fullmatch(key): value for key, value in values.items() if key.endswith(f"/{name}")}
    return {int(match[1]): value for match, value in matches.items() if match}


def cost(run: RunDirectory, rows: list[dict[str, Any]], now: float | None = None, left: float | None = None) -> Cost:
    """Add up what the attempts of a run used.

    Args:
        run: the run directory.
        rows: its attempts, as in :attr:`launch.slurm.status.Status.attempts`.
        now: seconds since 1970; the current time by default.
        left: seconds for which the nodes are occupied until the run is done, if known.
    """
    now = time.time() if now is None else now
    profile = record.job(run).get("profile") or {}
    hours, processes = 0.0, 1
    for row in rows:
        if "started_at" in row:
            ranks = row.get("ranks")
            processes = ranks if type(ranks) is int and ranks > 0 else 1
            hours += max(float(row.get("ended_at", now)) - float(row["started_at"]), 0.0) / 3600 * processes
    price, gpus = profile.get("gpu_hour_price"), bool(profile.get("gpus_per_node"))
    each = float(price) if gpus and isinstance(price, (int, float)) else None
    further = left / 3600 * processes if left is not None else None
    if each is None:
        return Cost(hours, gpus, None, further)
    return Cost(hours, gpus, hours * each, further, further * each if further is not None else None)


def _metrics(run: RunDirectory, attempt: int) -> list[tuple[int, dict[str, float]]]:
    """Steps and values of the last records in an attempt's journal."""
    path = run.journal(attempt)
    try:
        offset = max(path.stat().st_size - _TAIL, 0)
        records = [line for _, line in journal.read(path, offset) if line["kind"] == "metrics"]
    except OSError:
        return []
    return [(line["step"], {name: float(value) for name, value in line["values"].items()}) for line in records]


def _waits(run: RunDirectory, attempt: int) -> list[str]:
    """Ranks that are in one phase for longer than half a minute; those that wait for others are not at fault."""
    texts = []
    for path in sorted((run.logs(attempt) / "pulse").glob("rank-*.json")):
        row = record.read(path)
        seconds = row.get("seconds")
        if isinstance(seconds, (int, float)) and seconds > _LONG and not row.get("waiting"):
            texts.append(f"rank {row.get('rank')} has been in {row.get('phase')} at step {row.get('step')} for {seconds:.0f} s")
    return texts


def _errors(run: RunDirectory, attempt: int, number: int = 3) -> list[str]:
    texts = []
    for one in range(attempt, max(attempt - number, -1), -1):
        if failure := record.failure(run, one):
            position = f"rank {failure.get('rank')} on {failure.get('node', '?')} at step {failure.get('step')}"
            texts.append(f"attempt {one}, {position}: {failure.get('what')}")
    return texts
