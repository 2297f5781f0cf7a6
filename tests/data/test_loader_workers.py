"""The library with worker processes: plain and stateful DataLoaders, its own loader, kept workers, other numbers of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline.data import ShardDataset, ShardSource
from pipeline.errors import ConfigError, DataError, TrainingError
from tests.helpers.library import make
from tests.helpers.shared import made_once

pytestmark = pytest.mark.slow
BATCH, EPOCH = 8, 48
PROTOCOLS = ["ours", "plain", "stateful"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "library", make)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total.*")
        yield


class Opener:
    def __init__(self, folder: Path, index: Path) -> None:
        self.folder, self.index = folder, index

    def __call__(self, **options: Any) -> ShardDataset:
        kept = {"global_batch_size": BATCH, "seed": 5, "index": str(self.index), **options}
        return ShardDataset(str(self.folder / "a-*.tar"), **kept)


@pytest.fixture(scope="module")
def opened(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    return Opener(folder, tmp_path_factory.mktemp("workers-index"))


def positions(batch: list[dict[str, Any]]) -> list[int]:
    return [one["__position__"] for one in batch]


def everything(loader: Any) -> list[int]:
    return [one for batch in loader for one in positions(batch)]


def stateful() -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader


def make_loader(protocol: str, dataset: ShardDataset, workers: int) -> Any:
    if protocol == "ours":
        return dataset.loader(num_workers=workers, collate_fn=list)
    kind = DataLoader if protocol == "plain" else stateful()
    return kind(dataset, batch_size=dataset.batch_size, num_workers=workers, collate_fn=list)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_interrupted_with_any_workers_the_batches_are_those_of_the_order(opened: Opener, data: st.DataObject) -> None:
    """Attempts with other protocols, ranks and numbers of workers, stopped at any batch while workers are ahead."""
    position, seen = 0, []
    state: Any = None
    for _ in range(data.draw(st.integers(1, 3), "attempts")):
        protocol = data.draw(st.sampled_from(PROTOCOLS), "protocol")
        workers = data.draw(st.integers(0, 3), "workers")
        world = data.draw(st.sampled_from([1, 2]), "ranks")
        batch = data.draw(st.sampled_from([2, BATCH // world]), "batch")
        steps = data.draw(st.integers(1, 9), "steps")
        share = BATCH // world
        states, streams = [], []
        for rank in range(world):
            dataset = opened(rank=rank, world_size=world, batch_size=batch)
            if state is not None:
                dataset.load_state_dict(state)
            loader = make_loader(protocol, dataset, workers)
            own: list[int] = []
            while len(own) < steps * share:
                for one in loader:
                    own += positions(one)
                    if len(own) == steps * share:
                        if protocol != "plain":
                            states.append(loader.state_dict())
                        break
            streams.append(own)
        for step in range(steps):
            seen += [one for own in streams for one in own[step * share : (step + 1) * share]]
        position += steps * BATCH
        if protocol == "plain":  # the user counts steps
            dataset.seek(position // BATCH)
            state = dataset.state_dict()
        else:
            assert all(one == states[0] for one in states) or protocol == "stateful"
            state = states[-1]
    assert seen == list(range(position))


@pytest.mark.parametrize("kept", [False, True], ids=["new workers", "kept workers"])
@pytest.mark.parametrize("protocol", ["plain", "stateful"])
def test_loops_follow_each_other_epoch_by_epoch(opened: Opener, protocol: str, kept: bool) -> None:
    kind = DataLoader if protocol == "plain" else stateful()
    dataset = opened(batch_size=4)
    loader = kind(dataset, batch_size=4, num_workers=2, collate_fn=list, persistent_workers=kept)
    for epoch in range(3):
        assert everything(loader) == list(range(epoch * EPOCH, (epoch + 1) * EPOCH))
    for batch in loader:  # left early: the rest of this epoch is not read
        assert positions(batch)[0] == 3 * EPOCH
        break
    if protocol == "plain":
        assert positions(next(iter(loader)))[0] == 4 * EPOCH
        assert dataset.epoch == 5
        dataset.seek(2)
        assert positions(next(iter(loader)))[0] == 2 * BATCH
        assert positions(next(iter(loader)))[0] == EPOCH
        dataset.seek(2)
        assert everything(loader) == list(range(2 * BATCH, EPOCH))
        assert next(iter(dataset))["__position__"] == EPOCH


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_is_restored_by_its_own_state(opened: Opener, workers: int) -> None:
    """Loaded into the loader, as its users do, within an epoch and at its end."""
    kind = stateful()
    for stop in (5, 12):
        loader = kind(opened(batch_size=4), batch_size=4, num_workers=workers, collate_fn=list)
        seen: list[int] = []
        for batch in loader:
            seen += positions(batch)
            if len(seen) == stop * 4:
                state = loader.state_dict()
                break
        other = kind(opened(batch_size=4), batch_size=4, num_workers=workers, collate_fn=list)
        other.load_state_dict(state)
        for _ in range(3):
            seen += everything(other)
        assert seen == list(range(len(seen)))
        assert len(seen) >= 3 * EPOCH


@pytest.mark.parametrize(("batch", "stop", "fits"), [(8, 1, False), (8, 2, True), (2, 1, False), (2, 3, False), (4, 3, True)])
def test_a_state_of_workers_that_took_no_turns_is_refused(opened: Opener, batch: int, stop: int, fits: bool) -> None:
    """Two workers read every other batch of 4; a loader with batches of another size leaves one of them behind."""
    loader = stateful()(opened(batch_size=4), batch_size=batch, num_workers=2, collate_fn=list)
    seen = [one for _, one in zip(range(stop), loader, strict=False)]
    state = loader.state_dict()
    other = opened(batch_size=4)
    if not fits:
        with pytest.raises(DataError, match="did not take turns"):
            other.load_state_dict(state)
        return
    other.load_state_dict(state)
    assert sorted(number for one in seen for number in positions(one)) == list(range(other.position))


def test_a_state_of_workers_with_other_batches_is_refused_by_the_workers(opened: Opener) -> None:
    kind = stateful()
    loader = kind(opened(batch_size=4), batch_size=4, num_workers=2, collate_fn=list)
    next(iter(loader))
    other = kind(opened(batch_size=8), batch_size=8, num_workers=2, collate_fn=list)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(DataError, match="took turns by other batches"):
        next(iter(other))


def test_the_parent_of_workers_admits_that_it_does_not_know(opened: Opener) -> None:
    dataset = opened()
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=1, collate_fn=list)
    assert dataset.state_dict()["samples"] == 0
    next(iter(loader))
    with pytest.raises(DataError, match=r"does not know how many.*Use dataset\.loader"):
        dataset.state_dict()
    dataset.seek(1)
    assert dataset.state_dict()["samples"] == BATCH


def test_a_seed_that_repeats_does_not_repeat_the_epoch(opened: Opener) -> None:
    import torch

    loader = DataLoader(opened(), batch_size=BATCH, num_workers=2, collate_fn=list)
    for epoch in range(2):
        torch.manual_seed(0)
        assert everything(loader) == list(range(epoch * EPOCH, (epoch + 1) * EPOCH))


def test_spawned_workers_read_the_same(opened: Opener) -> None:
    loader = DataLoader(opened(), batch_size=BATCH, num_workers=1, collate_fn=list, multiprocessing_context="forkserver")
    assert everything(loader) == list(range(EPOCH))
    assert positions(next(iter(loader)))[0] == EPOCH


def test_a_webdataset_pipeline_reads_from_it(folder: Path, tmp_path: Path) -> None:
    import webdataset as wds

    source = ShardSource(str(folder / "a-*.tar"), global_batch_size=BATCH, seed=5, index=str(tmp_path))
    pipeline = wds.DataPipeline(
        source, wds.decode("rgb8"), wds.to_tuple("__position__", "jpg", "cls", "__key__"), wds.batched(BATCH)
    )
    batches = list(DataLoader(pipeline, batch_size=None, num_workers=2))
    assert [int(one) for batch in batches for one in batch[0]] == list(range(EPOCH))
    assert batches[0][1].shape == (BATCH, 16, 20, 3)
    assert [int(key.rpartition("/")[2]) % 7 for key in batches[0][3]] == [int(label) for label in batches[0][2]]
    source.seek(3)
    assert list(next(iter(DataLoader(pipeline, batch_size=None, num_workers=2)))[0]) == list(range(24, 32))


def test_errors_of_a_worker_are_this_projects(opened: Opener, tmp_path: Path) -> None:
    from tests.helpers.library import sample, write

    write(tmp_path / "c.tar", {f"{n:03d}": sample(n) for n in range(16)})
    dataset = ShardDataset(str(tmp_path / "c.tar"), global_batch_size=4, index=str(tmp_path / "index"))
    (tmp_path / "c.tar").write_bytes((tmp_path / "c.tar").read_bytes() + bytes(512))
    with pytest.raises(DataError, match="when it was indexed"):
        list(dataset.loader(num_workers=1, collate_fn=list))
    with pytest.raises(DataError, match="when it was indexed"):
        list(DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=list))


def test_bad_samples_are_counted_when_a_batch_is_handed_out(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data import sample_source

    real = sample_source._decoded
    monkeypatch.setattr(sample_source, "_decoded", lambda record, *rest: None if record.id & 1 else real(record, *rest))
    dataset = opened(decode="rgb8", max_bad_fraction=0.4, bad_fraction_window=16)
    with pytest.raises(TrainingError, match="could not be used"):
        list(dataset.loader(num_workers=2, collate_fn=list))
    assert dataset.bad_samples is not None
    assert dataset.bad_samples.seen <= 32


def test_shards_in_a_bucket_through_the_cache_of_the_node(
    folder: Path, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.s3 import KEYS, upload

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    upload(s3_port, "library", {path.name: path for path in folder.glob("a-*.tar")})
    storage = {"endpoint": f"http://127.0.0.1:{s3_port}", "cache": str(tmp_path / "cache"), "cache_gb": 0.1, "free_gb": 0}
    shards = [f"s3://library/a-{n}.tar" for n in range(3)]
    dataset = ShardDataset(shards, global_batch_size=BATCH, seed=5, index=str(tmp_path / "index"), storage=storage)
    local = ShardDataset(str(folder / "a-*.tar"), global_batch_size=BATCH, seed=5, index=str(tmp_path / "local"))
    assert dataset.source.identity == local.source.identity
    strip = ("__url__",)
    expected = [{name: value for name, value in one.items() if name not in strip} for one in local]
    read = [{name: value for name, value in one.items() if name not in strip} for one in dataset]
    assert read == expected
    for _ in range(200):  # until the thread that fills the cache has had time to
        if len(list((tmp_path / "cache").glob("*-a-*.tar"))) == 3:
            break
        list(dataset)
    else:
        raise AssertionError("the cache stays empty")
    loader = dataset.loader(num_workers=1, collate_fn=list)
    loader.seek(0)
    assert everything(loader) == list(range(EPOCH))
    with pytest.raises(ConfigError, match="forked workers cannot read object storage"):
        next(iter(DataLoader(dataset, batch_size=BATCH, num_workers=1, multiprocessing_context="fork")))
