"""``fovea estimate`` proposes an interval of checkpoints whose goodput is that of the simulation, and counts snapshots."""

from __future__ import annotations

import math
import re
import statistics
from io import StringIO
from random import Random
from typing import Any

import pytest
from rich.console import Console

from launch.cli import estimate_interval
from launch.cli.estimate import Bill, Sizes, bill, measure
from launch.cli.estimate_interval import checkpoint_bytes, interval, proposed, snapshot_bytes, snapshots
from launch.slurm.profile import ClusterProfile, ContainerSettings
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.config.types import Length
from pipeline.estimate.failures import Costs, simulate

SNAPSHOTS = ("launch.restarts=5", "checkpoint.snapshot_every=10 steps")


def config_of(*overrides: str) -> Config:
    basic = ["data.shards=none.tar", "train.duration=10 epochs", "train.global_batch_size=64"]
    return load("dinov2/scenes_vit_tiny", [*basic, *overrides]).config


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return measure(config_of())


def total_of(seconds: float, steps: int = 10_000, epoch: int | None = None) -> Bill:
    """A run whose step takes so long."""
    return Bill(steps, 64 * steps, 1.0, 64 / seconds, seconds * steps / 3600, 0.0, None, None, epoch)


def printed(action: Any, *arguments: Any, **options: Any) -> str:
    out = StringIO()
    action(*arguments, **options, console=Console(file=out, width=1000))
    return out.getvalue()


def test_the_proposed_interval_is_best_and_follows_the_profile(sizes: Sizes) -> None:
    config = config_of()
    site = ClusterProfile(nodes=2, gpus_per_node=4, gpu_tflops=1.0, node_mtbf_hours=1.0, restart_seconds=60)
    total = bill(config, site, ranks=8, efficiency=0.5, samples=6400)
    best = proposed(config, site, total, sizes, ranks=8)
    step = total.hours * 3600 / total.steps
    assert best.failure_hours == 0.5 and best.minutes == pytest.approx(best.steps * step / 60)
    assert best.gigabytes == pytest.approx(4 * (3 * sizes.trained + sum(sizes.frozen) + sum(sizes.teacher)) / 1e9)
    assert best.costs.write == pytest.approx(best.gigabytes / 2) and best.costs.restart == pytest.approx(60 + best.costs.write)
    for every in (best.steps // 3, 3 * best.steps):
        other = config.replace(checkpoint=config.checkpoint.model_copy(update={"every": Length(every, "steps")}))
        assert proposed(other, site, total, sizes, ranks=8).goodput_now < best.goodput
    rarely = site.model_copy(update={"node_mtbf_hours": 100.0})
    assert proposed(config, rarely, total, sizes, ranks=8).steps == pytest.approx(10 * best.steps, rel=0.05)
    text = printed(interval, config, site, total, sizes, ranks=8)
    assert f"checkpoint.every='{best.steps} steps'" in text and "1 hours between failures" in text


def simulated(costs: Costs, seconds: float, between: float) -> tuple[float, float]:
    """Simulated share of the time that is lost, and half of its 99.9 % interval, in percent."""
    runs = [100 * (1 - simulate(costs, seconds, between, 100 * between, Random(n)).goodput) for n in range(30)]
    return statistics.mean(runs), 3.3 * statistics.stdev(runs) / math.sqrt(len(runs))


@pytest.mark.parametrize("overrides", [(), SNAPSHOTS])
def test_what_is_printed_is_what_the_simulation_loses(sizes: Sizes, overrides: tuple[str, ...]) -> None:
    config = config_of("checkpoint.every=900 steps", *overrides)
    slow = checkpoint_bytes(config, sizes) / 1e9 / 200  # GB/s: a checkpoint is written for 200 s, longer than the interval
    site = ClusterProfile(gpus_per_node=1, node_mtbf_hours=1.0, restart_seconds=100, checkpoint_gb_per_second=slow)
    total = total_of(1.0)
    best = proposed(config, site, total, sizes, ranks=1)
    text = printed(interval, config, site, total, sizes, ranks=1)
    match = re.search(r"loses least: ([\d.]+) % of the time.*, ([\d.]+) % with the configured", text)
    assert match is not None, text
    assert best.costs.write == pytest.approx(200) and bool(best.costs.snapshot_every) is bool(overrides)
    for shown, steps in zip(match.groups(), (best.steps, best.now), strict=True):
        lost, half = simulated(best.costs, float(steps), best.failure_hours * 3600)
        assert abs(float(shown) - lost) < half + 0.05, (shown, lost, half)
        assert half < 2.5, "less than the 5 % of a write"


def test_an_interval_in_epochs_has_the_steps_of_an_epoch(sizes: Sizes) -> None:
    site = ClusterProfile(gpus_per_node=1, gpu_tflops=1.0)
    for duration in ("10 epochs", "1000 steps"):
        config = config_of("checkpoint.every=2 epochs", f"train.duration={duration}")
        total = bill(config, site, ranks=1, efficiency=0.5, samples=6400)
        assert (total.steps, total.epoch) == (1000, 6400)
        assert proposed(config, site, total, sizes, ranks=1).now == 200, duration


def test_samples_of_an_epoch_are_counted_where_only_the_interval_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import numpy as np

    manifest = SimpleNamespace(total=640, shards=SimpleNamespace(sizes=np.array([6400])))
    monkeypatch.setattr("pipeline.data.indexing.indexed", lambda *_: manifest)
    site = ClusterProfile(gpus_per_node=1, gpu_tflops=1.0)
    for every, epoch in (("1 epochs", 640), ("100 steps", None)):
        config = config_of(f"checkpoint.every={every}", "train.duration=1000 steps")
        assert bill(config, site, ranks=1, efficiency=0.5, samples=None).epoch == epoch


def test_snapshots_take_two_copies_of_the_nodes_share_and_of_its_neighbours(sizes: Sizes) -> None:
    config = config_of(*SNAPSHOTS)
    state = 4 * (3 * sizes.trained + sum(sizes.frozen) + sum(sizes.teacher))
    assert snapshot_bytes(config, sizes, 1) == 2 * state and snapshot_bytes(config, sizes, 4) == state
    assert snapshot_bytes(config_of(*SNAPSHOTS, "optim.name=sgd"), sizes, 1) == 2 * (state - 4 * sizes.trained)
    assert "files of the node before" in printed(snapshots, config, ClusterProfile(gpus_per_node=1), sizes, ranks=2)
    gigabytes = f"{2 * state / 1e9:,.2f} GB of host memory"
    text = printed(snapshots, config, ClusterProfile(gpus_per_node=1), sizes, ranks=1)
    assert gigabytes in text and "half" not in text and "no snapshots" not in text, "a profile without memory"
    for memory, fits in (("64G", True), ("20M", False)):
        text = printed(snapshots, config, ClusterProfile(gpus_per_node=1, memory=memory), sizes, ranks=1)
        assert "half of a node's memory" in text and ("do not fit" not in text) is fits, text
    assert "of 34.4 GB" in printed(snapshots, config, ClusterProfile(gpus_per_node=1, memory="64G"), sizes, ranks=1)


def test_without_a_cluster_snapshots_are_compared_with_the_memory_of_this_machine(
    sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4_000_000}
    monkeypatch.setattr(estimate_interval.os, "sysconf", pages.__getitem__)
    assert "of 2.0 GB, half of a node's memory." in printed(snapshots, config_of(*SNAPSHOTS), None, sizes, ranks=2)


@pytest.mark.parametrize("overrides", [("launch.restarts=0",), ("launch.restarts=5",)])
def test_nothing_is_printed_of_snapshots_that_are_not_configured(sizes: Sizes, overrides: tuple[str, ...]) -> None:
    site = ClusterProfile(gpus_per_node=1, node_mtbf_hours=10.0)
    assert printed(snapshots, config_of(*overrides), site, sizes, ranks=1) == ""
    assert "Snapshots" not in printed(interval, config_of(*overrides), site, total_of(1.0), sizes, ranks=1)


def test_goodput_with_snapshots_is_printed_beside_that_without(sizes: Sizes) -> None:
    site = ClusterProfile(gpus_per_node=1, node_mtbf_hours=10.0)
    plain = proposed(config_of(), site, total_of(1.0), sizes, ranks=1)
    best = proposed(config_of(*SNAPSHOTS), site, total_of(1.0), sizes, ranks=1)
    assert best.costs.snapshot_every == 10.0 and best.goodput > best.goodput_plain == pytest.approx(plain.goodput)
    text = printed(interval, config_of(*SNAPSHOTS), site, total_of(1.0), sizes, ranks=1)
    lost = [f"{100 * (1 - value):.2f} %" for value in (best.goodput, best.goodput_plain)]
    assert f"Snapshots: {lost[0]} lost with one every 10.0 s, {lost[1]} without them" in text and "repair 90%" in text


def test_snapshots_that_are_not_taken_save_nothing(sizes: Sizes) -> None:
    config, site = config_of(*SNAPSHOTS), ClusterProfile(container=ContainerSettings(image="/x.sqsh"))
    assert not proposed(config, site, total_of(1.0), sizes, ranks=2).costs.snapshot_every
    assert "no snapshots are taken" in printed(snapshots, config, site, sizes, ranks=2)
