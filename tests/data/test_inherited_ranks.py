"""Ranks that inherit a data set from the process that starts them: each finds its own rank and has loops of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from pipeline.data import ShardDataset
from tests.helpers.library import make
from tests.helpers.shared import made_once

pytestmark = pytest.mark.slow
BATCH, EPOCH, WORLD = 8, 48, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "library", make)


def position(sample: dict[str, Any]) -> int:
    return int(sample["__position__"])


def read(rank: int, dataset: ShardDataset, folder: Path, third: bool) -> None:
    """One rank: the data set itself, then two loops of a loader with workers, which begin on all ranks before one ends."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=WORLD)
    own = [number for _, number in zip(range(4), dataset, strict=False)]
    dataset.seek(0)
    loader = DataLoader(dataset, batch_size=dataset.batch_size, num_workers=2, collate_fn=list)
    loops = []
    for _ in range(2):
        batches = iter(loader)
        first = next(batches)
        dist.barrier()
        loops.append([*first, *(number for batch in batches for number in batch)])
    if third:
        options = {"num_workers": 1, "collate_fn": list, "multiprocessing_context": "spawn"}
        loops.append(next(iter(DataLoader(dataset, dataset.batch_size, **options))))
    (folder / f"{rank}.json").write_text(json.dumps([own, loops, dataset.position]))
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ranks_started_after_the_data_set_read_as_if_each_had_opened_it(folder: Path, tmp_path: Path, method: str) -> None:
    dataset = ShardDataset(
        str(folder / "a-*.tar"), global_batch_size=BATCH, seed=5, index=str(tmp_path / "index"), transform=position
    )
    third = method == "fork"  # a forked rank with a spawned worker, beside a spawned rank with forked ones
    mp.start_processes(read, (dataset, tmp_path, third), nprocs=WORLD, start_method=method)
    share = BATCH // WORLD
    for rank in range(WORLD):
        own, loops, after = json.loads((tmp_path / f"{rank}.json").read_text())
        numbers = [n for n in range(3 * EPOCH) if n % BATCH // share == rank]
        size = EPOCH // WORLD
        assert own == numbers[:share]
        assert loops == [numbers[:size], numbers[size : 2 * size], numbers[2 * size : 2 * size + share]][: 2 + third]
        assert after == (2 + third) * EPOCH
    assert dataset.position == 0, "the process that started them has read nothing"
