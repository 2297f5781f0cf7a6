"""Combinations of settings: which of them every run tries, and which are left to ``tests/run.sh --full``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def matrix(*axes: Sequence[Any], together: int = 2, always: Iterable[tuple[Any, ...]] = ()) -> list[Any]:
    """All combinations of the axes' values; those that are not needed for the cover are marked ``full``.

    Args:
        axes: the values of each parameter.
        together: the combinations that every run tries hold each value (1) or each pair of values of two axes (2).
        always: combinations that every run tries besides.
    """
    chosen = cover(axes, together, always)
    return [
        pytest.param(*one, marks=() if one in chosen else pytest.mark.full, id="-".join(map(str, one)))
        for one in itertools.product(*axes)
    ]


def fast_only(values: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """Values of one parameter, or tuples of several, some of them for ``tests/run.sh --fast``; the others are marked ``slow``."""
    chosen = list(fast)
    each = [(one, one if isinstance(one, tuple) else (one,)) for one in values]
    return [
        pytest.param(*parts, marks=() if one in chosen else pytest.mark.slow, id="-".join(map(str, parts))) for one, parts in each
    ]


def cover(axes: Sequence[Sequence[Any]], together: int, always: Iterable[tuple[Any, ...]] = ()) -> list[tuple[Any, ...]]:
    """Few combinations in which each choice of ``together`` axes' values occurs, the same ones every time."""
    everything = list(itertools.product(*axes))
    chosen = [one for one in everything if one in set(always)]
    missing = {part for one in everything for part in _parts(one, together)}
    missing -= {part for one in chosen for part in _parts(one, together)}
    while missing:
        # Of those that add most the one whose values were chosen least, so that no value is the partner of all others.
        best = max(
            everything, key=lambda one: (len(_parts(one, together) & missing), -sum(sum(o in c for c in chosen) for o in one))
        )
        chosen.append(best)
        missing -= _parts(best, together)
    return chosen


def _parts(one: tuple[Any, ...], size: int) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(one), size))
