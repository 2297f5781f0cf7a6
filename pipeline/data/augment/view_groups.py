"""Views that one DALI graph can process together, and the noise that is fed to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.sizes import Size, height_width
from pipeline.data.augment.operators import CHANNEL_OPERATORS, OPERATORS
from pipeline.data.augment.views import ChannelSpec, Normalize, ViewSpec

NOISE = "noise"
"""Name of the input that holds the noise of each sample, which :func:`noise_of` makes from its seed."""


@dataclass(frozen=True)
class Group:
    """Views that one graph processes as one long batch, view after view; they differ only in their plans.

    Attributes:
        views: their positions in the plan.
        size, normalize, interpolation: as in :class:`ViewSpec`.
        operators: names and constants of the operators that at least one of the views uses.
        channels: as in :class:`ViewSpec`.
        channel_operators: names of those of :data:`CHANNEL_OPERATORS` that all of the views use.
    """

    views: tuple[int, ...]
    size: Size
    normalize: Normalize
    interpolation: str
    operators: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
    channels: ChannelSpec | None = None
    channel_operators: tuple[str, ...] = ()


def groups_of(specs: tuple[ViewSpec, ...]) -> list[Group]:
    """Groups views by what the graph must be built for."""
    views = [(spec, spec.augment[v % len(spec.augment)]) for spec in specs for v in range(spec.count)]
    members_by_kind: dict[Any, list[int]] = {}
    for index, (spec, augment) in enumerate(views):
        constants = tuple(getattr(augment, name) for operator in OPERATORS for name in operator.constants)
        used = tuple(operator.name for operator in CHANNEL_OPERATORS if operator.used(augment))
        kind = (spec.size, spec.normalize, spec.interpolation, constants, spec.channels, used)
        members_by_kind.setdefault(kind, []).append(index)
    groups = []
    for (size, normalize, interpolation, _, channels, used), members in members_by_kind.items():
        augments = [views[index][1] for index in members]
        operators = tuple(
            (operator.name, tuple((name, getattr(augments[0], name)) for name in operator.constants))
            for operator in OPERATORS
            if any(operator.used(augment) for augment in augments)
        )
        groups.append(Group(tuple(members), size, normalize, interpolation, operators, channels, used))
    return groups


def input_of(group: Group, name: str, arrays: list[dict[str, NDArray[Any]]]) -> Any:
    """An input of a group's graph, for all of its views one after the other.

    Args:
        group: the views.
        name: the array of the plan, or :data:`NOISE`.
        arrays: the plan's arrays, for each view of the method.
    """
    if name == NOISE and group.channels is not None:
        shape = (*height_width(group.size), group.channels.count)
        views = [arrays[view] for view in group.views]
        return [one for view in views for one in noise_of(view["noise_sigma"], view["noise_seed"], shape)]
    return np.ascontiguousarray(np.concatenate([arrays[view][name] for view in group.views]))


def noise_of(sigmas: NDArray[np.float32], seeds: NDArray[np.uint32], shape: tuple[int, int, int]) -> list[NDArray[np.float32]]:
    """Gaussian noise of each sample, a function of its seed alone; a single zero where there is none."""
    nothing = np.zeros((1, 1, 1), dtype=np.float32)
    made = []
    for sigma, seed in zip(sigmas.tolist(), seeds.tolist(), strict=True):
        drawn = np.random.Generator(np.random.Philox(key=seed)).standard_normal(shape, dtype=np.float32) if sigma > 0 else nothing
        made.append(drawn * np.float32(sigma))
    return made
