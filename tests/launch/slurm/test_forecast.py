"""When a run will be done: time limits, queue and starts so far."""

from __future__ import annotations

import pytest

from launch.slurm.forecast import Forecast, Pauses, forecast, pauses


@pytest.mark.parametrize(
    ("left", "limit", "attempt", "expected"),
    [
        (600.0, None, 3600.0, Forecast(1600.0, 0, 600.0)),  # no limit
        (600.0, 600.0, 3600.0, Forecast(1600.0, 0, 600.0)),  # just fits
        (600.0, 500.0, None, Forecast(1600.0, 0, 600.0)),
        (600.0, 599.0, 3600.0, Forecast(1000 + 600 + 320.0, 1, 620.0)),
        (600.0, -50.0, 3600.0, Forecast(1000 + 600 + 320.0, 1, 620.0)),  # it is saving
        (600.0 + 3 * 3580, 600.0, 3600.0, Forecast(1000 + 600 + 3 * 3580 + 3 * 320.0, 3, 600 + 3 * 3580 + 60.0)),
        (10.0, 0.0, 5.0, Forecast(1000 + 10 + 10 * 320.0, 10, 210.0)),  # starts take longer than an attempt
    ],
)
def test_each_further_attempt_costs_a_return_to_the_queue_and_a_start(
    left: float, limit: float | None, attempt: float | None, expected: Forecast
) -> None:
    assert forecast(1000.0, left, limit, attempt, Pauses(queue=300.0, start=20.0)) == expected


def test_the_queue_is_that_between_attempts_and_before_the_second_that_of_the_submission() -> None:
    first = {"started_at": 400.0, "training_at": 420.0}
    assert pauses([first], 100.0) == Pauses(300.0, 20.0)
    assert pauses([first], None) == Pauses(0.0, 20.0)
    again = {"started_at": 1010.0, "training_at": 1050.0, "ended_at": 2000.0}
    assert pauses([{**first, "ended_at": 1000.0}, again, {"started_at": 2030.0}, {"cause": "?"}], 100.0) == Pauses(20.0, 30.0)
    assert pauses([{**first, "ended_at": 1000.0}, {"started_at": 990.0}], 100.0).queue == 0.0  # clocks of two nodes
    assert pauses([], 100.0) == Pauses()
