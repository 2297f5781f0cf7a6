"""The stream: what a step holds is its number's business alone; bad samples are replaced in place, told, and limited."""

from __future__ import annotations

import itertools
import json
import multiprocessing.forkserver
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import storage
from pipeline.data.augment.dali import Augmenter
from pipeline.data.augment.decode import Decoder
from pipeline.data.augment.masks import mask_counts
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.plan import make_plan
from pipeline.data.augment.views import Batch, MaskSpec, TextSpec, ViewSet, ViewSpec
from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader, Record
from pipeline.data.loader.text import choose, tokenizer
from pipeline.data.order.order import Order, Source
from pipeline.data.pack import synthetic as scenes
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.errors import DataError, TrainingError

BATCH, SEED = 8, 5
AUGMENT = Augment(
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue_shift=0.1,
    gray_probability=0.2,
    blur_probability=0.5,
    solarize_probability=0.2,
)
MASK = MaskSpec(patch=4, probability=0.5, ratio=(0.1, 0.5))
SPECS = (
    ViewSpec("global", 2, 32, (0.32, 1.0), augment=(replace(AUGMENT, blur_probability=0.0), AUGMENT), mask=MASK),
    ViewSpec("local", 1, 16, (0.05, 0.32), augment=(AUGMENT,)),
)
Steps = list[tuple[int, list[Batch]]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "train", samples_per_shard=20) as writer:
        for number in range(40):  # pictures of many sizes, so that a plan made for one does not fit another
            writer.write({"__key__": f"{number:04d}", **scenes._sample(scenes.render(1, number, 33 + number))})
    return folder


@pytest.fixture
def manifest(shards: Path, tmp_path: Path) -> Manifest:
    """The same data set in files of the test's own."""
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    return build(sorted(str(path) for path in folder.glob("*train*.tar")), tmp_path / "index")


def portions(manifest: Manifest, *, world: int = 1, rank: int = 0, reader: Reader | None = None) -> StepDataset:
    order = Order(manifest.sizes, SEED, BATCH, streams=4, block_size=8)
    return StepDataset(
        reader or Reader(manifest, wants=("image", "label", "caption")), order, SPECS, seed=SEED, world=world, rank=rank
    )


def stream(
    dataset: StepDataset,
    first: int,
    last: int | None,
    *,
    bad_samples: BadSamples | None = None,
    micro: int | None = None,
    workers: int = 0,
) -> BatchStream:
    options = StreamOptions(micro_batch=micro or BATCH // dataset.world, workers=workers, hue="yiq")
    bad_samples = bad_samples or BadSamples(None, budget=1.0)
    return BatchStream(dataset, device=torch.device("cpu"), options=options, bad_samples=bad_samples, first=first, last=last)


def assert_same(ours: Batch, theirs: Batch, rows: list[int] | None = None) -> None:
    """Equal to the last bit, in some rows or in all."""
    chosen = list(range(len(theirs.ids))) if rows is None else rows
    assert ours.position == theirs.position
    assert len(ours.ids) == len(theirs.ids)
    for row in chosen:
        assert (ours.ids[row], ours.keys[row], ours.labels[row]) == (theirs.ids[row], theirs.keys[row], theirs.labels[row])
        assert ours.captions is not None
        assert theirs.captions is not None
        assert ours.captions[row] == theirs.captions[row]
    assert ours.views.keys() == theirs.views.keys()
    for name, views in theirs.views.items():
        for view, expected in zip(ours.views[name], views, strict=True):
            assert torch.equal(view[chosen], expected[chosen]), name
    for name, masks in theirs.masks.items():
        assert torch.equal(ours.masks[name].grid, masks.grid)
        assert torch.equal(ours.masks[name].index, masks.index)
        assert torch.equal(ours.masks[name].weight, masks.weight)


def joined(parts: list[Batch]) -> Batch:
    """One batch of several that share a step: ranks or micro-batches."""
    grids = {name: [part.masks[name].grid.view(2, len(part.ids), -1) for part in parts] for name in parts[0].masks}
    masks = {name: torch.cat(grid, dim=1).flatten(0, 1) for name, grid in grids.items()}
    whole = replace(
        parts[0],
        views={
            name: [torch.cat(views) for views in zip(*(p.views[name] for p in parts), strict=True)] for name in parts[0].views
        },
        labels=torch.cat([part.labels for part in parts]),
        keys=[key for part in parts for key in part.keys],
        ids=[number for part in parts for number in part.ids],
        captions=[caption for part in parts for caption in part.captions or []],
        masks={
            name: replace(
                parts[0].masks[name],
                grid=grid,
                index=grid.flatten().nonzero().flatten(),
                weight=(1 / grid.sum(1, keepdim=True)).expand_as(grid)[grid],
            )
            for name, grid in masks.items()
        },
    )
    assert len({part.position for part in parts}) == 1
    return whole


@pytest.fixture(scope="module")
def clean(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Batch]:
    """Steps 0 to 6 of the undamaged set, whole batches in one rank: what everything else is held against."""
    manifest = build(sorted(str(path) for path in shards.glob("*train*.tar")), tmp_path_factory.mktemp("index"))
    return {step: batch for step, (batch,) in stream(portions(manifest), 0, 6)}


def damage(manifest: Manifest, number: int) -> None:
    """Zeroes in the middle of a picture."""
    shard, row = number >> 32, number & 0xFFFFFFFF
    with open(manifest.shards[shard].url, "r+b") as file:
        file.seek(int(manifest.column(shard, "image_offset")[row]) + int(manifest.column(shard, "image_size")[row]) // 2)
        file.write(bytes(16))


def test_batches_hold_what_methods_are_promised(clean: dict[int, Batch], manifest: Manifest) -> None:
    assert list(clean) == list(range(6))
    for step, batch in clean.items():
        expected = Order(manifest.sizes, SEED, BATCH, streams=4, block_size=8).batch(step)
        assert batch.ids == expected.ids.tolist()
        assert batch.position == step * BATCH
        assert {name: [tuple(view.shape) for view in views] for name, views in batch.views.items()} == {
            "global": [(BATCH, 3, 32, 32)] * 2,
            "local": [(BATCH, 3, 16, 16)],
        }
        for record, key, label, caption in zip(
            Reader(manifest).fetch(expected.ids), batch.keys, batch.labels.tolist(), batch.captions or [], strict=True
        ):
            assert (record.key, record.label, record.caption) == (key, label, caption)


def test_a_stream_that_starts_anywhere_is_the_tail_of_the_whole(clean: dict[int, Batch], manifest: Manifest) -> None:
    steps = [(step, batches) for step, batches in stream(portions(manifest), 3, 6)]
    assert [step for step, _ in steps] == [3, 4, 5]
    for step, (batch,) in steps:
        assert_same(batch, clean[step])


def test_two_ranks_together_see_what_one_sees(clean: dict[int, Batch], manifest: Manifest) -> None:
    ranks = [dict(stream(portions(manifest, world=2, rank=rank), 0, 3)) for rank in range(2)]
    for step in range(3):
        assert_same(joined([ranks[0][step][0], ranks[1][step][0]]), clean[step])


def test_micro_batches_together_are_the_batch(clean: dict[int, Batch], manifest: Manifest) -> None:
    for step, batches in stream(portions(manifest), 0, 2, micro=2):
        assert [len(batch.ids) for batch in batches] == [2, 2, 2, 2]
        assert_same(joined(batches), clean[step])


def test_a_step_hides_the_same_number_of_patches_over_all_ranks(manifest: Manifest) -> None:
    patches, crops = (32 // 4) ** 2, 2 * BATCH
    expected = int(mask_counts(crops, patches, MASK, 0).sum())
    for world in (1, 2):
        ranks = [dict(stream(portions(manifest, world=world, rank=rank), 0, 3)) for rank in range(world)]
        for step in range(3):
            masks = [rank[step][0].masks["global"] for rank in ranks]
            assert sum(len(mask.index) for mask in masks) == expected
            assert sum(float(mask.weight.sum()) for mask in masks) == pytest.approx(crops * MASK.probability, abs=1e-4)
            for mask in masks:
                assert mask.grid.shape == (crops // world, patches)
                assert torch.equal(mask.grid.flatten()[mask.index], torch.ones(len(mask.index), dtype=torch.bool))
                assert int(mask.grid.sum()) == len(mask.index)
                row = mask.index // patches
                assert torch.equal(mask.weight, 1 / mask.grid.sum(1)[row].float())


def test_a_bad_sample_is_replaced_in_its_place_and_nothing_else_changes(
    clean: dict[int, Batch], manifest: Manifest, tmp_path: Path
) -> None:
    row = 3
    bad = clean[1].ids[row]
    damage(manifest, bad)
    bad_samples = BadSamples(tmp_path / "bad_samples" / "rank-0.jsonl", budget=1.0)
    for step, (batch,) in stream(portions(manifest), 0, 3, bad_samples=bad_samples):
        rows = [r for r in range(BATCH) if clean[step].ids[r] != bad]
        assert_same(batch, clean[step], rows)
        assert len(rows) == (BATCH - 1 if step == 1 else BATCH)
        if step == 1:
            changed = batch
    reader = Reader(manifest)
    (other,) = reader.fetch(np.array([reader.substitute(bad, 0, SEED, 0)], dtype=np.uint64))
    assert (changed.ids[row], changed.keys[row], changed.labels[row]) == (other.id, other.key, other.label)
    size = np.array([[other.height, other.width]])
    plan = make_plan(SPECS, ids=np.array([bad], dtype=np.uint64), epochs=np.zeros(1, dtype=np.int64), sizes=size, seed=SEED)
    views = Augmenter(SPECS, batch_size=1, hue="yiq").run(Decoder().decode([other.image or b""]), plan)
    for name, group in views.items():
        for view, expected in zip(changed.views[name], group, strict=True):
            assert torch.equal(view[row], expected[0])
    (line,) = (tmp_path / "bad_samples" / "rank-0.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 1,
        "id": bad,
        "key": clean[1].keys[row],
        "shard": Path(manifest.shards[bad >> 32].url).name,
        "reason": "corrupt",
        "substitute": other.id,
    }
    assert bad_samples.state() == {
        "seen": 3 * BATCH,
        "reasons": {"corrupt": 1},
        "counts": {},
        "quarantine": {str(bad): "corrupt"},
    }


class Doctored(Reader):
    """Gives some samples other bytes or another size than the index tells."""

    def __init__(self, manifest: Manifest, changes: dict[int, dict[str, object]]) -> None:
        super().__init__(manifest, wants=("image", "label"))
        self._changes = changes

    def fetch(self, ids: np.ndarray) -> list[Record]:
        return [replace(record, **self._changes.get(record.id, {})) for record in super().fetch(ids)]  # type: ignore[arg-type]


def test_what_does_not_decode_or_has_another_size_is_replaced_too(clean: dict[int, Batch], manifest: Manifest) -> None:
    first, second = clean[0].ids[0], clean[0].ids[5]
    reader = Doctored(manifest, {first: {"image": b"no picture"}, second: {"width": 1000}})
    bad_samples = BadSamples(None, budget=1.0)
    ((_, (batch,)),) = stream(portions(manifest, reader=reader), 0, 1, bad_samples=bad_samples)
    assert bad_samples.reasons == {"undecodable": 2}
    assert {row for row in range(BATCH) if batch.ids[row] != clean[0].ids[row]} == {0, 5}
    assert not {first, second} & set(batch.ids)


def test_a_shard_without_one_good_sample_gives_gray_pictures_without_a_label(manifest: Manifest) -> None:
    for number in manifest.ids():
        if int(number) >> 32 == 0:
            damage(manifest, int(number))
    bad_samples = BadSamples(None, budget=1.0)
    ((_, (batch,)),) = stream(portions(manifest), 0, 1, bad_samples=bad_samples)
    blank = [row for row in range(BATCH) if batch.ids[row] >> 32 == 0]
    assert 0 < len(blank) < BATCH
    assert bad_samples.reasons == {"corrupt": len(blank)}
    assert (batch.labels == -1).nonzero().flatten().tolist() == blank
    for view in (*batch.views["global"], *batch.views["local"]):
        assert all(view[row].flatten(1).std(dim=1).max() < 1e-6 for row in blank)
        assert view.isfinite().all()


def test_a_sample_once_bad_stays_out_after_a_resume(clean: dict[int, Batch], manifest: Manifest) -> None:
    bad = clean[2].ids[6]
    bad_samples = BadSamples(None, budget=1.0)
    bad_samples.load({"seen": 16, "reasons": {"unreadable": 1}, "quarantine": {str(bad): "unreadable"}})
    ((_, (batch,)),) = stream(portions(manifest), 2, 3, bad_samples=bad_samples)
    assert bad not in batch.ids
    assert_same(batch, clean[2], [row for row in range(BATCH) if row != 6])
    assert bad_samples.state() == {
        "seen": 16 + BATCH,
        "reasons": {"unreadable": 2},
        "counts": {},
        "quarantine": {str(bad): "unreadable"},
    }


def test_samples_count_when_they_are_taken_not_when_they_are_prepared(clean: dict[int, Batch], manifest: Manifest) -> None:
    damage(manifest, clean[2].ids[0])
    bad_samples = BadSamples(None, budget=1.0)
    steps = iter(stream(portions(manifest), 0, None, bad_samples=bad_samples))
    for expected in range(1, 5):
        next(steps)
        assert bad_samples.seen == expected * BATCH
        assert len(bad_samples.quarantine) == (expected >= 3)
    steps.close()  # type: ignore[attr-defined]


def test_too_many_bad_samples_stop_the_run_with_their_names(clean: dict[int, Batch], manifest: Manifest, tmp_path: Path) -> None:
    for row in range(3):
        damage(manifest, clean[1].ids[row])
    path = tmp_path / "bad_samples.jsonl"
    done = []
    with pytest.raises(TrainingError, match=r"3 of the last 16 samples could not be used \(corrupt 3\)") as caught:
        for step, _ in stream(portions(manifest), 0, 6, bad_samples=BadSamples(path, budget=0.1, window=20)):
            done.append(step)
    assert done == [0]
    assert clean[1].keys[2] in caught.value.where
    assert str(path) in caught.value.hint
    assert len(path.read_text().splitlines()) == 3


def test_a_shard_that_vanished_is_an_error_of_the_data_not_a_bad_sample(manifest: Manifest) -> None:
    for shard in manifest.shards:
        os.remove(shard.url)
    storage.forget()
    with pytest.raises(DataError, match="train"):
        list(stream(portions(manifest), 0, 2))


def test_leaving_early_ends_the_thread_and_the_torch_generator_is_not_touched(manifest: Manifest) -> None:
    state = torch.random.get_rng_state()
    for step, _ in stream(portions(manifest), 0, None):
        if step == 2:
            break
    assert "fovea-data" not in {thread.name for thread in threading.enumerate() if thread.is_alive()}
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- text and data sets -------------------------------------------------------------------------------------------------

TEXT = TextSpec(context=12)
SOURCES = (Source("first", 0, 1), Source("second", 1, 1))


@pytest.fixture
def said(tmp_path: Path) -> Manifest:
    """Samples with three captions, one or none."""
    with ShardWriter(tmp_path / "said", "train", samples_per_shard=12) as writer:
        for number in range(24):
            sample = scenes._sample(scenes.render(1, number, 33))
            captions = [[f"{number} a", "", f"{number} b", f"{number} c"], [f"only {number}"], []][number % 3]
            about = {"caption": captions, "label": number}
            writer.write({"__key__": f"{number:04d}", "jpg": sample["jpg"], "json": json.dumps(about).encode()})
    return build(sorted(str(path) for path in (tmp_path / "said").glob("*.tar")), tmp_path / "said-index")


def reading(manifest: Manifest, *, world: int = 1, rank: int = 0, text: TextSpec = TEXT) -> StepDataset:
    order = Order(manifest.sizes, SEED, BATCH, streams=4, block_size=8, sources=SOURCES)
    reader = Reader(manifest, wants=("image", "label", "caption"))
    return StepDataset(reader, order, SPECS, seed=SEED, world=world, rank=rank, text=text, sources=SOURCES)


@pytest.mark.slow
def test_trimmed_captions_are_the_padded_ones_without_what_is_padding_in_all_rows(said: Manifest) -> None:
    whole, short = TextSpec(context=30), TextSpec(context=30, trim=True)
    steps = {}
    for text in (whole, short):
        steps[text] = [batch for _, parts in stream(reading(said, text=text), 0, 3, micro=4) for batch in parts]
    for padded, cut in zip(steps[whole], steps[short], strict=True):
        assert padded.tokens is not None and cut.tokens is not None
        assert padded.tokens.shape == (4, 30) and cut.tokens.shape == (4, 8) and cut.tokens.is_contiguous()
        assert torch.equal(padded.tokens[:, :8], cut.tokens) and not padded.tokens[:, 8:].any()
        assert padded.captions == cut.captions


def test_captions_are_chosen_by_epoch_tokenised_and_counted_the_same_on_any_rank_and_after_a_resume(said: Manifest) -> None:
    dataset, bad_samples = reading(said), BadSamples(None, budget=1.0)
    steps = {step: batch for step, (batch,) in stream(dataset, 0, 9, bad_samples=bad_samples)}
    chosen: dict[int, set[str]] = {}
    blank = 0
    for step, batch in steps.items():
        drawn = dataset.order.rank_batch(step, 1, 0)
        assert batch.ids == drawn.ids.tolist()
        assert batch.captions is not None
        assert batch.tokens is not None
        assert torch.equal(batch.tokens, torch.from_numpy(tokenizer(TEXT)(batch.captions)))
        for record, epoch, caption in zip(dataset.reader.fetch(drawn.ids), drawn.epochs.tolist(), batch.captions, strict=True):
            assert caption == choose(record.captions, record.id, epoch, SEED)
            chosen.setdefault(record.label, set()).add(caption)
            blank += not caption
    assert {label: len(captions) for label, captions in chosen.items() if label % 3} == {n: 1 for n in range(24) if n % 3}
    assert len([label for label, captions in chosen.items() if len(captions) > 1]) >= 5
    assert blank > 10
    assert bad_samples.counts == {"seen/first": 9 * BATCH // 2, "seen/second": 9 * BATCH // 2, "blank_caption": blank}
    ranks = [dict(stream(reading(said, world=2, rank=rank), 5, 7, micro=2)) for rank in range(2)]
    for step in (5, 6):
        parts = [part for rank in ranks for part in rank[step]]
        assert (
            torch.cat([part.tokens for part in parts if part.tokens is not None]).tolist()
            == tokenizer(TEXT)(steps[step].captions or []).tolist()
        )
        assert [caption for part in parts for caption in part.captions or []] == steps[step].captions


def test_a_substitute_brings_its_own_caption_and_tokens(said: Manifest) -> None:
    dataset = reading(said)
    ((_, (before,)),) = stream(dataset, 0, 1)

    def substitute(bad: int) -> Record:
        (record,) = dataset.reader.fetch(np.array([dataset.reader.substitute(bad, 0, SEED, 0)], dtype=np.uint64))
        return record

    def spoken(record: Record) -> str:
        return choose(record.captions, record.id, 0, SEED)

    row = next(row for row, bad in enumerate(before.ids) if spoken(substitute(bad)) not in ("", substitute(bad).caption))
    other = substitute(before.ids[row])
    damage(said, before.ids[row])
    bad_samples = BadSamples(None, budget=1.0)
    ((_, (after,)),) = stream(dataset, 0, 1, bad_samples=bad_samples)
    assert after.captions is not None
    assert before.captions is not None
    assert after.tokens is not None
    assert (after.ids[row], after.captions[row]) == (other.id, spoken(other))
    assert [c for r, c in enumerate(after.captions) if r != row] == [c for r, c in enumerate(before.captions) if r != row]
    assert torch.equal(after.tokens, torch.from_numpy(tokenizer(TEXT)(after.captions)))
    assert bad_samples.counts.get("blank_caption", 0) == after.captions.count("")


def test_a_method_without_text_gets_no_tokens(clean: dict[int, Batch]) -> None:
    assert all(batch.tokens is None for batch in clean.values())


# ---- reader processes: each start costs seconds ---------------------------------------------------------------------------


def forked() -> set[int]:
    """Children of multiprocessing's fork server: reader processes, and the ranks of other tests."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return {int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()} if server else set()


class Broken(Reader):
    """Has a fault of ours."""

    def fetch(self, ids: np.ndarray) -> list[Record]:
        return [record for record in super().fetch(ids) if 1 // 0]


@pytest.mark.slow
def test_reader_processes_change_nothing_are_replaced_when_they_die_and_tell_errors_plainly(
    clean: dict[int, Batch], manifest: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    state, others = torch.random.get_rng_state(), forked()
    seen = []
    for step, (batch,) in stream(portions(manifest), 0, 6, workers=1):
        assert_same(batch, clean[step])
        seen.append(step)
        if step == 0:
            (pid,) = forked() - others
            os.kill(pid, signal.SIGKILL)
    assert seen == list(range(6))
    assert "a reader process died" in caplog.text
    assert torch.equal(torch.random.get_rng_state(), state)
    assert forked() == others
    with pytest.raises(ZeroDivisionError, match="in fetch"):  # kept by pytest, and still no process is left behind
        list(stream(portions(manifest, reader=Broken(manifest)), 0, 2, workers=1))
    assert forked() == others
    for shard in manifest.shards:
        os.remove(shard.url)
    with pytest.raises(DataError) as caught:
        list(stream(portions(manifest), 0, 2, workers=1))
    assert "Traceback" not in str(caught.value)
    assert "train" in caught.value.where
    assert forked() == others


# ---- views of several sizes ------------------------------------------------------------------------------------------------

SMALL = (replace(SPECS[0], size=16), replace(SPECS[1], size=8))
LARGE = (*SPECS, ViewSpec("gram", 2, 64, (0.32, 1.0), augment=(Augment(),), same_as="global"))
SETS = (ViewSet(SMALL, 1.0), ViewSet(LARGE, 2.0))


def mixed(manifest: Manifest, *, world: int = 1, rank: int = 0) -> StepDataset:
    dataset = portions(manifest, world=world, rank=rank)
    return StepDataset(dataset.reader, dataset.order, SPECS, seed=SEED, world=world, rank=rank, sets=SETS)


def test_steps_of_several_sizes_are_the_same_wherever_the_stream_starts_and_on_any_number_of_ranks(
    manifest: Manifest, clean: dict[int, Batch]
) -> None:
    whole = dict(stream(mixed(manifest), 0, 6))
    sides = [batches[0].sides for batches in whole.values()]
    assert set(sides) == {(16, 8), (32, 16, 64)}
    assert any(one != two for one, two in itertools.pairwise(sides))
    for step, batches in stream(mixed(manifest), 3, 6):
        assert_same(batches[0], whole[step][0])
    ranks = [dict(stream(mixed(manifest, world=2, rank=rank), 0, 6)) for rank in range(2)]
    for step, batches in whole.items():
        assert [rank[step][0].sides for rank in ranks] == [batches[0].sides] * 2
        assert_same(joined([rank[step][0] for rank in ranks]), batches[0])
        assert batches[0].masks["global"].grid.shape == (2 * BATCH, (batches[0].sides[0] // MASK.patch) ** 2)
        if len(batches[0].sides) == 3:  # the other views are what they are without the others' company
            views = {name: batches[0].views[name] for name in ("global", "local")}
            assert_same(replace(batches[0], views=views), clean[step])


def test_the_same_crops_at_twice_the_size_and_undistorted_show_the_same(manifest: Manifest) -> None:
    plain = replace(SPECS[0], augment=(Augment(),))
    dataset = portions(manifest)
    sets = (ViewSet((plain, LARGE[2])),)
    dataset = StepDataset(dataset.reader, dataset.order, (plain,), seed=SEED, world=1, rank=0, sets=sets)
    ((_, (batch,)),) = stream(dataset, 0, 1)
    for small, large in zip(batch.views["global"], batch.views["gram"], strict=True):
        halved = torch.nn.functional.avg_pool2d(large, 2)
        apart = [float((halved - other).abs().mean()) for other in (small, small.flip(3), small.roll(1, 0))]
        assert large.shape[-1] == 2 * small.shape[-1] and apart[0] < 0.15 * min(apart[1:]), apart


def test_every_tensor_of_a_batch_is_handed_over(manifest: Manifest) -> None:
    """Memory of a tensor that is left out would be reused while a GPU still reads it."""
    specs = replace(SPECS[0], boxes=True), *SPECS[1:]
    dataset = StepDataset(
        Reader(manifest, wants=("image", "label", "caption")),
        Order(manifest.sizes, SEED, BATCH, streams=4, block_size=8),
        specs,
        seed=SEED,
        world=1,
        rank=0,
        text=TextSpec(context=8),
    )
    (_, (batch,)), *_ = stream(dataset, 0, 1)

    def tensors(value: object) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            for field in fields(value):
                yield from tensors(getattr(value, field.name))
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    held = {id(tensor) for tensor in tensors(batch)}
    assert held == {id(tensor) for tensor in batch.tensors()}
    assert batch.masks and batch.boxes and batch.tokens is not None and batch.numbers().tolist() == batch.ids
