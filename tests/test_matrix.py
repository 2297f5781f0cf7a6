"""Every run tries enough of a matrix, and a full run all of it."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.matrix import cover, matrix

AXES = [("a", "b", "c", "d"), (1, 2, 3), (True, False, None), ("x", "y")]


@pytest.mark.parametrize("together", [1, 2, 3])
def test_each_choice_of_values_occurs_in_the_cover(together: int) -> None:
    chosen = cover(AXES, together)
    for places in itertools.combinations(range(len(AXES)), together):
        for values in itertools.product(*(AXES[place] for place in places)):
            assert any(all(one[place] == value for place, value in zip(places, values, strict=True)) for one in chosen), values
    assert len(chosen) == len(set(chosen)) < 4 * 3 * 3 * 2
    assert chosen == cover(AXES, together)


def test_what_the_cover_leaves_is_marked_and_nothing_is_lost() -> None:
    made = matrix(*AXES, always=[("d", 3, None, "y")])
    assert [one.values for one in made] == list(itertools.product(*AXES))
    every = {one.values for one in made if not one.marks}
    assert every == set(cover(AXES, 2, [("d", 3, None, "y")])) and ("d", 3, None, "y") in every
    assert 12 <= len(every) <= 20
