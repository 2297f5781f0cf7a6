"""Interval of checkpoints that ``fovea estimate`` proposes, and what snapshots in host memory take and save."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from launch.cli.estimate import Bill, Sizes
from launch.slurm.limits import megabytes
from launch.slurm.profile import ClusterProfile
from launch.slurm.render import snapshots_of
from launch.terminal import Terminal
from pipeline.config.schema import Config
from pipeline.estimate.failures import ASSUMED, Costs, expected_goodput, mtbf, optimum
from pipeline.estimate.memory import FP32

_TO_HOST = 10e9  # bytes/s at which a GPU's state is copied to host memory: PCIe 4 with a margin, not measured here
_KEPT = 2  # snapshots in host memory: the complete one, and the one that is being written


def checkpoint_bytes(config: Config, sizes: Sizes) -> int:
    """Bytes of a checkpoint: masters, the optimizer's moments, frozen parameters and teacher, fp32."""
    return FP32 * ((1 + config.optim.moments) * sizes.trained + sum(sizes.frozen) + sum(sizes.teacher))


def snapshot_bytes(config: Config, sizes: Sizes, nodes: int) -> float:
    """Bytes of a node's host memory that snapshots take, while one is complete and the next is being written; of several nodes,
    each also keeps the files of the one before.
    """
    return _KEPT * checkpoint_bytes(config, sizes) * min(nodes, 2) / nodes


def nodes_of(site: ClusterProfile | None, ranks: int) -> int:
    """Nodes of so many ranks; one without a cluster."""
    return math.ceil(ranks / site.tasks_per_node) if site is not None else 1


@dataclass(frozen=True)
class Interval:
    """A proposed interval between checkpoints.

    Attributes:
        steps: between two checkpoints.
        minutes: the same.
        goodput: expected share of useful time with it.
        now: steps between two checkpoints as configured.
        goodput_now: expected share of useful time with these.
        goodput_plain: expected share of useful time without snapshots, at the interval that is best then.
        failure_hours: mean hours between two failures of the run.
        gigabytes: size of a checkpoint.
        costs: of checkpoints, failures and, if they are taken, snapshots.
    """

    steps: int
    minutes: float
    goodput: float
    now: int
    goodput_now: float
    goodput_plain: float
    failure_hours: float
    gigabytes: float
    costs: Costs


def proposed(config: Config, site: ClusterProfile, total: Bill, sizes: Sizes, *, ranks: int) -> Interval:
    """Propose the interval with the highest expected goodput.

    Args:
        config: the settings.
        site: the cluster, with the failures of its nodes.
        total: time of the run, and samples per epoch.
        sizes: the method's parameters.
        ranks: GPUs.
    """
    nodes, size, batch = nodes_of(site, ranks), checkpoint_bytes(config, sizes), config.train.global_batch_size
    step = total.hours * 3600 / max(total.steps, 1)
    write, copy = size / (nodes * site.checkpoint_gb_per_second * 1e9), size / ranks / _TO_HOST
    restart = site.restart_seconds + write  # a checkpoint is read as fast as it is written
    if config.checkpoint.async_save:
        costs = Costs(pause=copy, restart=restart, write=write)
    else:
        costs = Costs(pause=write, restart=restart)
    if (every := config.checkpoint.snapshot_every) is not None and _taken(config, site, nodes):
        seconds = max(every.steps(total.epoch or 0, batch), 1) * step
        costs = replace(costs, snapshot_every=seconds, snapshot_pause=copy, repair=ASSUMED.repair, repairable=ASSUMED.repairable)
    between = mtbf(nodes, site.node_mtbf_hours)

    def best(own: Costs) -> int:
        return max(math.ceil(optimum(own, between) / step), 1)

    def goodput(own: Costs, steps: int) -> float:
        return expected_goodput(max(steps * step, own.write), own, between)  # the next checkpoint waits for a write

    steps, now = best(costs), max(config.checkpoint.every.steps(total.epoch or 0, batch), 1)
    return Interval(
        steps,
        steps * step / 60,
        goodput(costs, steps),
        now,
        goodput(costs, now),
        goodput(costs.plain, best(costs.plain)),
        between / 3600,
        size / 1e9,
        costs,
    )


def _taken(config: Config, site: ClusterProfile, nodes: int) -> bool:
    return snapshots_of(config, site.model_copy(update={"nodes": nodes}))


def interval(
    config: Config, site: ClusterProfile, total: Bill, sizes: Sizes, *, ranks: int, console: Terminal | None = None
) -> Interval:
    """Print :func:`proposed` with its assumptions."""
    out = console or Terminal()
    best = proposed(config, site, total, sizes, ranks=ranks)
    out.print(
        f"Checkpoints: checkpoint.every='{best.steps} steps' (every {best.minutes:.1f} minutes) loses least: "
        f"{_lost(best.goodput)} of the time to failures and checkpoints, {_lost(best.goodput_now)} with "
        f"the configured {best.now:,} steps. A failure every {best.failure_hours:,.0f} hours."
    )
    if best.costs.snapshot_every:
        out.print(
            f"Snapshots: {_lost(best.goodput)} lost with one every {best.costs.snapshot_every:,.1f} s, "
            f"{_lost(best.goodput_plain)} without them and with the interval of checkpoints that is best then."
        )
    out.print(
        f"Assumes {site.node_mtbf_hours:,.0f} hours between failures of a node (node_mtbf_hours of the profile; the default is "
        f"Llama 3's training), {site.restart_seconds:.0f} s to start again (restart_seconds) and {best.gigabytes:,.1f} GB a "
        f"checkpoint at {site.checkpoint_gb_per_second:g} GB/s a node (checkpoint_gb_per_second): a pause of "
        f"{best.costs.pause:.2f} s, complete after {best.costs.write:.1f} s more. The interval is the optimum of Daly (2006)."
        + (
            f" Snapshots repair {best.costs.repairable:.0%} of the failures in {best.costs.repair:.0f} s."
            if best.costs.repairable
            else ""
        ),
        style="dim",
    )
    return best


def _lost(goodput: float) -> str:
    return f"{100 * (1 - goodput):.2f} %"


def snapshots(config: Config, site: ClusterProfile | None, sizes: Sizes, *, ranks: int, console: Terminal | None = None) -> None:
    """Print the host memory that snapshots take on a node, and whether it fits; nothing if none are configured.

    Args:
        config: the settings.
        site: the cluster, whose ``memory`` is that of a node; ``None`` for this machine.
        sizes: the method's parameters.
        ranks: GPUs.
        console: the terminal.
    """
    if config.checkpoint.snapshot_every is None or not config.launch.restarts:
        return
    out, nodes = console or Terminal(), nodes_of(site, ranks)
    needed = snapshot_bytes(config, sizes, nodes)
    text = f"Snapshots take {needed / 1e9:,.2f} GB of host memory (/dev/shm) on a node: a complete one, and the one being written"
    text += ", each with the files of the node before" * (nodes > 1)
    if memory := _memory(site):
        half = memory / 2
        text += f", of {half / 1e9:,.1f} GB, half of a node's memory"
        if needed > half:
            text += ". They do not fit: use more nodes, or leave checkpoint.snapshot_every unset"
    out.print(f"{text}.")
    if site is not None and not _taken(config, site, nodes):
        out.print("In a container no snapshots are taken: restarts continue from checkpoints.")


def _memory(site: ClusterProfile | None) -> float:
    """Bytes of memory of a node, 0 if the profile does not say."""
    if site is not None:
        return megabytes(site.memory) * 2.0**20
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
