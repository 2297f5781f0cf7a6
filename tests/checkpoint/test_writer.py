"""Checkpoints of real ranks: what comes back is what was written, to the bit, on any number of ranks; or nothing was written."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.checkpoint import files as saved
from pipeline.checkpoint import selection
from pipeline.errors import CheckpointError
from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import Toy, advance, assembled, build, options, snapshot

FACTS = {"data": {}, "config": {}, "scores": {"score": 0.5}}


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
    offload: str = "none",
) -> dict[str, Any]:
    """Steps from a checkpoint, or from the beginning, to ``until``; what was there after loading, and at the end."""
    from pipeline.checkpoint import reader
    from pipeline.checkpoint import writer as checkpoint

    folder = Path(directory)
    method, engine = build(seed, zero=zero, offload=offload)
    store = checkpoint.Checkpoints(folder, keep_last=keep)
    if load is not None:
        reader.load(saved.read(folder / f"step_{load:09d}"), engine, method)
    loaded = snapshot(method, engine)
    for index in range(load or 0, until):
        advance(method, engine, index)
        if index + 1 in save:
            assert store.save(engine, method, _facts(index + 1)) == folder / f"step_{index + 1:09d}"
    end = snapshot(method, engine)
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
    from pipeline.checkpoint.reader import read_teacher

    teacher = dict(read_teacher(saved.read(written[0] / "step_000000006")))
    expected = written[1][0]["end"]["teacher"]
    assert teacher.keys() == expected.keys()
    assert all(torch.equal(teacher[name], expected[name]) for name in expected)
    Toy().teacher.load_state_dict(teacher)  # type: ignore[union-attr]


def test_so_many_are_kept_and_never_fewer_than_two(tmp_path: Path) -> None:
    for keep, left in ((1, [4, 5]), (3, [3, 4, 5])):
        pool(1).run(_train, directory=str(tmp_path / str(keep)), until=5, save=(1, 2, 3, 4, 5), keep=keep)
        assert [one.step for one in saved.committed_checkpoints(tmp_path / str(keep))] == left
        assert len(list((tmp_path / str(keep)).glob("*step_*"))) == len(left)


def _load_wider(directory: str) -> str:
    from pipeline.checkpoint import reader
    from pipeline.training.engine import Engine

    method = Toy(hidden=18)
    engine = Engine(method, options(), torch.device("cpu"))
    try:
        reader.load(saved.read(Path(directory)), engine, method)
    except CheckpointError as error:
        return str(error)
    finally:
        engine.close()
    return "accepted"


def _load_with_other_memory(directory: str) -> str:
    from pipeline.checkpoint import reader

    method, engine = build()
    method.extra_state["queue"] = torch.zeros(4)
    try:
        reader.load(saved.read(Path(directory)), engine, method)
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
    from pipeline.checkpoint import writer as checkpoint

    method, engine = build(zero=2)
    store = checkpoint.Checkpoints(Path(directory))
    real = checkpoint.write_tensors

    def full(path: Path, tensors: Any) -> Any:
        if dist.get_rank() == victim and path.name.startswith(file):
            real(path, dict(list(tensors.items())[:1]))  # some bytes did get there
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, tensors)

    checkpoint.write_tensors = full
    try:
        store.save(engine, method, _facts(9))
        told = "accepted"
    except CheckpointError as error:
        told = str(error)
    finally:
        checkpoint.write_tensors = real
    left = sorted(path.name for path in Path(directory).glob("*step_*"))
    dist.barrier()
    store.save(engine, method, _facts(9))
    engine.close()
    return {"told": told, "left": left}


@pytest.mark.parametrize(("victim", "file"), [(1, "rank_00001"), (0, "rank_00000"), (0, "whole")])
def test_a_disk_that_is_full_on_one_rank_fails_the_save_on_all_and_spoils_nothing(folder: Path, victim: int, file: str) -> None:
    for rank in pool(2).run(_fail_then_save, directory=str(folder), victim=victim, file=file):
        assert "No space left on device" in rank["told"]
        assert f"rank {victim}" in rank["told"]
        assert {"step_000000003", "step_000000006"} <= set(rank["left"])
        assert "step_000000009" not in rank["left"]
    assert sorted(path.name for path in folder.glob("*step_*")) == ["step_000000003", "step_000000006", "step_000000009"]
    for one in saved.committed_checkpoints(folder):
        saved.verify(one)


def _save_into(directory: str) -> str:
    from pipeline.checkpoint import writer as checkpoint

    method, engine = build(zero=2)
    try:
        checkpoint.Checkpoints(Path(directory)).save(engine, method, _facts(1))
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


# ---- beside the training --------------------------------------------------------------------------------------------------


def _beside(directory: str, *, slow: bool = True, zero: int = 2) -> list[Any]:
    """Nine steps saved at three, six and nine beside the training, and nothing is written before two more steps are done."""
    from pipeline.checkpoint import writer as checkpoint

    method, engine = build(zero=zero)
    store = checkpoint.Checkpoints(Path(directory), keep_last=9)
    real, told = checkpoint.write_tensors, []
    gates = {step: threading.Event() for step in (3, 6, 9)}

    def late(path: Path, tensors: Any) -> Any:
        step = next(step for step in gates if f"step_{step:09d}" in str(path))
        assert gates[step].wait(timeout=600)
        return real(path, tensors)

    checkpoint.write_tensors = late
    try:
        for index in range(9):
            advance(method, engine, index)
            states = torch.tensor(int(store.state))
            dist.all_reduce(states, op=dist.ReduceOp.MAX)
            told.append(store.poll(int(states)))
            if (index + 1) % 3 == 0:
                told.append(store.begin(engine, method, _facts(index + 1)))
            elif index > 2 and (index + 1) % 3 == 2:
                gates[index - 1].set()
        gates[9].set()
        told.append(store.finish())
    finally:
        checkpoint.write_tensors = real
    engine.close()
    return [one.step for one in told if one is not None and one.error is None]


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_what_is_written_beside_the_training_is_the_moment_it_was_asked_for(zero: int, tmp_path: Path) -> None:
    told = pool(2).run(_beside, directory=str(tmp_path / "beside"), zero=zero)
    pool(2).run(_train, directory=str(tmp_path / "waiting"), until=9, save=(3, 6, 9), zero=zero)
    assert told == [[3, 6, 9], [3, 6, 9]]
    for step in (3, 6, 9):
        ours, theirs = (tmp_path / how / f"step_{step:09d}" for how in ("beside", "waiting"))
        assert [path.name for path in sorted(ours.iterdir())] == [path.name for path in sorted(theirs.iterdir())]
        for path in ours.iterdir():
            assert path.read_bytes() == (theirs / path.name).read_bytes(), path


def _often_full(directory: str, full: tuple[int, ...]) -> dict[str, Any]:
    """Saves beside the training, of which some find the disk of rank 1 full."""
    from pipeline.checkpoint import writer as checkpoint

    method, engine = build(zero=2)
    store = checkpoint.Checkpoints(Path(directory), max_failures=3)
    real, told = checkpoint.write_tensors, []

    def sometimes(path: Path, tensors: Any) -> Any:
        if dist.get_rank() == 1 and any(f"step_{step:09d}" in str(path) for step in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, tensors)

    checkpoint.write_tensors = sometimes
    stopped = ""
    try:
        for step in range(1, 7):
            advance(method, engine, step)
            store.begin(engine, method, _facts(step))
            outcome = store.finish()
            told.append((outcome.step, str(outcome.error or ""), outcome.consecutive_failures))
    except CheckpointError as error:
        stopped = str(error)
    finally:
        checkpoint.write_tensors = real
    engine.close()
    return {"told": told, "stopped": stopped}


def test_a_save_that_fails_beside_the_training_is_told_on_all_ranks_and_several_in_a_row_stop_it(tmp_path: Path) -> None:
    for rank in pool(2).run(_often_full, directory=str(tmp_path / "few"), full=(2, 3, 5)):
        assert [bool(problem) for _, problem, _ in rank["told"]] == [False, True, True, False, True, False]
        assert [times for _, _, times in rank["told"]] == [0, 1, 2, 0, 1, 0]
        assert "rank 1" in rank["told"][1][1]
        assert "No space left" in rank["told"][1][1]
        assert not rank["stopped"]
    assert [one.step for one in saved.committed_checkpoints(tmp_path / "few")] == [1, 4, 6]
    assert len(list((tmp_path / "few").glob("*step_*"))) == 3, "what failed was not swept away"
    for rank in pool(2).run(_often_full, directory=str(tmp_path / "many"), full=(2, 3, 4, 5, 6)):
        assert "No space left" in rank["stopped"]
        assert len(rank["told"]) == 3
    found, _ = selection.newest(tmp_path / "many")
    assert found is not None
    assert found.step == 1


def test_the_files_are_what_the_safetensors_package_writes_and_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from pipeline.checkpoint.tensor_writer import write_tensors

    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5),
        "a/half": torch.randn(7).bfloat16(),
        "count": torch.tensor(3),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6).t(),
    }
    told = write_tensors(tmp_path / "ours.safetensors", tensors)
    assert told == saved.entry(tmp_path / "ours.safetensors")
    back = load_file(tmp_path / "ours.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    assert (tmp_path / "ours.safetensors").stat().st_size == (tmp_path / "theirs.safetensors").stat().st_size


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


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda header: b"\xff" * 8 + header[8:], "more than the file"),
        (lambda header: header[:8] + b"?" + header[9:], "header cannot be read"),
        (lambda header: header.replace(b"data_offsets", b"data-offsets"), "tensors' offsets"),
        (lambda header: header.replace(b"teacher/", b"reacher/"), "elements of teacher/.* are missing in the checkpoint"),
    ],
)
def test_a_rank_file_that_is_not_what_the_manifest_tells_is_refused(folder: Path, write: Any, problem: str) -> None:
    from pipeline.checkpoint.reader import read_teacher

    path = folder / "step_000000006" / "rank_00001.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(write(raw[:end]) + raw[end:])
    with pytest.raises(CheckpointError, match=problem):
        list(read_teacher(saved.read(path.parent)))


@pytest.mark.parametrize("file", ["rank_00000.safetensors", "rank_00001.safetensors", "whole.safetensors"])
@pytest.mark.parametrize(("how", "problem"), [("missing", "No such file"), ("truncated", "size"), ("flipped", "bytes")])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(folder: Path, file: str, how: str, problem: str) -> None:
    spoil(folder / "step_000000006" / file, how)
    with pytest.raises(CheckpointError, match=problem) as caught:
        saved.verify(saved.read(folder / "step_000000006"))
    assert file in caught.value.where
    found, complaints = selection.newest(folder)
    assert found is not None
    assert found.step == 3
    assert len(complaints) == 1
    assert file in complaints[0]


def test_a_checkpoint_without_a_readable_manifest_does_not_count(folder: Path) -> None:
    (folder / "step_000000006" / "manifest.json").write_text('{"format": 1, "st')
    assert [one.step for one in saved.committed_checkpoints(folder)] == [3]
    with pytest.raises(CheckpointError, match="cannot be read"):
        saved.read(folder / "step_000000006")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 1, "shards": []}'])
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not a (complete )?checkpoint: .*Name a directory checkpoints/step_"):
        saved.read(tmp_path)


def test_no_checkpoint_is_no_fault_but_only_damaged_ones_are(folder: Path, tmp_path: Path) -> None:
    assert selection.newest(tmp_path / "nowhere") == (None, [])
    for step in (3, 6):
        spoil(folder / f"step_{step:09d}" / "whole.safetensors", "flipped")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is complete"):
        selection.newest(folder)


def test_another_format_is_told_by_its_number(folder: Path) -> None:
    path = folder / "step_000000006" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version of fovea reads 1"):
        saved.verify(saved.read(path.parent))
    found, complaints = selection.newest(folder)
    assert found is not None
    assert found.step == 3
    assert "format 99" in complaints[0]


def test_a_checkpoint_with_the_checksums_of_earlier_versions_is_verified_by_them(folder: Path) -> None:
    path = folder / "step_000000006"
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = [saved.entry(path / file["name"], "blake2b") for file in manifest["files"]]
    (path / "manifest.json").write_text(json.dumps(manifest))
    saved.verify(saved.read(path))
    spoil(path / "rank_00000.safetensors", "flipped")
    with pytest.raises(CheckpointError, match="bytes have changed"):
        saved.verify(saved.read(path))


def _synced(directory: str) -> list[list[Any]]:
    """On a rank: what a save makes durable, in order: size and name of what is synced, and the directory's renaming."""
    import os
    from unittest import mock

    sync, rename, events = os.fsync, Path.rename, []

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(["sync", path.name, path.stat().st_size if path.is_file() else -1])
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        events.append(["rename", path.name, Path(target).name])
        return rename(path, target)

    with mock.patch.object(os, "fsync", fsync), mock.patch.object(Path, "rename", renamed):
        _train(directory, until=1, save=(1,))
    return events


def test_everything_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    ranks = pool(2).run(_synced, directory=str(tmp_path / "checkpoints"))
    final = "step_000000001"
    renaming = ["rename", f".tmp-{final}", final]
    before, after = (ranks[0][: ranks[0].index(renaming)], ranks[0][ranks[0].index(renaming) + 1 :])
    folder = tmp_path / "checkpoints" / final
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name in ("rank_00000.safetensors", "whole.safetensors", "manifest.json"):
        assert ["sync", name, sizes[name]] in before, f"{name} was not synced, or before all of it was written"
    assert before[-2:] == [["sync", "manifest.json", sizes["manifest.json"]], ["sync", f".tmp-{final}", -1]]
    assert after[0] == ["sync", "checkpoints", -1]
    assert ["sync", "rank_00001.safetensors", sizes["rank_00001.safetensors"]] in ranks[1]
    assert not any(kind == "rename" or name == "manifest.json" for kind, name, _ in ranks[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_an_earlier_save_left_half_written_is_removed(ranks: int, tmp_path: Path) -> None:
    left = tmp_path / "checkpoints" / ".tmp-step_000000009"
    left.mkdir(parents=True)
    (left / "rank_00000.safetensors").write_bytes(b"half")
    pool(ranks).run(_train, directory=str(tmp_path / "checkpoints"), until=1, save=(1,))
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("*step_*"))] == ["step_000000001"]
