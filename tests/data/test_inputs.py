"""What is refused about the data before a rank starts, and where an index is kept."""

from __future__ import annotations

import json
import math
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from launch.rank_data import agreed_inputs
from launch.resume import choose_checkpoint
from pipeline.checkpoint.data_check import check_data, record_data
from pipeline.checkpoint.files import Saved, entry
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.data import indexing
from pipeline.data.indexing import Indexer
from pipeline.data.inputs import Inputs, data_identity, prepare
from pipeline.data.order.default_streams import Extent, default_streams
from pipeline.data.order.order import Order, Source
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.runtime.run_directory import RunDirectory
from pipeline.training import build as assemble
from tests.helpers.rank_pool import pool
from tests.helpers.runs import TOY


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write(folder, train=40, val=10, size=32, samples_per_shard=20)
    return folder


def settings(shards: Path, folder: Path, *overrides: str) -> Config:
    (folder / "toy.yaml").write_text(TOY)
    words = [f"data.shards={shards}/scenes-train-*.tar", f"data.index={folder / 'index'}"]
    return load(folder / "toy.yaml", [*words, *overrides]).config


def test_a_run_without_evaluation_reads_its_training_shards_only(shards: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    inputs = prepare(settings(shards, tmp_path), 2, lambda done, total, _: told.append((done, total)))
    assert (inputs.train.total, inputs.bank, inputs.queries) == (40, None, None)
    assert (inputs.order.total, inputs.order.streams, inputs.order.global_batch, inputs.order.seed) == (40, 4, 16, 7)
    assert told == [(1, 2), (2, 2)]


def test_the_bank_is_the_training_set_unless_another_is_named(shards: Path, tmp_path: Path) -> None:
    knn = ["evaluation.knn.enabled=true", f"evaluation.knn.val_shards={shards}/scenes-val-*.tar"]
    inputs = prepare(settings(shards, tmp_path, *knn), 2)
    assert inputs.bank is inputs.train
    assert inputs.queries is not None
    assert inputs.queries.total == 10
    other = prepare(settings(shards, tmp_path, *knn, f"evaluation.knn.train_shards={shards}/scenes-train-00001.tar"), 2)
    assert other.bank is not None
    assert other.bank.total == 20


def test_each_set_of_shards_has_a_folder_of_its_own_below_the_index(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(shards, tmp_path)
    urls = [f"{shards}/scenes-train-00000.tar", f"{shards}/scenes-train-00001.tar"]
    folder = config.data.index_folder(urls)
    assert folder.parent == tmp_path / "index"
    prepare(config, 2)
    assert (folder / "manifest.npz").exists()
    assert config.data.index_folder(urls[:1]) != folder
    monkeypatch.chdir(shards)
    assert config.data.index_folder([Path(url).name for url in urls]) == folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    free = config.data.model_copy(update={"index": None})
    assert free.index_folder(urls) == tmp_path / "cache" / "fovea" / "index" / folder.name


def test_an_index_is_built_once(shards: Path, tmp_path: Path) -> None:
    config = settings(shards, tmp_path)
    prepare(config, 2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.npz")}
    assert len(before) == 4  # two sidecars, the manifest and the link to it
    prepare(config, 2)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*.npz")} == before


def test_other_processes_of_a_run_map_the_index_without_asking_for_the_shards(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knn = ["evaluation.knn.enabled=true", f"evaluation.knn.val_shards={shards}/scenes-val-*.tar"]
    config = settings(shards, tmp_path, *knn)
    first = prepare(config, 2)
    with monkeypatch.context() as patch:
        for name in ("expand", "Storage"):
            patch.setattr(indexing.storage, name, lambda *_: pytest.fail("storage was asked"))
        again = prepare(config, 2, reuse=True)
    assert again.train == first.train and again.queries == first.queries and again.bank is again.train
    other = settings(shards, tmp_path, "data.min_side=8")
    assert prepare(other, 2, reuse=True).train.fields.min_side == 8  # nobody has prepared it
    mixed = load(tmp_path / "toy.yaml", [f"data.index={tmp_path / 'index'}", "data.shards=[]", mixture(shards)]).config
    assert prepare(mixed, 2, reuse=True).sources == prepare(mixed, 2, reuse=True).sources == prepare(mixed, 2).sources


def mixture(shards: Path) -> str:
    parts = ", ".join(f"{{name: {n}, shards: '{shards}/scenes-train-0000{k}.tar'}}" for k, n in enumerate("ab"))
    return f"data.sources=[{parts}]"


def test_signed_links_are_read_by_every_process(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        indexing.storage, "expand", lambda patterns, _: asked.extend(patterns) or [f"{shards}/scenes-train-00000.tar"]
    )
    config = settings(shards, tmp_path)
    for reuse in (False, True):
        Indexer(config, reuse=reuse).one(["https://host/a.tar?signature=x"])
    assert len(asked) == 2


def _agreed(folder: str, shards: str, stale: bool) -> tuple[str, int]:
    config = settings(Path(shards), Path(folder) / str(dist.get_rank()))
    if stale and dist.get_rank() == 1:  # an index of one shard less, as on the disk of another node
        with mock.patch.object(indexing.storage, "expand", lambda *_: [f"{shards}/scenes-train-00000.tar"]):
            prepare(config, 2)
    inputs = agreed_inputs(config, SimpleNamespace(control=None, rank=dist.get_rank(), size=2), None)
    return inputs.train.fingerprint, inputs.train.total


@pytest.mark.parametrize("stale", [False, True])
def test_ranks_agree_on_the_data_of_the_first_one(shards: Path, tmp_path: Path, stale: bool) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (one, other) = pool(2).run(_agreed, folder=str(tmp_path), shards=str(shards), stale=stale)
    assert one == other and one[1] == 40


def _apart(folder: str) -> str:
    rank = dist.get_rank()
    config = settings(Path(folder) / f"shards-{rank}", Path(folder) / str(rank))
    try:
        agreed_inputs(config, SimpleNamespace(control=None, rank=rank, size=2), None)
    except DataError as error:
        return str(error)
    return ""


def test_a_rank_with_other_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        scenes.write(tmp_path / f"shards-{rank}", train=40, val=10, size=32, samples_per_shard=20, seed=rank)
    fine, wrong = pool(2).run(_apart, folder=str(tmp_path))
    assert fine == "" and "rank 1 of 2 reads other shards than the first rank" in wrong


def test_numbers_that_do_not_divide_are_refused_with_those_that_do(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 ranks cannot share a global batch of 16"):
        prepare(settings(shards, tmp_path), 3)
    with pytest.raises(ConfigError, match="16 samples are not divisible by 2 ranks times 3") as caught:
        prepare(
            settings(shards, tmp_path, "launch.num_processes=1", "train.micro_batch_size=4").replace(
                train=settings(shards, tmp_path).train.model_copy(update={"micro_batch_size": 3})
            ),
            2,
        )
    assert caught.value.where == "train.micro_batch_size"
    assert "divisor of 8" in caught.value.hint


def test_a_run_keeps_the_streams_of_its_checkpoint_on_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    overrides = ["train.global_batch_size=24", "data.canonical_streams=null"]
    config = settings(shards, tmp_path, *overrides, f"run.directory={tmp_path}/run")
    assert {prepare(config, world).order.streams for world in (1, 2, 3, 12)} == {8}
    earlier = settings(shards, tmp_path, overrides[0], "data.canonical_streams=24", f"run.directory={tmp_path}/run")
    first = prepare(earlier, 3)  # as an earlier version chose it for three ranks
    folder = RunDirectory(config.run.folder).checkpoints / "step_000000002"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"data": data_identity(first)}))
    moved = prepare(config, 4)
    assert moved.order.streams == 24 and data_identity(moved) == data_identity(first)
    for step in range(2):
        parts = [moved.order.rank_batch(step, 4, rank).ids for rank in range(4)]
        assert np.array_equal(np.concatenate(parts), first.order.batch(step).ids)
    branch = settings(shards, tmp_path, *overrides, f"run.directory={tmp_path}/branch", f"checkpoint.resume={folder}")
    assert prepare(branch, 4).order.streams == 24
    (folder / "manifest.json").unlink()
    few = prepare(config, 3)
    assert few.order.streams == 8, "ranks may share a stream"
    parts = [few.order.rank_batch(5, 3, rank).ids for rank in range(3)]
    assert np.array_equal(np.concatenate(parts), few.order.batch(5).ids)
    with pytest.raises(ConfigError, match=r"5 ranks cannot share a global batch of 24 evenly.*Use 1, 2, 3, 4, 6, 8, 12 or 24"):
        prepare(config, 5)
    for document in ("[]", '{"data": {"lanes": "8", "global_batch": 24}}', '{"data": {"lanes": 8, "global_batch": 16}}', "{"):
        (folder / "manifest.json").write_text(document)
        assert prepare(config, 3).order.streams == 8


SMALL = Extent(50_000, 50, 10**8)


def test_any_number_of_ranks_that_divides_the_batch_reads_parts_of_the_same_batches() -> None:
    for batch, world in ((96, 96), (1536, 384), (3072, 96), (1024, 64), (1024, 3)):
        order = Order(np.full(50, 1000), 0, batch, default_streams(batch, [SMALL], 16384), 16384)
        assert order.streams == math.gcd(batch, 256)
        if batch % world:
            with pytest.raises(ConfigError, match="3 ranks cannot share"):
                order.check_world(world)
        else:
            parts = [order.rank_batch(5, world, rank).ids for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), order.batch(5).ids)


@pytest.mark.parametrize(("batch", "streams"), [(4096, 8), (1024, 8), (6144, 16), (32768, 64)])
def test_a_large_set_has_few_streams_and_begins_with_few_shards(batch: int, streams: int) -> None:
    rows, shards, block = 10_000, 20_000, 16384
    assert default_streams(batch, [Extent(rows * shards, shards, 800_000_000 * shards)], block) == streams
    for seed in range(5):
        order = Order(np.full(shards, rows), seed, batch, streams, block)
        assert len(order.shards(0, 1)) <= 3 * streams
        assert len(order.shards(0, 1000)) * rows <= 1.3 * 1000 * batch


def test_the_number_of_streams_is_that_of_the_batch_unless_the_first_step_is_large() -> None:
    imagenet = Extent(1_281_167, 1282, 130 * 10**9)
    assert default_streams(4096, [SMALL], 16384) is None and default_streams(1024, [imagenet], 16384) is None
    large = Extent(14_000_000, 14_000, 14 * 10**11)
    assert default_streams(1024, [large], 16384) == 8
    assert default_streams(1024, [large], 64) is None, "with small blocks the first step needs 2 shards of a stream"
    assert default_streams(1024, [imagenet, imagenet, imagenet], 16384) == 8, "each data set has blocks of its own"
    for odd in (1, 6, 24, 30, 100, 999):
        few = default_streams(odd, [Extent(10**9, 10**5, 10**14)], 16384)
        assert few is None or (odd % few == 0 and few < math.gcd(odd, 256))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_new_run_has_the_same_order_on_any_number_of_ranks(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    monkeypatch.setattr("pipeline.data.order.default_streams._FIRST_STEP", 0)
    monkeypatch.setattr("pipeline.data.order.default_streams._LEAST", 2)
    order = prepare(settings(shards, tmp_path, "train.global_batch_size=12", "data.canonical_streams=null"), world).order
    assert order.streams == 2
    assert np.array_equal(order.batch(1).ids, Order(order.datasets[0].counts, order.seed, 12, 2).batch(1).ids)


def test_no_shards_few_samples_and_no_place_for_the_index_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepare(settings(shards, tmp_path, f"data.shards={shards}/none-*.tar"), 2)
    with pytest.raises(DataError, match="40 usable samples are fewer than one global batch of 64"):
        prepare(settings(shards, tmp_path, "train.global_batch_size=64"), 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be stored here") as caught:
        prepare(settings(shards, tmp_path, f"data.index={tmp_path / 'file'}"), 2)
    assert "data.index" in caught.value.hint


# ---- several data sets --------------------------------------------------------------------------------------------------


def mixed(shards: Path, folder: Path, sources: str, *overrides: str) -> Config:
    return settings(shards, folder, "data.shards=[]", f"data.sources={sources.replace('@', str(shards))}", *overrides)


TWO = "[{name: a, shards: '@/scenes-train-00000.tar', repeat: 3}, {name: b, shards: '@/scenes-train-00001.tar'}]"


def test_several_data_sets_make_one_manifest_and_a_mixture(shards: Path, tmp_path: Path) -> None:
    inputs = prepare(mixed(shards, tmp_path, TWO), 2)
    assert [shard.samples for shard in inputs.train.shards] == [20, 20]
    assert inputs.sources == (Source("a", 0, 1, None, 3.0), Source("b", 1, 1, None, 1.0))
    assert inputs.order.fractions == (0.75, 0.25)
    assert (inputs.order.samples_per_epoch, inputs.order.streams, inputs.order.seed) == (80, 4, 7)
    weighted = prepare(mixed(shards, tmp_path, TWO.replace("repeat: 3", "weight: 1").replace("1.tar'", "1.tar', weight: 3")), 2)
    assert weighted.order.fractions == (0.25, 0.75)


def test_a_single_data_set_with_a_name_has_the_order_it_has_without(shards: Path, tmp_path: Path) -> None:
    named = prepare(mixed(shards, tmp_path, "[{name: a, shards: '@/scenes-train-*.tar', weight: 2}]"), 2)
    plain = prepare(settings(shards, tmp_path), 2)
    assert isinstance(named.order, Order)
    assert named.order.batch(5).ids.tolist() == plain.order.batch(5).ids.tolist()
    assert data_identity(named) == data_identity(plain)
    assert named.sources == (Source("a", 0, 2, 2.0, 1.0),)


def test_data_sets_that_share_a_shard_or_are_too_small_are_refused_by_name(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' and 'b' share a shard") as caught:
        prepare(mixed(shards, tmp_path, TWO.replace("00001.tar", "*.tar")), 2)
    assert caught.value.where.endswith("scenes-train-00000.tar")
    with pytest.raises(DataError, match="'v' has 10 usable samples, fewer than the 16 streams"):
        val = ", {name: v, shards: '@/scenes-val-*.tar'}]"
        prepare(mixed(shards, tmp_path, TWO[:-1] + val, "data.canonical_streams=16"), 2)


def test_the_evaluation_finds_its_shards_beside_the_first_data_set(shards: Path, tmp_path: Path) -> None:
    inputs = prepare(mixed(shards, tmp_path, TWO, "evaluation.knn.enabled=true"), 2)
    assert inputs.bank is inputs.train
    assert inputs.queries is not None
    assert inputs.queries.total == 10


# ---- captions -----------------------------------------------------------------------------------------------------------


def test_samples_without_a_caption_are_left_out_where_the_method_reads_text(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "silent"
    silent.mkdir()
    for shard in shards.glob("*.tar"):  # every second sample loses what is written about it
        with tarfile.open(shard) as source, tarfile.open(silent / shard.name, "w") as copy:
            for member in source:
                key, _, extension = member.name.partition(".")
                if extension == "jpg" or int(key[-1]) % 2:
                    copy.addfile(member, source.extractfile(member))
    assert prepare(settings(silent, tmp_path), 2).train.total == 40
    monkeypatch.setattr(Dinov2Settings, "reads_text", True)
    excluded = prepare(settings(silent, tmp_path), 2).train
    assert excluded.counts == {"ok": 20, "missing_caption": 20}
    assert prepare(settings(silent, tmp_path, "data.missing_caption=blank"), 2).train.total == 40
    evaluated = ["evaluation.knn.enabled=true", f"evaluation.knn.train_shards={silent}/scenes-train-*.tar"]
    inputs = prepare(settings(silent, tmp_path, *evaluated), 2)
    assert inputs.bank is not None
    # The same shards by two rules are two indexes, made by reading them once: one must not overwrite the other.
    assert (inputs.train.fields.require, inputs.bank.fields.require) == (("caption",), ())
    assert (len(inputs.train.rows(0).keys), len(inputs.bank.rows(0).keys)) == (10, 20)
    lines = prepare(settings(shards, tmp_path, "data.caption_lines=true"), 2)
    assert lines.train.fields.caption_lines


# ---- data that have changed -----------------------------------------------------------------------------------------------


def checkpoint(run: RunDirectory, config: Config, inputs: Inputs, **data: Any) -> Saved:
    path = run.checkpoints / "step_000000010"
    path.mkdir(parents=True, exist_ok=True)
    (path / "rank_00000.safetensors").write_bytes(b"tensors")
    manifest = {
        "format": 1,
        "step": 10,
        "config": config.model_dump(mode="json"),
        "data": {**data_identity(inputs), "samples": inputs.train.total, **data},
        "files": [entry(path / "rank_00000.safetensors")],
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    record_data(run.data, inputs)
    return Saved(path, json.loads((path / "manifest.json").read_text()))


@pytest.fixture
def three(tmp_path: Path) -> Path:
    folder = tmp_path / "three"
    scenes.write(folder, train=60, val=1, size=32, samples_per_shard=20)
    return folder


def edit(folder: Path) -> None:
    """One shard gone, one new, one with other samples."""
    other = folder.parent / "other"
    scenes.write(other, train=15, val=1, size=32, samples_per_shard=15, seed=9)
    (folder / "scenes-train-00001.tar").unlink()
    shutil.copy(other / "scenes-train-00000.tar", folder / "scenes-train-00002.tar")
    shutil.copy(other / "scenes-train-00000.tar", folder / "scenes-train-00007.tar")


def test_changed_data_are_refused_with_the_shards_that_differ(three: Path, tmp_path: Path) -> None:
    config = settings(three, tmp_path)
    saved = checkpoint(RunDirectory(tmp_path / "run"), config, prepare(config, 2))
    edit(three)
    with pytest.raises(CheckpointError) as caught:
        check_data(saved, prepare(config, 2))
    told = caught.value.what
    assert "60 samples in 3 shards then, 50 in 3 now" in told
    assert "1 gone: scenes-train-00001.tar (20)" in told
    assert "1 new: scenes-train-00007.tar (15)" in told
    assert "1 changed: scenes-train-00002.tar (20 samples, " in told
    assert "scenes-train-00000.tar" not in told
    assert "checkpoint.allow_data_change=true" in caught.value.hint
    shutil.rmtree(tmp_path / "run" / "data")  # a checkpoint that was copied without the rest of its run
    with pytest.raises(CheckpointError, match="60 samples then, 50 in 3 shards now"):
        check_data(saved, prepare(config, 2))


def test_changed_data_are_accepted_knowingly_and_told_once(three: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    config = settings(three, tmp_path, "checkpoint.allow_data_change=true")
    checkpoint(run, config, prepare(config, 2))
    assert choose_checkpoint(config, run, prepare(config, 2))[1] == []
    edit(three)
    inputs = prepare(config, 2)
    found, told = choose_checkpoint(config, run, inputs)
    assert found is not None
    assert found.step == 10
    (sentence,) = told
    assert "continues at step 10 over other data" in sentence
    assert "1 gone: scenes-train-00001.tar (20)" in sentence
    checkpoint(run, config, inputs)  # the next one is of the new data, so nothing is left to tell
    assert choose_checkpoint(config, run, inputs)[1] == []


def test_other_shares_are_other_data_and_may_be_accepted(shards: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    config = mixed(shards, tmp_path, TWO)
    saved = checkpoint(run, config, prepare(config, 2))
    assert check_data(saved, prepare(config, 2)) == ""
    for changed in (mixed(shards, tmp_path, TWO.replace("3}", "2}")), settings(shards, tmp_path)):
        with pytest.raises(CheckpointError, match=r"sources was \[\['a', 1, None, 3.0\]"):
            check_data(saved, prepare(changed, 2))
        assert "sources was" in check_data(saved, prepare(changed, 2), allow=True)


@pytest.mark.parametrize(("name", "value"), [("seed", 8), ("lanes", 2), ("plan", 0), ("block", 3)])
def test_what_is_no_data_is_never_accepted(shards: Path, tmp_path: Path, name: str, value: int) -> None:
    config = settings(shards, tmp_path)
    saved = checkpoint(RunDirectory(tmp_path / "run"), config, prepare(config, 2), **{name: value})
    with pytest.raises(CheckpointError, match=f"{name} was {value}") as caught:
        check_data(saved, prepare(config, 2), allow=True)
    assert "allow_data_change" not in caught.value.hint


class Nothing:
    """Stands where an engine or a method would."""


def test_over_other_data_the_quarantine_is_dropped_and_the_counters_stay(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "load", lambda *_: None)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    config = settings(three, tmp_path)
    facts = {"seen": 160, "substituted": {"corrupt": 1}, "quarantine": {"5": "corrupt"}, "counts": {"seen/a": 160}}
    saved = checkpoint(RunDirectory(tmp_path / "run"), config, prepare(config, 2), **facts)
    saved.manifest.update({"applied": 10, "skipped": 0, "scores": {}, "seconds": 1.0})
    engine: Any = Nothing()
    bad_samples = assemble.BadSamples(None)
    assemble._restore(saved, engine, engine, bad_samples, prepare(config, 2), False)
    assert bad_samples.state() == {
        "seen": 160,
        "reasons": {"corrupt": 1},
        "counts": {"seen/a": 160},
        "quarantine": {"5": "corrupt"},
    }
    edit(three)
    progress = assemble._restore(saved, engine, engine, bad_samples, prepare(config, 2), True)
    assert progress.step == 10
    assert bad_samples.state() == {"seen": 160, "reasons": {"corrupt": 1}, "counts": {"seen/a": 160}, "quarantine": {}}
    with pytest.raises(CheckpointError):
        assemble._restore(saved, engine, engine, bad_samples, prepare(config, 2), False)
