"""The assignment of slots to data sets, asked in any pieces."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from pipeline.data.order.interleave import PERIOD, Interleaver

STREAMS, SLOTS = 4, 3 * PERIOD


def all_slots(weights: list[int]) -> tuple[Interleaver, np.ndarray, np.ndarray]:
    interleaver = Interleaver(weights, STREAMS, 5)
    return interleaver, *interleaver.slots(range(STREAMS), 0, SLOTS)


@pytest.mark.parametrize("weights", [[1], [1, 3, 7], [2000, 1]])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (PERIOD - 1, 3), (PERIOD - 2, 2), (PERIOD - 1, 1), (1000, PERIOD + 100)])
def test_pieces_are_parts_of_the_whole(weights: list[int], start: int, count: int) -> None:
    interleaver, labels, positions = all_slots(weights)
    streams = [2, 0]
    piece = pickle.loads(pickle.dumps(interleaver)).slots(streams, start, count)
    assert piece[0].shape == piece[1].shape == (2, count)
    assert np.array_equal(piece[0], labels[streams, start : start + count])
    assert np.array_equal(piece[1], positions[streams, start : start + count])


@pytest.mark.parametrize("weights", [[1], [1, 3, 7], [2000, 1], [1, 700, 2000]])
def test_each_position_has_its_slot_within_its_bounds(weights: list[int]) -> None:
    interleaver, labels, positions = all_slots(weights)
    for dataset in range(len(weights)):
        first, last = SLOTS, 0
        for stream in range(STREAMS):
            slots = np.flatnonzero(labels[stream] == dataset)
            assert sorted(positions[stream, slots].tolist()) == list(range(len(slots)))
            chosen = slots if len(slots) < 40 else slots[:: len(slots) // 40]
            assert [interleaver.slot_of(dataset, stream, int(positions[stream, slot])) for slot in chosen] == chosen.tolist()
            for begin, end in ((0, 1), (PERIOD - 1, PERIOD + 1), (PERIOD, 2 * PERIOD), (1500, 1500)):
                low, high = interleaver.bounds(dataset, begin, end)
                inside = positions[stream, begin:end][labels[stream, begin:end] == dataset]
                assert all(low <= position < high for position in inside)
                first, last = min(first, low), max(last, high)
        assert first == 0 and last <= 2 * PERIOD + len(weights) + 4


def test_one_data_set_has_every_slot() -> None:
    interleaver = Interleaver([3], STREAMS, 0)
    labels, positions = interleaver.slots([1, 2], 7, 3)
    assert labels.tolist() == [[0] * 3] * 2 and positions.tolist() == [[7, 8, 9]] * 2
    assert interleaver.fractions == (1.0,)
    assert (interleaver.bounds(0, 4, 9), interleaver.slot_of(0, 1, 4711)) == ((4, 9), 4711)


def test_bounds_are_as_narrow_as_the_fractions() -> None:
    interleaver = Interleaver([1, 3], STREAMS, 0)
    for dataset, fraction in enumerate((0.25, 0.75)):
        low, high = interleaver.bounds(dataset, 5 * PERIOD, 6 * PERIOD)
        assert fraction * 5 * PERIOD - 6 < low <= fraction * 5 * PERIOD
        assert fraction * 6 * PERIOD <= high < fraction * 6 * PERIOD + 6


@pytest.mark.parametrize("weights", [[2, 3], [1, 1, 1], [5, 1, 400], [1, 1]])
def test_slots_are_taken_by_the_fair_queue(weights: list[int]) -> None:
    interleaver, whole, horizon = Interleaver(weights, STREAMS, 0), sum(weights), 60
    for stream in range(STREAMS):
        # Data set d is due for the j-th time at the first t at which weight / whole * t + (stream + 1/2) / streams >= j.
        due = []
        for dataset, weight in enumerate(weights):
            times = [weight * t * 2 * STREAMS + (2 * stream + 1) * whole for t in range(horizon)]
            counts = [time // (2 * STREAMS * whole) for time in times]
            due += [(counts.index(j), dataset) for j in range(1, counts[-1] + 1)]
        due.sort()
        for slots in range(horizon - len(weights) - 2):
            assert interleaver.taken(stream, slots) == [sum(d == n for _, d in due[:slots]) for n in range(len(weights))]


def test_what_is_returned_has_its_types_whatever_the_weights() -> None:
    for weights in ([1], [1, 2]):
        labels, positions = Interleaver(weights, STREAMS, 0).slots([0], 0, 5)
        assert (labels.dtype, positions.dtype) == (np.uint16, np.int64)
