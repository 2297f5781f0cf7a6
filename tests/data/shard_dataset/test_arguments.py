"""Ranks, sizes, states and settings of the library, and what is refused of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import ShardDataset
from pipeline.errors import ConfigError, DataError
from tests.helpers.channel_images import npy_file, random_image, write_tar
from tests.helpers.opened import Opener


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
    with pytest.raises(ConfigError, match="3 ranks cannot share a global batch of 8 evenly"):
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


def test_states_of_other_channels_are_refused(tmp_path: Path) -> None:
    """The hash of the shards does not tell in which order the files of an image are stacked."""
    files = [
        {"a.npy": npy_file(random_image("uint16", 1, seed=n)), "b.npy": npy_file(random_image("uint16", 1))} for n in range(8)
    ]
    write_tar(tmp_path / "x.tar", [(f"k{n}", members) for n, members in enumerate(files)])

    def opened(**channels: Any) -> ShardDataset:
        options: dict[str, Any] = {"channels": {"count": 2, **channels}, "index": str(tmp_path / "index")}
        return ShardDataset(str(tmp_path / "x.tar"), global_batch_size=4, canonical_streams=2, **options)

    state = opened(members=["a.npy", "b.npy"]).state_dict()
    opened(members=["a.npy", "b.npy"]).load_state_dict(state)
    with pytest.raises(DataError, match="the state belongs to the order"):
        opened(members=["b.npy", "a.npy"]).load_state_dict(state)
