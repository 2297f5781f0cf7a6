"""The library in one process: what a sample holds, the order, exact resume on any number of ranks, random access, refusals."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data import ShardDataset
from pipeline.data.index.tar import walk, walk_indexed
from pipeline.data.storage import Storage, stat
from pipeline.errors import ConfigError, DataError, TrainingError
from tests.helpers.library import jpeg, make, sample, write
from tests.helpers.shared import made_once

BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "library", make)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("library-index")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class Opener:
    """Opens the data set with the same settings again and again."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.folder, self.index = folder, index
        self.objects: dict[Any, ShardDataset] = {}

    def __call__(self, **options: Any) -> ShardDataset:
        shards = [str(self.folder / "a-*.tar")] if "sources" not in options else ()
        return ShardDataset(shards, **{"global_batch_size": BATCH, "seed": 5, "index": str(self.index), **options})

    def kept(self, mixed: bool, **options: Any) -> ShardDataset:
        """The same object for the same options: opening one takes a hundredth of a second."""
        key = (mixed, *sorted(options.items()))
        if key not in self.objects:
            self.objects[key] = self.mixture(**options) if mixed else self(**options)
        return self.objects[key]

    def mixture(self, **options: Any) -> ShardDataset:
        sets = [{"name": name, "shards": f"{self.folder}/{name}-*.tar", "weight": w} for name, w in (("a", 3), ("b", 1))]
        return self(sources=sets, canonical_streams=4, **options)


@pytest.fixture(scope="module")
def opened(folder: Path, index: Path) -> Opener:
    return Opener(folder, index)


def keys_in_order(dataset: ShardDataset, steps: int) -> list[str]:
    order, manifest = dataset.source.order, dataset.source.manifest
    ids = np.concatenate([order.batch(step).ids for step in range(steps)]).tolist()
    return [manifest.rows(number >> 32).keys[number & 0xFFFFFFFF] for number in ids]


def is_bad(one: dict[str, Any]) -> bool:
    return bool(one["__bad__"])


def test_a_sample_has_its_members_as_bytes_whatever_their_order(opened: Opener) -> None:
    seen = {one["__key__"]: one for one in opened()}
    assert len(seen) > 45
    for key, one in seen.items():
        if is_bad(one):
            continue
        number = int(key.rpartition("/")[2])
        assert {name: data for name, data in one.items() if not name.startswith("__")} == sample(number)
        assert one["__label__"] == number % 7
        assert one["__url__"].endswith(f"{key[:3]}.tar")


def test_members_that_are_not_wanted_are_not_returned(opened: Opener) -> None:
    one = next(iter(opened(members=["cls"])))
    assert {name for name in one if not name.startswith("__")} == {"jpg", "cls"}


def test_decoded_samples(opened: Opener) -> None:
    for kind, check in (
        ("rgb8", lambda image: isinstance(image, np.ndarray) and image.shape == (16, 20, 3)),
        ("torchrgb8", lambda image: isinstance(image, torch.Tensor) and image.shape == (3, 16, 20)),
        ("pil", lambda image: isinstance(image, Image.Image) and image.size == (20, 16)),
    ):
        one = next(iter(opened(decode=kind)))
        number = int(one["__key__"].rpartition("/")[2])
        assert check(one["jpg"])
        assert (one["cls"], one["json"]["number"]) == (number % 7, number)
        assert one["vec.bin"] == sample(number)["vec.bin"]
        assert np.array_equal(
            np.asarray(opened(decode="rgb8").batch(0)[0]["jpg"]), np.asarray(Image.open(io.BytesIO(jpeg(number))))
        )
    with pytest.raises(ConfigError, match="Choose one of pil"):
        opened(decode="pytorch")


def test_the_order_is_that_of_a_run(opened: Opener) -> None:
    """Two epochs of loops are the first steps of Order, each sample of the data once in each epoch."""
    for dataset in (opened(), opened.mixture()):
        samples = [one for _ in range(2) for one in dataset]
        steps = len(samples) // BATCH
        assert [one["__position__"] for one in samples] == list(range(steps * BATCH))
        expected = keys_in_order(dataset, steps)
        assert [one["__key__"] for one in samples if not is_bad(one)] == [
            key for key, one in zip(expected, samples, strict=True) if not is_bad(one)
        ]
    single = opened()
    many = [one for _ in range(3) for one in single]
    for epoch in (0, 1):
        counts = Counter(one["__key__"] for one in many if one["__epoch__"] == epoch and not is_bad(one))
        assert set(counts.values()) == {1}
        assert sum(one["__epoch__"] == epoch for one in many) == single.samples_per_epoch == 48


def test_captions_alternate_by_epoch(opened: Opener) -> None:
    dataset = opened(caption_lines=True, decode="rgb8")
    chosen: dict[str, set[str]] = {}
    for _ in range(8):
        for one in dataset:
            assert one["txt"] == one["__caption__"]
            chosen.setdefault(one["__key__"], set()).add(one["txt"].split()[0])
    assert set().union(*chosen.values()) == {"first", "second"}
    assert sum(len(texts) == 2 for texts in chosen.values()) > 40
    again = opened(caption_lines=True, decode="rgb8")
    assert [one["txt"] for one in again.batch(3)] == [one["txt"] for one in dataset.batch(3)]


@settings(max_examples=40)
@given(data=st.data())
def test_interrupted_on_any_ranks_the_samples_are_those_of_the_order(opened: Opener, data: st.DataObject) -> None:
    """Attempts on 1, 2, 4 and 8 ranks, stopped at any batch, by any protocol: over epochs, no sample is lost or doubled."""
    mixed = data.draw(st.booleans(), "mixture")
    worlds = (1, 2, 4) if mixed else (1, 2, 4, 8)
    state: dict[str, Any] | None = None
    seen: list[str] = []
    total = 0
    for _ in range(data.draw(st.integers(1, 4), "attempts")):
        world = data.draw(st.sampled_from(worlds), "ranks")
        share = BATCH // world
        batch = data.draw(st.sampled_from([n for n in (1, 2, 4, 8) if share % n == 0]), "batch")
        steps = data.draw(st.integers(0, 14), "steps")
        protocol = data.draw(st.sampled_from(["dataset", "loader", "random access"]), "protocol")
        streams: list[list[Any]] = []
        states = []
        for rank in range(world):
            dataset = opened.kept(mixed, rank=rank, world_size=world, batch_size=batch)
            dataset.seek(0)
            if state is not None:
                dataset.load_state_dict(copy.deepcopy(state))
            own: list[Any] = []
            if protocol == "random access":
                first = dataset.state_dict()["samples"] // BATCH
                own = [one for step in range(first, first + steps) for one in dataset.batch(step)]
                dataset.seek(first + steps)
                states.append(dataset.state_dict())
            else:
                source: Any = dataset if protocol == "dataset" else dataset.loader(collate_fn=list)
                while len(own) < steps * share:  # loops end with their epoch
                    for one in source:
                        own += [one] if protocol == "dataset" else one
                        if len(own) == steps * share:
                            break
                states.append(source.state_dict())
            streams.append(own)
        assert all(one == states[0] for one in states)
        for step in range(steps):
            for own in streams:
                seen += [f"{one['__position__']} {one['__key__']}" for one in own[step * share : (step + 1) * share]]
        state, total = states[0], total + steps
        assert state["samples"] == total * BATCH
        assert set(state) == {"order", "samples", "world_size"}
    whole = opened.kept(mixed, endless=True)
    whole.seek(0)
    expected = [f"{one['__position__']} {one['__key__']}" for one, _ in zip(whole, range(total * BATCH), strict=False)]
    assert seen == expected


@given(stop=st.integers(0, 60), batch=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=20)
def test_one_rank_stops_at_any_sample(opened: Opener, stop: int, batch: int) -> None:
    dataset, other = opened.kept(False, batch_size=batch), opened.kept(False, batch_size=8)
    dataset.seek(0)
    seen: list[int] = []
    while len(seen) < stop:
        for one in dataset:
            seen.append(one["__position__"])
            if len(seen) == stop:
                break
    state = dataset.state_dict()
    assert state["samples"] == stop
    other.load_state_dict(state)
    for _ in range(2):
        seen += [one["__position__"] for one in other]
    assert seen == list(range(len(seen)))
    assert len(seen) % 48 == 0


def test_state_within_a_step_fits_only_as_many_ranks(opened: Opener) -> None:
    dataset = opened(rank=0, world_size=2)
    for _, _one in zip(range(3), dataset, strict=False):
        pass
    state = dataset.state_dict()
    assert state["samples"] == 6
    other = opened(rank=1, world_size=2)
    other.load_state_dict(state)
    assert next(iter(other))["__position__"] == 4 + 3
    for world in (1, 4):
        with pytest.raises(DataError, match=rf"{world} ranks cannot continue it.*Use 2 ranks, or save"):
            opened(rank=0, world_size=world).load_state_dict(state)
        with pytest.raises(DataError, match=f"{world} ranks cannot continue it"):
            opened(rank=0, world_size=world).loader().load_state_dict(state)
    with pytest.raises(DataError, match="unknown number of ranks"):
        other.load_state_dict({name: value for name, value in state.items() if name != "world_size"})
    for nonsense in (0, True, "2", None):
        with pytest.raises(DataError, match="is not a state"):
            other.load_state_dict({**state, "world_size": nonsense})


@pytest.mark.parametrize("protocol", ["dataset", "loader"])
def test_a_step_begun_by_other_ranks_is_refused_although_its_position_divides(opened: Opener, protocol: str) -> None:
    """Half of the step of 8 on one rank is samples 0 to 3; on two ranks it is 0, 1, 4 and 5."""
    dataset = opened(batch_size=4)
    source: Any = dataset if protocol == "dataset" else dataset.loader(collate_fn=list)
    for _, _one in zip(range(4 if protocol == "dataset" else 1), source, strict=False):
        pass
    state = source.state_dict()
    assert (state["samples"], state["world_size"]) == (4, 1)
    with pytest.raises(DataError, match="1 ranks have begun; 2 ranks cannot continue it"):
        opened(rank=0, world_size=2).load_state_dict(state)


def test_ranks_that_are_known_later_are_checked_by_the_loop(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, state = opened(), {**opened().state_dict(), "samples": 4, "world_size": 2}
    dataset.load_state_dict(state)
    assert dataset.state_dict() == state
    with pytest.raises(DataError, match="1 ranks cannot continue it"):
        iter(dataset)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert next(iter(dataset))["__position__"] == 6


def test_data_set_and_loader_have_one_position(opened: Opener) -> None:
    dataset = opened()
    loader = dataset.loader(collate_fn=list)
    dataset.seek(2)
    assert (loader.step, next(iter(loader))[0]["__position__"]) == (2, 16)
    assert dataset.state_dict() == loader.state_dict()
    assert (dataset.position, next(iter(dataset))["__position__"]) == (24, 24)
    with pytest.raises(DataError, match="lies within a batch of 8"):
        next(iter(loader))
    dataset.load_state_dict({**dataset.state_dict(), "samples": 32})
    assert next(iter(loader))[0]["__position__"] == 32
    loader.seek(1)
    assert dataset.position == BATCH


def test_the_loop_after_a_break_continues(opened: Opener) -> None:
    dataset = opened()
    first = [one["__position__"] for _, one in zip(range(5), dataset, strict=False)]
    assert first + [one["__position__"] for one in dataset] == list(range(48))
    assert dataset.epoch == 1
    loader = opened().loader(collate_fn=list)
    assert len(loader) == 6
    for batch in loader:
        assert len(batch) == BATCH
        break
    assert (loader.step, loader.epoch, len(loader)) == (1, 0, 6)
    assert len(list(loader)) == 5
    assert (loader.step, loader.epoch) == (6, 1)


def test_random_access_moves_nothing(opened: Opener) -> None:
    dataset = opened(rank=1, world_size=2)
    before = dataset.state_dict()
    assert [one["__position__"] for one in dataset.batch(1000)] == [8004, 8005, 8006, 8007]
    assert [one["__position__"] for one in dataset.batch(2, rank=0, world_size=1)] == list(range(16, 24))
    assert dataset.state_dict() == before
    with pytest.raises(ConfigError, match="negative"):
        dataset.batch(-1)
    with pytest.raises(ConfigError, match="step: -1 is not an integer from 0 on"):
        dataset.seek(-1)


def test_bad_samples_are_substituted_counted_and_recorded(opened: Opener, tmp_path: Path) -> None:
    """An image that cannot be decoded: another sample of its shard takes its place, the one that a run would use."""
    dataset = opened(decode="rgb8", bad_samples=tmp_path / "bad", max_bad_fraction=0.5)
    number = 1 << 32 | 3
    with pytest.MonkeyPatch.context() as patch:
        from pipeline.data import sample_source

        real = sample_source._decoded
        patch.setattr(sample_source, "_decoded", lambda record, kind: None if record.id == number else real(record, kind))
        samples = [one for _ in range(2) for one in dataset]
    bad = [one for one in samples if is_bad(one)]
    assert 1 <= len(bad) <= 2
    assert all(one["__bad__"] == "undecodable" and one["__key__"].startswith("a-1/") for one in bad)
    assert dataset.bad_samples is not None
    assert (dataset.bad_samples.seen, dict(dataset.bad_samples.reasons)) == (len(samples), {"undecodable": len(bad)})
    lines = [json.loads(line) for line in (tmp_path / "bad" / "rank-0-worker-0.jsonl").read_text().splitlines()]
    assert [(line["key"], line["step"]) for line in lines] == [
        (dataset.source.manifest.rows(1).keys[3], one["__position__"] // BATCH) for one in bad
    ]
    substitutes = [dataset.source.reader.substitute(number, one["__epoch__"], 5, 0) for one in bad]
    assert [line["substitute"] for line in lines] == substitutes


def test_a_changed_image_is_substituted_without_decoding_and_too_many_stop(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.tar"
    write(path, {f"{n:03d}": sample(n) for n in range(16)})
    dataset = ShardDataset(
        str(path), global_batch_size=4, index=str(tmp_path / "index"), max_bad_fraction=0.001, bad_fraction_window=8
    )
    before = path.stat()
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offsets = [member.offset_data for member in tar if member.name.endswith("jpg")]
    data[offsets[3] + 300] ^= 0xFF
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(TrainingError, match="could not be used"):
        list(dataset)
    assert [one["__bad__"] for step in range(4) for one in dataset.batch(step)].count("corrupt") == 1
    for offset in offsets:
        data[offset + 300] ^= 0xFF if offset != offsets[3] else 0
    path.write_bytes(data)
    gray = dataset.batch(0)[0]
    assert Image.open(io.BytesIO(gray["jpg"])).size == (64, 64)
    assert (gray["__label__"], gray["__caption__"], gray["__bad__"]) == (-1, "", "corrupt")


def test_ranks_come_from_arguments_then_from_the_environment(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened()
    assert (dataset.ranks.rank, dataset.ranks.world, dataset.batch_size) == (0, 1, 8)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ConfigError, match="WORLD_SIZE is None"):
        next(iter(dataset))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert next(iter(dataset))["__position__"] == 6
    assert next(iter(opened(rank=1, world_size=2)))["__position__"] == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 ranks cannot share 8 streams evenly"):
        next(iter(dataset))
    with pytest.raises(ConfigError, match="one of rank and world_size"):
        opened(rank=1)
    with pytest.raises(ConfigError, match="rank 2 does not exist"):
        opened(rank=2, world_size=2)


def test_a_batch_size_that_does_not_divide_is_refused(opened: Opener) -> None:
    with pytest.raises(ConfigError, match="batches of 3 samples do not divide the 4 samples"):
        opened(batch_size=3, rank=0, world_size=2)


def test_states_of_other_data_are_refused(opened: Opener) -> None:
    state = opened().state_dict()
    for other in (opened(seed=6), opened(global_batch_size=4), opened(canonical_streams=4), opened.mixture()):
        with pytest.raises(DataError, match="belongs to the order"):
            other.load_state_dict(state)
    for nonsense in ({}, {"samples": 3}, {"samples": -1, "order": state["order"]}, {"samples": "3", "order": state["order"]}, []):
        with pytest.raises(DataError, match="is not a state"):
            opened().load_state_dict(nonsense)  # type: ignore[arg-type]


def test_unknown_settings_are_refused(opened: Opener) -> None:
    for options, message in (
        ({"shardz": 3}, "shardz"),
        ({"shuffle_block_size": 0}, "shuffle_block_size"),
        ({"sources": []}, "no data set"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(**options)
    with pytest.raises(ConfigError, match="required"):
        ShardDataset(global_batch_size=4)


def test_copies_do_not_share_their_position(opened: Opener) -> None:
    dataset = opened()
    next(iter(dataset))
    for other in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert other.state_dict() == dataset.state_dict()
        other.seek(3)
        assert next(iter(other))["__position__"] == 24
    assert dataset.state_dict()["samples"] == 1


def test_indexed_walk_yields_what_the_strict_walk_yields(tmp_path: Path) -> None:
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        names = {f"{'d' * 60}/{n:03d}{'x' * 60}": sample(n) for n in range(8)}
        names[f"{'long/' * (30 if form != tarfile.USTAR_FORMAT else 1)}1"] = sample(8)
        write(path, names, format=form)
        with tarfile.open(path, "a", format=form) as tar:
            tar.addfile(tarfile.TarInfo("folder"))
            link = tarfile.TarInfo("z.link")
            link.type, link.linkname = tarfile.SYMTYPE, "a"
            tar.addfile(link)
        source = Storage().open(stat(str(path)))
        members = list(walk(source))
        assert list(walk_indexed(source, 0)) == members
        start = members[5].offset - 512
        if form == tarfile.USTAR_FORMAT:
            assert list(walk_indexed(source, start)) == members[5:]


def test_a_pickled_copy_finds_its_rank_where_it_is_read(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or has that of the process that pickled it: in a worker of a DataLoader, and where nothing says another."""

    def environment(rank: int | None) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", 4)):
            monkeypatch.delenv(name, raising=False) if rank is None else monkeypatch.setenv(name, str(value))

    before = pickle.dumps(opened())
    environment(3)
    known = pickle.dumps(opened())
    for copied in (pickle.loads(before), copy.deepcopy(pickle.loads(before))):
        assert (copied.ranks.rank, copied.ranks.world) == (3, 4)
    environment(1)
    assert pickle.loads(known).ranks.rank == 1
    assert next(iter(pickle.loads(known)))["__position__"] == 2
    with monkeypatch.context() as worker:
        worker.setattr("pipeline.data.shard_dataset.get_worker_info", lambda: object())
        assert pickle.loads(known).ranks.rank == 3
        assert pickle.loads(pickle.dumps(pickle.loads(known))).ranks.rank == 3
    monkeypatch.delenv("WORLD_SIZE")
    pickle.dumps(opened())
    environment(None)
    assert (pickle.loads(known).ranks.rank, pickle.loads(before).ranks.world) == (3, 1)
    explicit = pickle.loads(pickle.dumps(opened(rank=1, world_size=2)))
    environment(3)
    assert (explicit.ranks.rank, explicit.ranks.world) == (1, 2)


def test_loops_write_into_no_file_of_another_kind(tmp_path: Path) -> None:
    """The number of a closed file may be given to another one before a copy is unpickled."""
    from pipeline.data.loops import _attached

    path = tmp_path / "precious"
    path.write_text("{}")
    with path.open("r+") as file:
        child = subprocess.Popen(["sleep", "60"], stdin=file)
        try:
            _attached(child.pid, 0).move((1, 8, 0))
        finally:
            child.kill()
            child.wait()
    assert path.read_text() == "{}"


@pytest.mark.parametrize(
    "make",
    [
        lambda shards: ShardDataset(shards, global_batch_size="8").source,
        lambda shards: ShardDataset(shards, global_batch_size=8.0).source,
        lambda shards: ShardDataset(shards, global_batch_size=0).source,
        lambda shards: ShardDataset(shards, global_batch_size=8, seed=-1).source,
        lambda shards: ShardDataset(shards, global_batch_size=8, seed=1 << 63).source,
        lambda shards: ShardDataset(shards, global_batch_size=8).seek("3"),
        lambda shards: ShardDataset(shards, global_batch_size=8).seek(-1),
        lambda shards: ShardDataset(shards, global_batch_size=8).loader(num_workers=-1),
        lambda shards: ShardDataset(shards, global_batch_size=8).loader(num_workers=None),
    ],
)
def test_numbers_that_are_none_are_refused_by_name(make: Callable[[str], Any], folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(global_batch_size|seed|step|num_workers): .* is not an integer from [01] on"):
        make(str(folder / "a-*.tar"))


def test_numpy_integers_are_integers(folder: Path) -> None:
    dataset = ShardDataset(str(folder / "a-*.tar"), global_batch_size=np.int32(8), seed=np.uint8(3))
    assert dataset.source.order.global_batch == 8
