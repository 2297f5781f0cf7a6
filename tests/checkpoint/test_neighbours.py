"""Snapshots on several nodes: after the loss of any one node, all that remain and a new one have the whole newest snapshot."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoint import files as saved
from pipeline.checkpoint import neighbours
from pipeline.runtime.process_group import World
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import advance, assembled, build, snapshot

RANKS, PER_NODE = 4, 2


def _world(per_node: int = PER_NODE) -> World:
    rank = dist.get_rank()
    return World(rank, dist.get_world_size(), rank % per_node, torch.device("cpu"), None, per_node)


def _folder(directory: str) -> Path:
    return Path(directory) / f"node-{dist.get_rank() // PER_NODE}"


def _facts(step: int) -> dict[str, Any]:
    return {"data": {}, "config": {}, "scores": {}, "step": step, "applied": step, "skipped": 0, "seconds": 0.1 * dist.get_rank()}


def _write(directory: str, *, until: int, full_disk_of: int = -1, seed: int = 0) -> dict[str, Any]:
    """Two snapshots on two nodes, the last after ``until`` steps; on one rank, no more than that of step 2 can be written."""
    from pipeline.checkpoint import memory, writer

    method, engine = build(seed, zero=2)
    place = neighbours.nodes_of(_world())
    assert place is not None
    if place.leads:
        _folder(directory).mkdir(mode=0o700, parents=True)
    snapshots = memory.Snapshots(_folder(directory), 1, nodes=place)
    outcomes = []
    for step in range(1, until + 1):
        advance(method, engine, step - 1)
        failing = step == 3 and dist.get_rank() == full_disk_of
        error = OSError(errno.ENOSPC, "No space left on device") if failing else None
        with mock.patch.object(writer, "write_tensors", wraps=writer.write_tensors, side_effect=error):
            if step > 1:
                outcomes += [snapshots.begin(engine, method, _facts(step)), snapshots.finish()]
    end = snapshot(method, engine)
    engine.close()
    return {"end": end, "outcomes": [one for one in outcomes if one is not None]}


def _read(directory: str) -> dict[str, Any]:
    """What ranks have after a restart, one of whose nodes is new and has nothing."""
    from pipeline.checkpoint import reader

    place = neighbours.nodes_of(_world())
    assert place is not None
    found = neighbours.newest_anywhere(_folder(directory), place)
    if found is None:
        return {"step": None}
    saved.verify(found)
    assert found.path.parent == _folder(directory)
    method, engine = build(7, zero=2)
    reader.load(found, engine, method)
    loaded = snapshot(method, engine)
    engine.close()
    return {"step": found.step, "loaded": loaded}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("memory")
    return folder, pool(RANKS).run(_write, directory=str(folder), until=3)


@pytest.mark.parametrize("lost", [0, 1])
def test_after_the_loss_of_a_node_every_node_has_the_newest_snapshot(
    written: tuple[Path, list[dict[str, Any]]], tmp_path: Path, lost: int
) -> None:
    folder, before = written
    own = [{path.name for path in (folder / f"node-{node}" / "step_000000003").glob("rank_*")} for node in (0, 1)]
    assert own == [{saved.rank_file(rank) for rank in range(RANKS)}] * 2, "of two nodes, each keeps all files"
    copy = Path(shutil.copytree(folder, tmp_path / "memory"))
    shutil.rmtree(copy / f"node-{lost}")
    (copy / f"node-{lost}").mkdir()
    after = pool(RANKS).run(_read, directory=str(copy))
    assert [one["step"] for one in after] == [3] * RANKS
    for moment in (None, "exp_avg", "exp_avg_sq"):
        loaded, reference = (
            assembled([one[key] for one in ranks], moment) for ranks, key in ((after, "loaded"), (before, "end"))
        )
        assert loaded.keys() == reference.keys()
        assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.items())


def _damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def test_a_file_that_is_nowhere_or_damaged_makes_the_snapshot_none(
    written: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for number, spoil in enumerate((Path.unlink, _damage)):
        copy = Path(shutil.copytree(written[0], tmp_path / f"memory-{number}"))
        for node in (0, 1):
            spoil(copy / f"node-{node}" / "step_000000003" / saved.rank_file(1))
        assert [one["step"] for one in pool(RANKS).run(_read, directory=str(copy))] == [None] * RANKS


def test_a_rank_that_cannot_write_lets_nobody_wait_and_the_older_snapshot_stays(tmp_path: Path) -> None:
    for one in pool(RANKS).run(_write, directory=str(tmp_path), until=3, full_disk_of=2):
        first, second = one["outcomes"]
        assert first.step == 2 and first.error is None
        assert second.step == 3 and "rank 2: [Errno 28] No space left" in str(second.error)
    for node in (0, 1):
        assert [path.name for path in (tmp_path / f"node-{node}").iterdir() if path.is_dir()] == ["step_000000002"]
    assert [one["step"] for one in pool(RANKS).run(_read, directory=str(tmp_path))] == [2] * RANKS


def _full(directory: str) -> list[str]:
    """What is said of snapshots that cannot be written."""
    from pipeline.checkpoint import memory, writer

    def full(*_: object, **__: object) -> Any:
        (Path(directory) / ".tmp-step_000000001" / "half").write_bytes(b"x" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    method, engine = build(0, zero=2)
    Path(directory).chmod(0o700)
    snapshots, said = memory.Snapshots(Path(directory), 1), []
    with mock.patch.object(writer, "write_tensors", full):
        for step in range(1, 6):
            if snapshots.due(step, last=9):
                snapshots.begin(engine, method, {**_facts(1), "step": 1})
                outcome = snapshots.finish()
                assert outcome is not None and outcome.error is not None
                said.append(outcome.error.what)
                dist.barrier()
                assert not list(Path(directory).iterdir()), "the memory is not freed"
                dist.barrier()
    engine.close()
    return said


def test_a_full_memory_is_freed_and_after_three_failures_left_alone(tmp_path: Path) -> None:
    for said in pool(2).run(_full, directory=str(tmp_path)):
        assert len(said) == 3
        assert ["no more snapshots are taken" in text for text in said] == [False, False, True]


def test_a_file_that_was_cut_off_is_fetched_again(written: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """As by ranks that died while they completed a snapshot."""
    copy = Path(shutil.copytree(written[0], tmp_path / "memory"))
    file = copy / "node-0" / "step_000000003" / saved.rank_file(3)
    file.write_bytes(file.read_bytes()[:100])
    (copy / "node-1" / "step_000000003" / f".{saved.rank_file(0)}").write_bytes(b"half")
    (copy / "node-1" / "step_000000003" / saved.rank_file(0)).unlink()
    assert [one["step"] for one in pool(RANKS).run(_read, directory=str(copy))] == [3] * RANKS


def test_snapshots_of_two_attempts_at_the_same_step_are_never_mixed(
    written: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Node 0 holds one version, node 1 another; one of them becomes that of both."""
    pool(RANKS).run(_write, directory=str(tmp_path / "other"), until=3, seed=5)
    copy = Path(shutil.copytree(written[0], tmp_path / "memory"))
    shutil.rmtree(copy / "node-1")
    shutil.copytree(tmp_path / "other" / "node-1", copy / "node-1")
    assert [one["step"] for one in pool(RANKS).run(_read, directory=str(copy))] == [3] * RANKS
    ids = {saved.read(copy / f"node-{node}" / "step_000000003").id for node in (0, 1)}
    assert len(ids) == 1


def test_a_node_keeps_no_more_than_its_own_files_and_those_of_the_one_before(tmp_path: Path) -> None:
    place = neighbours.NodePlace(True, 2, 4, None, None, None, 2)  # type: ignore[arg-type]
    for rank in range(6):
        (tmp_path / "step_000000003").mkdir(exist_ok=True)
        (tmp_path / "step_000000003" / saved.rank_file(rank)).touch()
    with mock.patch.object(dist, "get_world_size", lambda: 6), mock.patch.object(dist, "get_rank", lambda: 0):
        place.trim(tmp_path)
    assert {path.name for path in tmp_path.glob("*/*")} == {saved.rank_file(rank) for rank in (0, 1, 4, 5)}


def _uneven() -> object:
    rank = dist.get_rank()
    return neighbours.nodes_of(World(rank, RANKS, rank // PER_NODE, torch.device("cpu"), None, PER_NODE))


def test_ranks_that_are_not_numbered_node_by_node_have_no_place() -> None:
    assert pool(RANKS).run(_uneven) == [None] * RANKS
