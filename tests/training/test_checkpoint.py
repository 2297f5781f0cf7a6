"""Checkpoints of real ranks: what comes back is what was written, to the bit, on any number of ranks; or nothing was written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import CheckpointError
from pipeline.training import saved
from tests.pool import pool
from tests.training.toy import Toy, advance, assembled, build, options, snapshot

FACTS = {"data": {}, "config": {}, "scores": {}}


def _facts(step: int) -> dict[str, Any]:
    return {**FACTS, "step": step, "applied": step, "skipped": 0}


def _train(
    directory: str,
    *,
    load: int | None = None,
    until: int,
    save: tuple[int, ...] = (),
    seed: int = 0,
    zero: int = 2,
    keep: int = 9,
) -> dict[str, Any]:
    """Steps from a checkpoint, or from the beginning, to ``until``; what was there after loading, and at the end."""
    from pipeline.training import checkpoint

    folder = Path(directory)
    recipe, engine = build(seed, zero=zero)
    store = checkpoint.Checkpoints(folder, keep_last=keep)
    if load is not None:
        checkpoint.load(saved.read(folder / f"step_{load:09d}"), engine, recipe)
    loaded = snapshot(recipe, engine)
    for index in range(load or 0, until):
        advance(recipe, engine, index)
        if index + 1 in save:
            assert store.save(engine, recipe, _facts(index + 1)) == folder / f"step_{index + 1:09d}"
    end = snapshot(recipe, engine)
    engine.close()
    return {"loaded": loaded, "end": end}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Six steps of two ranks, saved after three and after six."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    return folder, pool(2).run(_train, directory=str(folder), until=6, save=(3, 6))


@pytest.fixture
def folder(written: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written[0], tmp_path / "checkpoints"))


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Everything a checkpoint promises, bit for bit, whatever the number of ranks."""
    for moment in (None, "exp_avg", "exp_avg_sq"):
        first, second = assembled(ours, moment), assembled(theirs, moment)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), moment or "masters"
    for rank in ours:
        for kind in ("weights", "teacher", "memory", "buffers"):
            assert rank[kind].keys() == theirs[0][kind].keys()
            assert all(torch.equal(rank[kind][name], theirs[0][kind][name]) for name in rank[kind]), kind
        assert set(rank["adam"]) == set(theirs[0]["adam"])


def of(ranks: list[dict[str, Any]], when: str) -> list[dict[str, Any]]:
    return [rank[when] for rank in ranks]


def test_going_on_from_a_checkpoint_is_as_if_nothing_had_happened(
    written: tuple[Path, list[dict[str, Any]]], folder: Path
) -> None:
    again = pool(2).run(_train, directory=str(folder), load=3, until=6, seed=1)
    assert_same(of(again, "end"), of(written[1], "end"))
    assert not torch.equal(assembled(of(again, "loaded"))["head.weight"], assembled(of(again, "end"))["head.weight"])


@pytest.mark.parametrize("source", [0, 1, 2, 3])
@pytest.mark.slow
def test_any_number_of_ranks_and_every_stage_read_what_any_other_wrote(source: int, tmp_path: Path) -> None:
    through = pool(2).run(_train, directory=str(tmp_path), until=6, save=(3,), zero=source)
    before = pool(2).run(_train, directory=str(tmp_path), load=3, until=3, zero=source, seed=1)
    for ranks, zero in ((1, 0), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 3)):
        went_on = pool(ranks).run(_train, directory=str(tmp_path), load=3, until=6, seed=2, zero=zero)
        assert_same(of(went_on, "loaded"), of(before, "end"))
        ours, theirs = of(went_on, "end"), of(through, "end")
        if (ranks, zero) == (2, source):
            assert_same(ours, theirs)
        masters, expected = assembled(ours), assembled(theirs)
        for name, weight in masters.items():
            torch.testing.assert_close(weight, expected[name], atol=5e-7, rtol=0)
        for name, weight in ours[0]["teacher"].items():
            torch.testing.assert_close(weight, theirs[0]["teacher"][name], atol=5e-8, rtol=1.2e-7)
        assert set(ours[0]["adam"]) == {6.0}


def test_the_manifest_tells_all(written: tuple[Path, list[dict[str, Any]]]) -> None:
    path = written[0] / "step_000000006"
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["world"]) == (1, 6, 2)
    names = {"rank_00000.safetensors", "rank_00001.safetensors", "whole.safetensors"}
    assert {file["name"] for file in manifest["files"]} == names
    assert {entry.name for entry in path.iterdir()} == names | {"manifest.json"}
    assert manifest["shapes"] == {name: list(p.shape) for name, p in Toy().named_parameters() if p.requires_grad}
    saved.verify(saved.read(path))


def test_the_teacher_can_be_read_without_an_engine(written: tuple[Path, list[dict[str, Any]]]) -> None:
    from pipeline.training.checkpoint import read_teacher

    teacher = dict(read_teacher(saved.read(written[0] / "step_000000006")))
    expected = written[1][0]["end"]["teacher"]
    assert teacher.keys() == expected.keys()
    assert all(torch.equal(teacher[name], expected[name]) for name in expected)
    Toy().teacher.load_state_dict(teacher)  # type: ignore[union-attr]


def test_so_many_are_kept_and_never_fewer_than_two(tmp_path: Path) -> None:
    for keep, left in ((1, [4, 5]), (3, [3, 4, 5])):
        pool(1).run(_train, directory=str(tmp_path / str(keep)), until=5, save=(1, 2, 3, 4, 5), keep=keep)
        assert [one.step for one in saved.listed(tmp_path / str(keep))] == left
        assert len(list((tmp_path / str(keep)).iterdir())) == len(left)


def _load_wider(directory: str) -> str:
    from pipeline.training import checkpoint
    from pipeline.training.engine import Engine

    recipe = Toy(hidden=18)
    engine = Engine(recipe, options(), torch.device("cpu"))
    try:
        checkpoint.load(saved.read(Path(directory)), engine, recipe)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "accepted"


def _load_with_other_memory(directory: str) -> str:
    from pipeline.training import checkpoint

    recipe, engine = build()
    recipe.memory["queue"] = torch.zeros(4)
    try:
        checkpoint.load(saved.read(Path(directory)), engine, recipe)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "accepted"


def test_a_checkpoint_of_another_architecture_is_refused_by_its_first_difference(
    written: tuple[Path, list[dict[str, Any]]],
) -> None:
    (told,) = pool(1).run(_load_wider, directory=str(written[0] / "step_000000006"))
    assert "5 tensors differ, the first is backbone.0.bias: [17] in the checkpoint, [18] in this run" in told
    (told,) = pool(1).run(_load_with_other_memory, directory=str(written[0] / "step_000000006"))
    assert "1 tensors differ, the first is memory/queue: nothing in the checkpoint, [4] in this run" in told


# ---- writing that fails ---------------------------------------------------------------------------------------------------


def _fail_then_save(directory: str, victim: int, file: str) -> dict[str, Any]:
    """The disk is full for one file of one rank, then it is not."""
    from pipeline.training import checkpoint

    recipe, engine = build(zero=2)
    store = checkpoint.Checkpoints(Path(directory))
    real = checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if dist.get_rank() == victim and path.name.startswith(file):
            real(dict(list(tensors.items())[:1]), path)  # some bytes did get there
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    checkpoint.save_file = full
    try:
        store.save(engine, recipe, _facts(9))
        told = "accepted"
    except CheckpointError as error:
        told = str(error)
    finally:
        checkpoint.save_file = real
    left = sorted(path.name for path in Path(directory).iterdir())
    dist.barrier()
    store.save(engine, recipe, _facts(9))
    engine.close()
    return {"told": told, "left": left}


@pytest.mark.parametrize(("victim", "file"), [(1, "rank_00001"), (0, "rank_00000"), (0, "whole")])
def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_all_and_spoils_nothing(folder: Path, victim: int, file: str) -> None:
    for rank in pool(2).run(_fail_then_save, directory=str(folder), victim=victim, file=file):
        assert "No space left on device" in rank["told"]
        assert f"rank {victim}" in rank["told"]
        assert {"step_000000003", "step_000000006"} <= set(rank["left"])
        assert "step_000000009" not in rank["left"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000003", "step_000000006", "step_000000009"]
    for one in saved.listed(folder):
        saved.verify(one)


def _save_into(directory: str) -> str:
    from pipeline.training import checkpoint

    recipe, engine = build(zero=2)
    try:
        checkpoint.Checkpoints(Path(directory)).save(engine, recipe, _facts(1))
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "accepted"


def test_a_directory_that_cannot_be_made_is_told_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for told in pool(2).run(_save_into, directory=str(tmp_path / "file" / "checkpoints")):
        assert "could not be written" in told
        assert "rank 0" in told


class _Killed(BaseException):
    """What a kill looks like from inside: nothing after it is done."""


def _kill_everywhere(directory: str) -> list[tuple[str, list[int], int]]:
    """Save over an existing step again and again, each time dying one file operation later."""
    from pipeline.training import checkpoint

    recipe, engine = build(zero=2)
    folder = Path(directory)
    store = checkpoint.Checkpoints(folder, keep_last=2)
    for step in (1, 2, 3):
        store.save(engine, recipe, _facts(step))
    left, seen, remove = 0, [], shutil.rmtree

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if real is remove:  # it dies half-way
                    next(Path(args[0]).iterdir()).unlink()
                raise _Killed
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (checkpoint, "save_file")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        for allowed in range(100):
            for step in (3, 4):  # a step that is there already, and one that is not
                left = allowed
                try:
                    store.save(engine, recipe, _facts(step))
                    outcome = "saved"
                except _Killed:
                    outcome = "killed"
                newest, _ = saved.newest(folder)
                whole = []
                for one in saved.listed(folder):
                    saved.verify(one)
                    whole.append(one.step)
                seen.append((outcome, whole, newest.step if newest else -1))
                left = 1000
                if 4 in whole and step == 4:
                    remove(folder / "step_000000004")
                    store.save(engine, recipe, _facts(2))
                    store.save(engine, recipe, _facts(3))
            if seen[-1][0] == seen[-2][0] == "saved":
                break
    engine.close()
    return seen


def test_killed_at_any_point_of_a_save_every_directory_that_is_there_is_whole(tmp_path: Path) -> None:
    (seen,) = pool(1).run(_kill_everywhere, directory=str(tmp_path))
    assert seen[0][0] == "killed"
    assert seen[-1][0] == "saved"
    assert len(seen) > 16
    for _, whole, newest in seen:
        assert whole
        assert newest == max(whole)
    again, fresh = seen[::2], seen[1::2]
    assert all(2 in whole for _, whole, _ in again), "the older checkpoint was touched"
    assert all(newest in (3, 4) for outcome, _, newest in fresh if outcome == "saved")


# ---- reading what was spoiled ---------------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    if how == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "rank_00001.safetensors", "whole.safetensors"])
@pytest.mark.parametrize(("how", "problem"), [("missing", "No such file"), ("truncated", "size"), ("flipped", "bytes")])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(folder: Path, file: str, how: str, problem: str) -> None:
    spoil(folder / "step_000000006" / file, how)
    with pytest.raises(CheckpointError, match=problem) as caught:
        saved.verify(saved.read(folder / "step_000000006"))
    assert file in caught.value.where
    found, complaints = saved.newest(folder)
    assert found is not None
    assert found.step == 3
    assert len(complaints) == 1
    assert file in complaints[0]


def test_a_checkpoint_without_a_readable_manifest_does_not_count(folder: Path) -> None:
    (folder / "step_000000006" / "manifest.json").write_text('{"format": 1, "st')
    assert [one.step for one in saved.listed(folder)] == [3]
    with pytest.raises(CheckpointError, match="cannot be read"):
        saved.read(folder / "step_000000006")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1, "shards": []}'])
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint.*Name|no whole checkpoint.*name a directory step_"):
        saved.read(tmp_path)


def test_no_checkpoint_is_no_fault_but_only_damaged_ones_are(folder: Path, tmp_path: Path) -> None:
    assert saved.newest(tmp_path / "nowhere") == (None, [])
    for step in (3, 6):
        spoil(folder / f"step_{step:09d}" / "whole.safetensors", "flipped")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        saved.newest(folder)


def test_another_format_is_told_by_its_number(folder: Path) -> None:
    path = folder / "step_000000006" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this fovea reads 1"):
        saved.verify(saved.read(path.parent))
    found, complaints = saved.newest(folder)
    assert found is not None
    assert found.step == 3
    assert "format 99" in complaints[0]
