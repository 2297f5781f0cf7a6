"""The order and the position of the library: exact resume at any sample on any number of ranks, loops, random access."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DataError
from tests.helpers.opened import BATCH, Opener, is_bad, keys_in_order


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


def test_copies_do_not_share_their_position(opened: Opener) -> None:
    dataset = opened()
    next(iter(dataset))
    for other in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert other.state_dict() == dataset.state_dict()
        other.seek(3)
        assert next(iter(other))["__position__"] == 24
    assert dataset.state_dict()["samples"] == 1


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
