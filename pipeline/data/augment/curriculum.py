"""Resolution curriculum: which stage of views a step has, a function of the step alone.

The sizes of views may change a few times in a run (``method.views.curriculum``). A stage ends at a step that follows from the
settings and the size of the data set, so that it is the same on every rank and after every resume.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from pipeline.config.sizes import size_text
from pipeline.config.types import Length
from pipeline.data.augment.settings import MultiCropSettings, ViewSettings
from pipeline.errors import ConfigError


def stage_ends(
    lengths: Sequence[Length | str | int], *, epoch_samples: int, global_batch: int, where: str = "method.views.curriculum"
) -> tuple[int, ...]:
    """Returns the first step after each stage.

    Args:
        lengths: where each stage ends, counted from the start of the run.
        epoch_samples: samples per epoch.
        global_batch: samples of a step over all ranks.
        where: the setting or argument, for errors.

    Raises:
        ConfigError: a stage without a step.
    """
    ends: list[int] = []
    for length in lengths:
        end, begin = Length.parse(length).steps(epoch_samples, global_batch), ends[-1] if ends else 0
        if end <= begin:
            raise ConfigError(
                f"the stage until {length} ends at step {end} and begins at step {begin}, so that it has no steps",
                where=where,
                hint="Let each stage end later than the one before",
            )
        ends.append(end)
    return tuple(ends)


def stage_at(ends: Sequence[int], step: int) -> int:
    """Returns the number of a step's stage: ``len(ends)`` after the last one.

    Args:
        ends: first step after each stage, ascending.
        step: number of a step, from 0.
    """
    return bisect_right(ends, step)


def curriculum_text(views: ViewSettings) -> str:
    """The sizes of views in all stages and after them, for people."""
    parts = []
    for stage in views.curriculum:
        dropped = f" without {stage.patch_dropout:.0%} of the patches" if stage.patch_dropout else ""
        parts.append(f"{_sides(views.at(stage))}{dropped} until {stage.until}")
    return ", then ".join([*parts, _sides(views)])


def _sides(views: ViewSettings) -> str:
    local = f" and {size_text(views.local_size)}" if isinstance(views, MultiCropSettings) and views.local_count else ""
    return f"{size_text(views.global_size)}{local} px"
