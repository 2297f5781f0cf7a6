"""The stages of a curriculum: a function of the step, and pipelines that are exchanged where a stage begins."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.types import Length
from pipeline.data.augment.curriculum import stage_at, stage_ends
from pipeline.data.augment.dali import Augmenter
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.plan import make_plan
from pipeline.data.augment.views import ViewSpec, ViewStage
from pipeline.errors import ConfigError

COLOUR = Augment(jitter_probability=0.8, brightness=0.4, gray_probability=0.2, blur_probability=0.5)
FULL = (
    ViewSpec("global", 2, 32, (0.32, 1.0), augment=(COLOUR,)),
    ViewSpec("local", 1, 16, (0.05, 0.32), augment=(COLOUR,)),
)
SMALL = (replace(FULL[0], size=24), FULL[1])
lengths = st.builds(Length, st.integers(1, 50).map(float), st.sampled_from(("samples", "steps", "epochs")))


@given(lengths=st.lists(lengths, max_size=4), epoch=st.integers(1, 300), batch=st.integers(1, 64))
def test_a_step_is_in_the_first_stage_that_ends_after_it(lengths: list[Length], epoch: int, batch: int) -> None:
    covered = [length.steps(epoch, batch) for length in lengths]
    if any(later <= before for before, later in zip([0, *covered], covered, strict=False)):
        with pytest.raises(ConfigError, match="no steps"):
            stage_ends(lengths, epoch_samples=epoch, global_batch=batch)
        return
    ends = stage_ends(lengths, epoch_samples=epoch, global_batch=batch)
    assert ends == tuple(covered)
    stages = [stage_at(ends, step) for step in range((ends[-1] if ends else 0) + 3)]
    assert stages == sorted(stages) and set(stages) == set(range(len(lengths) + 1))
    for step, stage in enumerate(stages):
        assert stage == next((number for number, end in enumerate(ends) if step < end), len(ends))
        if stage < len(lengths):  # a step of a stage begins before the stage is over
            assert step * batch < lengths[stage].samples(epoch, batch)


def test_a_stage_that_ends_in_the_middle_of_a_step_has_that_step() -> None:
    assert stage_ends([Length(17.0)], epoch_samples=24, global_batch=8) == (3,)
    assert stage_ends(["1 steps", "1.5 epochs"], epoch_samples=24, global_batch=8) == (1, 5)


@pytest.mark.parametrize("until", ["soon", "-1 epochs", True])
def test_a_stage_must_end_somewhere(until: str) -> None:
    with pytest.raises(ConfigError, match="is not the end of a stage"):
        ViewStage(FULL, until)


def test_pipelines_of_a_stage_are_exchanged_and_shared_ones_kept() -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (40 + n, 60, 3), dtype=np.uint8) for n in range(4)]
    ids, epochs = np.arange(4, dtype=np.uint64), np.zeros(4, dtype=np.int64)
    plan = make_plan(FULL, ids=ids, epochs=epochs, sizes=np.array([image.shape[:2] for image in images]), seed=1)
    expected = {specs[0].size: Augmenter(specs, batch_size=4).run(images, plan) for specs in (SMALL, FULL)}

    augmenter = Augmenter(SMALL, batch_size=4)
    before = augmenter.run(images, plan)
    old = {group.size: weakref.ref(pipeline) for group, (pipeline, _) in augmenter._pipelines.items()}
    augmenter.use(FULL)
    gc.collect()
    assert old[24]() is None, "the pipeline of the stage before is held, with its memory"
    assert old[16]() in [pipeline for pipeline, _ in augmenter._pipelines.values()], "a shared pipeline was built again"
    after = augmenter.run(images, plan, FULL)
    for made, size in ((before, 24), (after, 32)):  # views of the stage before are whole although their pipeline is gone
        assert made["global"][0].shape[-1] == size
        for name, group in expected[size].items():
            assert all(torch.equal(one, other) for one, other in zip(made[name], group, strict=True)), (size, name)
