"""Goodput of a run whose nodes fail, in closed form and by simulation; the interval of checkpoints that costs least.

A run on ``nodes`` nodes fails at a constant rate, ``nodes`` over the mean time between failures (MTBF) of a node. It trains for
an interval, pauses for a checkpoint, and so on; a failure throws it back to the newest checkpoint that is complete, after a
restart that may itself be interrupted. Without snapshots the expected time is known (Daly, equation 20 of "A higher order
estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22, 2006)::

    wall / useful = M / interval * exp((R + W) / M) * (exp((interval + pause) / M) - 1)

with the MTBF of the run M, the restart time R and, which Daly has not, the time W for which a checkpoint is written while
training continues: after a restart the next one is complete only when the run has lived for interval, pause and W, so that a
failure loses half an interval and a write. Its minimum over the interval is near ``sqrt(2 * pause * M)`` (Young, "A first order
approximation to the optimum checkpoint interval", Communications of the ACM 17, 1974). With snapshots in host memory, from which
most failures are repaired inside the job, :func:`expected_goodput` is an approximation, and :func:`simulate` follows the run
event by event. All times are in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

NODE_MTBF_HOURS = 6300.0
"""Hours between two failures of a node: 419 unexpected interruptions in 54 days on 2,048 nodes of eight GPUs ("The Llama 3 Herd
of Models", 2024, section 3.3.4), which makes 6,334."""
_GOLDEN = (math.sqrt(5) - 1) / 2
_HOPELESS = 0.01  # goodput below which a run counts as one that does not advance
_MANY_FAILURES = 1000  # after so many it is decided


class DoesNotAdvance(ValueError):
    """A simulated run spends less than one percent of its time on work that counts."""


@dataclass(frozen=True)
class Costs:
    """What a run pays for checkpoints and failures; seconds.

    Attributes:
        pause: training stands still for a checkpoint.
        write: from the end of the pause until the checkpoint is complete; training continues. The next checkpoint waits
            for it, so that an interval is never shorter.
        restart: from a failure to the first step after it, from a checkpoint.
        snapshot_every: work between two snapshots in host memory; 0 for none.
        snapshot_pause: training stands still for a snapshot.
        repair: from a failure to the first step after it, from snapshots, inside the job.
        repairable: share of failures that snapshots repair, 0 to 1; the others restart from a checkpoint.

    Raises:
        ValueError: a time that is negative or not finite, a share that is none, or failures to repair without snapshots.
    """

    pause: float
    restart: float
    write: float = 0.0
    snapshot_every: float = 0.0
    snapshot_pause: float = 0.0
    repair: float = 0.0
    repairable: float = 0.0

    def __post_init__(self) -> None:
        times = (self.pause, self.restart, self.write, self.snapshot_every, self.snapshot_pause, self.repair)
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise ValueError("times must be finite and not negative")
        if not 0 <= self.repairable <= 1:
            raise ValueError("repairable must be a share, 0 to 1")
        if self.repairable and not self.snapshot_every:
            raise ValueError("repairable needs snapshots: set snapshot_every")

    @property
    def plain(self) -> Costs:
        """The same without snapshots."""
        return replace(self, snapshot_every=0.0, snapshot_pause=0.0, repair=0.0, repairable=0.0)


ASSUMED = Costs(pause=2.0, restart=300.0, write=30.0, snapshot_every=60.0, snapshot_pause=0.2, repair=60.0, repairable=0.9)
"""Costs of a large run where nothing else is known: assumptions, not measurements."""


@dataclass(frozen=True)
class Simulated:
    """One simulated run; seconds.

    Attributes:
        wall: from start to end.
        useful: work that counts.
        lost: work that was done again.
        down: from failures to the first step after them.
        paused: for checkpoints and snapshots.
        failures: number of failures, including those during a restart.
    """

    wall: float
    useful: float
    lost: float
    down: float
    paused: float
    failures: int

    @property
    def goodput(self) -> float:
        """Share of the wall time that counts."""
        return self.useful / self.wall


def mtbf(nodes: int, node_hours: float = NODE_MTBF_HOURS) -> float:
    """Seconds between two failures of a run on several nodes.

    Args:
        nodes: number of nodes.
        node_hours: hours between two failures of one node.

    Raises:
        ValueError: not a positive number of nodes, or of hours.
    """
    if nodes < 1 or not 0 < node_hours < math.inf:
        raise ValueError("nodes and hours must be positive and finite")
    return node_hours * 3600.0 / nodes


def expected_goodput(interval: float, costs: Costs, between: float) -> float:
    """Expected share of useful time: without snapshots that of the formula above; with snapshots an approximation.

    It applies the formula twice. Snapshots are the checkpoints of a run that meets only the failures that they repair; its time
    for an interval is the interval of a run that meets only the other failures. ``tests/estimate/test_failures.py`` compares it
    with the simulation.

    Args:
        interval: work between two checkpoints, seconds.
        costs: of checkpoints, snapshots and failures.
        between: seconds between two failures.
    """
    inner = 1.0  # seconds for a second of work, with snapshots and the failures that they repair
    if costs.snapshot_every:
        inner = _slowdown(
            costs.snapshot_every, costs.snapshot_every + costs.snapshot_pause, costs.repair, between, costs.repairable
        )
    slowdown = _slowdown(interval, interval * inner + costs.pause, costs.restart, between, 1 - costs.repairable, costs.write)
    return 1 / slowdown


def _slowdown(work: float, seconds: float, restart: float, between: float, share: float, write: float = 0.0) -> float:
    """Seconds for a second of work: by Daly's formula with the share of failures that are met.

    Args:
        work: between two savepoints.
        seconds: in which that is done without failures, the pause included.
        restart: interrupted by failures of both kinds.
        between: seconds between two failures of both kinds.
        share: of the failures.
        write: from the end of the pause until a savepoint is complete.
    """
    if not share:
        return seconds / work
    own = between / share
    try:
        down = between * math.expm1(restart / between)  # expected seconds of a restart and of those that were interrupted
        return (own + down) * math.exp(write / own) * math.expm1(seconds / own) / work
    except OverflowError:
        return math.inf


def young(pause: float, between: float) -> float:
    """Young's interval between two checkpoints, the first-order optimum: ``sqrt(2 * pause * between)`` (Young 1974).

    Args:
        pause: training stands still for a checkpoint, seconds.
        between: seconds between two failures.

    Returns:
        Seconds.
    """
    return math.sqrt(2 * pause * between)


def daly(pause: float, between: float) -> float:
    """Daly's interval between two checkpoints, the higher-order optimum (Daly 2006, equation 37).

    Args:
        pause: training stands still for a checkpoint, seconds.
        between: seconds between two failures.

    Returns:
        Seconds of work, without the pause.
    """
    if pause >= 2 * between:
        return between
    ratio = math.sqrt(pause / (2 * between))
    return math.sqrt(2 * pause * between) * (1 + ratio / 3 + ratio**2 / 9) - pause


def optimum(costs: Costs, between: float) -> float:
    """The interval between two checkpoints with the highest :func:`expected_goodput`, found by golden-section search.

    The work that a failure loses to an unfinished write does not depend on the interval, so it does not move the optimum.

    Args:
        costs: of checkpoints, snapshots and failures.
        between: seconds between two failures.

    Returns:
        Seconds of work, no less than a write; without a pause, which could be repeated at will, a write or a second.
    """
    if costs.pause <= 0:
        return max(costs.write, 1.0)
    own = between / max(1 - costs.repairable, 1e-3)  # between two failures that need a checkpoint
    low, high = costs.pause * 1e-3, 20 * max(own, costs.pause)
    alone = replace(costs, restart=0.0, write=0.0)  # constant factors, which would only hide differences where they are huge
    begin, end = math.log(low), math.log(high)

    def waste(log_interval: float) -> float:
        return -expected_goodput(math.exp(log_interval), alone, between)

    left, right = end - _GOLDEN * (end - begin), begin + _GOLDEN * (end - begin)
    for _ in range(100):
        if waste(left) < waste(right):
            end, right = right, left
            left = end - _GOLDEN * (end - begin)
        else:
            begin, left = left, right
            right = begin + _GOLDEN * (end - begin)
    return max(math.exp((begin + end) / 2), costs.write)


def simulate(costs: Costs, interval: float, between: float, work: float, rng: Random) -> Simulated:
    """Simulate a run until it has done its work.

    Args:
        costs: of checkpoints and failures.
        interval: work between two checkpoints, seconds.
        between: mean seconds between two failures, exponentially distributed.
        work: seconds of useful work.
        rng: random numbers.

    Raises:
        DoesNotAdvance: the run fails again before it has done work that counts.
        ValueError: the interval is shorter than a write.
    """
    if interval <= 0 or interval < costs.write:
        raise ValueError("the interval must be positive and no shorter than a write")
    wall = lost = down = paused = 0.0
    position, saved, snapshot = 0.0, 0.0, 0.0  # work done, in the newest complete checkpoint, in the newest snapshot
    failures = 0
    while True:
        alive = rng.expovariate(1 / between)
        reached, complete, held, pauses, used = _advance(costs, interval, position, saved, snapshot, work, alive)
        wall, paused = wall + used, paused + pauses
        if reached >= work:
            return Simulated(wall, work, lost, down, paused, failures)
        repaired = rng.random() < costs.repairable
        saved = complete
        position = snapshot = max(held, complete) if repaired else complete
        lost += reached - position
        seconds, again = _restart(costs.repair if repaired else costs.restart, between, rng)
        wall, down = wall + seconds, down + seconds
        failures += 1 + again
        if failures >= _MANY_FAILURES and position < _HOPELESS * wall:
            raise DoesNotAdvance("the run fails before it advances: its checkpoints or restarts take longer than it lives")


def _advance(
    costs: Costs, interval: float, position: float, saved: float, snapshot: float, work: float, alive: float
) -> tuple[float, float, float, float, float]:
    """Train from a position for at most ``alive`` seconds.

    Returns:
        Work reached, in the newest complete checkpoint, in the newest snapshot; seconds paused, and used in all.
    """
    clock = paused = 0.0
    every = costs.snapshot_every
    pending: tuple[float, float] | None = None  # when a checkpoint will be complete, and its work
    while True:
        next_save = (math.floor(position / interval + 1e-9) + 1) * interval
        next_snapshot = (math.floor(position / every + 1e-9) + 1) * every if every else math.inf
        target = min(next_save, next_snapshot, work)
        if clock + target - position >= alive:
            position, clock = position + alive - clock, alive
            break
        clock, position = clock + target - position, target
        if position >= work:
            break
        pause = costs.snapshot_pause if target == next_snapshot else 0.0
        pause += costs.pause if target == next_save else 0.0
        if clock + pause >= alive:  # it fails in the pause, so that nothing was taken
            paused, clock = paused + alive - clock, alive
            break
        clock, paused = clock + pause, paused + pause
        if target == next_snapshot:
            snapshot = position
        if target == next_save:
            if pending is not None and pending[0] <= clock:
                saved = pending[1]
            pending = clock + costs.write, position
    if pending is not None and pending[0] <= clock:
        saved = pending[1]
    return position, saved, snapshot, paused, clock


def _restart(seconds: float, between: float, rng: Random) -> tuple[float, int]:
    """Time until a restart has succeeded, and failures during it."""
    total = 0.0
    for failures in range(_MANY_FAILURES):
        alive = rng.expovariate(1 / between)
        if alive >= seconds:
            return total + seconds, failures
        total += alive
    raise DoesNotAdvance("the run fails before it has restarted: a restart takes longer than it lives")
