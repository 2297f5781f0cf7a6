"""Simulated runs agree with Daly's formula where it holds; the proposed interval is where the simulated goodput is highest."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from random import Random

import pytest

from pipeline.estimate.failures import (
    ASSUMED,
    NODE_MTBF_HOURS,
    Costs,
    DoesNotAdvance,
    daly,
    expected_goodput,
    mtbf,
    optimum,
    simulate,
    young,
)

PLAIN = Costs(pause=20.0, restart=120.0)


def goodputs(costs: Costs, interval: float, between: float, runs: int = 60, work: float = 400_000.0) -> list[float]:
    return [simulate(costs, interval, between, work, Random(f"{number}")).goodput for number in range(runs)]


@pytest.mark.parametrize("between", [1800.0, 7200.0, 100_000.0])
@pytest.mark.parametrize("interval", [300.0, 1200.0])
def test_simulated_runs_agree_with_the_closed_form(interval: float, between: float) -> None:
    inverse = [1 / value for value in goodputs(PLAIN, interval, between)]  # the formula is of the expected time
    error = statistics.stdev(inverse) / math.sqrt(len(inverse))
    expected = 1 / expected_goodput(interval, PLAIN, between)
    assert abs(statistics.mean(inverse) - expected) < 4 * error + 1e-3 * expected
    assert error < 0.01 * expected


@pytest.mark.parametrize(("interval", "between"), [(209.0, 11_000.0), (600.0, 3000.0), (200.0, 1000.0)])
def test_the_closed_form_counts_the_unfinished_write(interval: float, between: float) -> None:
    costs = Costs(pause=2.0, restart=100.0, write=150.0)
    inverse = [1 / value for value in goodputs(costs, interval, between)]
    error = statistics.stdev(inverse) / math.sqrt(len(inverse))
    expected = 1 / expected_goodput(interval, costs, between)
    assert abs(statistics.mean(inverse) - expected) < 4 * error + 1e-3 * expected
    without = 1 / expected_goodput(interval, replace(costs, write=0.0), between)
    assert statistics.mean(inverse) - without > 6 * error, "a formula without the write would be noticed"


@pytest.mark.parametrize("repairable", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("between", [3000.0, 11_000.0])
def test_the_formula_with_snapshots_is_close_to_the_simulation(repairable: float, between: float) -> None:
    costs = replace(ASSUMED, repairable=repairable)
    inverse = [1 / value for value in goodputs(costs, 600.0, between, runs=30)]
    error = statistics.stdev(inverse) / math.sqrt(len(inverse))
    expected = 1 / expected_goodput(600.0, costs, between)
    assert abs(statistics.mean(inverse) - expected) < 4 * error + 3e-3 * expected


def test_with_snapshots_checkpoints_can_be_rarer() -> None:
    plain, repaired = optimum(ASSUMED.plain, 11_000.0), optimum(ASSUMED, 11_000.0)
    assert repaired == pytest.approx(plain * math.sqrt(1 / 0.1), rel=0.05), "only every tenth failure needs a checkpoint"
    assert optimum(replace(ASSUMED, restart=1e9), 11_000.0) == pytest.approx(repaired, rel=1e-3)


def test_the_simulation_would_notice_a_wrong_formula() -> None:
    inverse = [1 / value for value in goodputs(PLAIN, 300.0, 1800.0)]
    error = statistics.stdev(inverse) / math.sqrt(len(inverse))
    for wrong in (Costs(pause=10.0, restart=120.0), Costs(pause=20.0, restart=60.0)):
        assert abs(statistics.mean(inverse) - 1 / expected_goodput(300.0, wrong, 1800.0)) > 6 * error


def test_parts_of_the_wall_time_add_up() -> None:
    costs = Costs(20.0, 120.0, write=50.0, snapshot_every=60.0, snapshot_pause=0.5, repair=10.0, repairable=0.8)
    for number in range(20):
        one = simulate(costs, 600.0, 3000.0, 50_000.0, Random(number))
        assert one.wall == pytest.approx(one.useful + one.lost + one.down + one.paused)
        assert one.useful == 50_000.0


def test_without_failures_only_pauses_cost() -> None:
    one = simulate(PLAIN, 500.0, 1e15, 10_000.0, Random(0))
    assert (one.failures, one.lost, one.down) == (0, 0.0, 0.0)
    assert one.paused == 19 * 20.0, "no checkpoint is needed at the end of the work"


def test_a_failure_loses_half_an_interval_and_an_unfinished_write() -> None:
    interval, write = 600.0, 200.0
    costs = Costs(0.0, 0.0, write=write)
    runs = [simulate(costs, interval, 50_000.0, 5e6, Random(number)) for number in range(30)]
    mean = sum(one.lost for one in runs) / sum(one.failures for one in runs)
    assert mean == pytest.approx(interval / 2 + write, rel=0.05)


def test_snapshots_bound_what_is_lost() -> None:
    costs = Costs(0.0, 60.0, snapshot_every=30.0, repair=5.0, repairable=1.0)
    runs = [simulate(costs, 3600.0, 5000.0, 1e6, Random(number)) for number in range(10)]
    assert sum(one.lost for one in runs) / sum(one.failures for one in runs) == pytest.approx(15.0, rel=0.1)
    plain = simulate(costs.plain, 3600.0, 5000.0, 1e6, Random(0))
    assert runs[0].goodput > plain.goodput + 0.2


def test_classical_intervals_and_the_optimum_of_the_formula() -> None:
    pause, between = 20.0, 100_000.0
    assert young(pause, between) == pytest.approx(2000.0)
    assert daly(pause, between) == pytest.approx(2000 * (1 + 0.01 / 3 + 0.0001 / 9) - 20)
    assert daly(100.0, 40.0) == 40.0
    best = optimum(Costs(pause, 120.0), between)
    assert best == pytest.approx(daly(pause, between), rel=0.001)
    for other in (0.8 * best, 1.25 * best):
        assert expected_goodput(other, PLAIN, between) < expected_goodput(best, PLAIN, between)


def test_the_optimum_is_best_in_simulation_too() -> None:
    between = 5000.0
    best = optimum(PLAIN, between)
    means = {factor: statistics.mean(goodputs(PLAIN, factor * best, between, work=1e6)) for factor in (0.33, 1.0, 3.0)}
    assert means[1.0] > max(means[0.33], means[3.0])


def test_an_interval_is_no_shorter_than_a_write() -> None:
    costs = Costs(pause=0.1, restart=60.0, write=500.0)
    assert optimum(costs, 10_000.0) == 500.0
    with pytest.raises(ValueError, match="no shorter than a write"):
        simulate(costs, 499.0, 10_000.0, 1000.0, Random(0))


def test_the_default_mtbf_is_that_of_its_source() -> None:
    assert pytest.approx(2048 * 54 * 24 / 419, rel=0.01) == NODE_MTBF_HOURS
    assert mtbf(2048) == pytest.approx(NODE_MTBF_HOURS * 3600 / 2048)
    with pytest.raises(ValueError, match="must be positive"):
        mtbf(0)


def test_a_run_that_cannot_advance_is_refused() -> None:
    assert expected_goodput(1e6, PLAIN, 1.0) == 0.0
    with pytest.raises(DoesNotAdvance, match="before it has restarted"):
        simulate(Costs(pause=1.0, restart=1000.0), 10.0, 20.0, 1e5, Random(0))
    with pytest.raises(DoesNotAdvance, match="before it advances"):
        simulate(Costs(pause=1.0, restart=0.0), 1000.0, 20.0, 1e5, Random(0))


def test_costs_are_finite_times_and_a_share() -> None:
    for values, text in (
        ({"pause": -1.0}, "not negative"),
        ({"restart": math.nan}, "finite"),
        ({"write": math.inf}, "finite"),
        ({"repairable": 0.5}, "set snapshot_every"),
        ({"repairable": 2.0, "snapshot_every": 1.0}, "a share"),
    ):
        with pytest.raises(ValueError, match=text):
            Costs(**({"pause": 1.0, "restart": 1.0} | values))
    with pytest.raises(ValueError, match="finite"):
        mtbf(1, math.inf)
