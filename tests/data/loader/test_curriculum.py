"""Steps before, at and after the end of a stage: the same samples and crops, in the stage's sizes, wherever the stream starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.data.augment.operators import Augment
from pipeline.data.augment.views import Batch, PatchDropout, ViewSet, ViewSpec, ViewStage
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.view_loader import ViewLoader
from pipeline.errors import ConfigError
from tests.data.loader.test_batch_stream import (  # noqa: F401  - fixtures
    BATCH,
    MASK,
    SEED,
    SETS,
    SPECS,
    Steps,
    assert_same,
    joined,
    manifest,
    portions,
    shards,
    stream,
)

SMALL = (replace(SPECS[0], size=16), replace(SPECS[1], size=8))
MIDDLE = (replace(SPECS[0], size=24), SPECS[1])
ENDS = (2, 5)
SIZES = [16, 16, 24, 24, 24, 32, 32, 32]


def staged(manifest: Manifest, *, world: int = 1, rank: int = 0, **options: Any) -> StepDataset:  # noqa: F811
    base = portions(manifest, world=world, rank=rank)
    options = {"stages": (SMALL, MIDDLE), "ends": ENDS} | options
    return StepDataset(base.reader, base.order, SPECS, seed=SEED, world=world, rank=rank, **options)


def taken(dataset: StepDataset, first: int = 0, **options: Any) -> dict[int, list[Batch]]:
    steps: Steps = list(stream(dataset, first, len(SIZES), **options))
    assert [step for step, _ in steps] == list(range(first, len(SIZES)))  # none is lost or comes twice
    return dict(steps)


def test_each_step_has_its_stages_views_of_the_same_crops(manifest: Manifest) -> None:  # noqa: F811
    whole = taken(staged(manifest))
    assert [batches[0].sides[0] for batches in whole.values()] == SIZES
    alone = {
        specs[0].size: taken(staged(manifest, stages=(), ends=(), sets=(ViewSet(specs),))) for specs in (SMALL, MIDDLE, SPECS)
    }
    for step, (batch,) in whole.items():
        assert_same(batch, alone[SIZES[step]][step][0])
        assert batch.ids == alone[32][step][0].ids
        assert batch.masks["global"].grid.shape == (2 * BATCH, (SIZES[step] // MASK.patch) ** 2)
    plans = [staged(manifest, stages=stages, ends=ENDS[: len(stages)])[0].plan for stages in ((SMALL,), ())]
    for small, full in zip(*plans, strict=True):
        assert all((small.arrays[name] == full.arrays[name]).all() for name in full.arrays)


@pytest.mark.parametrize("first", range(1, 7))
def test_a_stream_that_starts_before_at_or_after_an_end_is_the_rest_of_the_whole(manifest: Manifest, first: int) -> None:  # noqa: F811
    whole, rest = taken(staged(manifest)), taken(staged(manifest), first)
    for step, (batch,) in rest.items():
        assert_same(batch, whole[step][0])


def test_prefetched_steps_do_not_mix_sizes(manifest: Manifest) -> None:  # noqa: F811
    """Workers read ahead beyond the end of a stage while the stream still makes views of the stage before."""
    whole = taken(staged(manifest))
    for step, batches in taken(staged(manifest), workers=2, micro=4).items():
        assert len(batches) == BATCH // 4
        assert_same(joined(batches), whole[step][0])


def test_two_ranks_have_the_crops_of_one(manifest: Manifest) -> None:  # noqa: F811
    whole = taken(staged(manifest))
    ranks = [taken(staged(manifest, world=2, rank=rank)) for rank in range(2)]
    for step, (batch,) in whole.items():
        assert_same(joined([rank[step][0] for rank in ranks]), batch)


def test_a_substituted_sample_has_the_views_of_its_stage(manifest: Manifest) -> None:  # noqa: F811
    class Broken(Reader):
        def fetch(self, ids: Any) -> list[Any]:
            return [replace(one, image=b"no image") if one.key.endswith("3") else one for one in super().fetch(ids)]

    base = portions(manifest, reader=Broken(manifest, wants=("image", "label", "caption")))
    dataset = StepDataset(base.reader, base.order, SPECS, seed=SEED, world=1, rank=0, stages=(SMALL, MIDDLE), ends=ENDS)
    steps = taken(dataset)
    assert [batches[0].sides[0] for batches in steps.values()] == SIZES
    assert all(bool(view.isfinite().all()) for batches in steps.values() for view in batches[0].views["global"])


def test_dropped_patches_follow_from_sample_and_epoch(manifest: Manifest) -> None:  # noqa: F811
    dropped = (replace(SMALL[0], mask=None, dropout=PatchDropout(4, 0.5)), SMALL[1])
    options: dict[str, Any] = {"stages": (dropped,), "ends": (6,)}
    whole = taken(staged(manifest, **options))
    kept = {step: batches[0].kept.get("global") for step, batches in whole.items()}
    assert kept[6] is None and kept[7] is None
    rows: dict[int, list[torch.Tensor]] = {}
    for step in range(6):
        chosen = kept[step]
        assert chosen is not None and chosen.shape == (2 * BATCH, 8) and chosen.dtype == torch.int64
        assert bool((chosen.diff(dim=1) > 0).all()) and int(chosen.min()) >= 0 and int(chosen.max()) < 16
        assert not torch.equal(chosen[:BATCH], chosen[BATCH:])  # each view has its own
        for row, number in enumerate(whole[step][0].ids):
            rows.setdefault(number, []).append(chosen[row])
    again = [drawn for drawn in rows.values() if len(drawn) > 1]
    assert again and any(not torch.equal(*drawn[:2]) for drawn in again)  # another epoch has others
    ranks = [taken(staged(manifest, world=2, rank=rank, **options), micro=2) for rank in range(2)]
    for step in range(6):
        micro = [batch.kept["global"].unflatten(0, (2, -1)) for rank in ranks for batch in rank[step]]
        assert torch.equal(torch.cat(micro, dim=1).flatten(0, 1), kept[step])


def test_mixed_resolutions_come_after_the_stages(manifest: Manifest) -> None:  # noqa: F811
    mixed = taken(staged(manifest, stages=(SMALL,), ends=(4,), sets=SETS))
    assert {batches[0].sides for step, batches in mixed.items() if step < 4} == {(16, 8)}
    assert {batches[0].sides for step, batches in mixed.items() if step >= 4} <= {(16, 8), (32, 16, 64)}
    plain = taken(staged(manifest, stages=(), ends=(), sets=SETS))
    for step in range(4, len(SIZES)):
        assert_same(mixed[step][0], plain[step][0])


# ---- the library's loader --------------------------------------------------------------------------------------------------


def views(size: int) -> tuple[ViewSpec, ...]:
    return (ViewSpec("global", 2, size, (0.32, 1.0), augment=(Augment(gray_probability=0.2),)),)


def loader(shards: Path, tmp_path: Path, **options: Any) -> ViewLoader:  # noqa: F811
    kept: dict[str, Any] = {"views": views(32), "global_batch_size": BATCH, "seed": SEED, "device": "cpu", "num_workers": 0}
    return ViewLoader(str(shards / "*train*.tar"), index=str(tmp_path / "index"), **{**kept, **options})


def test_the_library_has_the_stages_over_epochs_and_resumes_within(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    curriculum = (ViewStage(views(16), "7 steps"), ViewStage(views(24), "2 epochs"))
    whole = loader(shards, tmp_path, curriculum=curriculum)
    per_epoch = len(whole)
    batches = [batch for _ in range(3) for batch in whole]
    sides = [batch.sides[0] for batch in batches]
    assert per_epoch == 5 and sides == [16] * 7 + [24] * 3 + [32] * 5
    again = loader(shards, tmp_path, curriculum=curriculum)
    again.dataset.seek(6)
    for position, batch in enumerate(again, start=6):
        assert batch.ids == batches[position].ids
        assert torch.equal(batch.views["global"][1], batches[position].views["global"][1])
    with pytest.raises(ConfigError, match="a stage has other views"):
        loader(shards, tmp_path, curriculum=(ViewStage((replace(views(16)[0], count=1),), "7 steps"),))
    with pytest.raises(ConfigError, match="no steps"):
        next(iter(loader(shards, tmp_path, curriculum=curriculum[::-1])))
