"""A save that is killed at any of its file operations leaves only whole checkpoints, and the next save goes through."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.rank_pool import pool
from tests.helpers.toy_method import advance, build

NEVER = 1_000


class Killed(BaseException):
    """What a kill looks like from inside: nothing after it is done."""


class Operations:
    """Counts file operations, and lets the process die at one of them, half-way where it has a half.

    Attributes:
        done: what was done so far, in words without the temporary folder.
        left: operations still allowed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.done, self.left = folder, list[str](), NEVER

    def start(self, allowed: int) -> None:
        self.done, self.left = [], allowed

    @contextmanager
    def watched(self, checkpoint: Any) -> Iterator[None]:
        owners = [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "replace"), (json, "dump"), (shutil, "rmtree")]
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in [*owners, (checkpoint, "write_tensors")]:
                patch.setattr(owner, name, self._counted(name, getattr(owner, name)))
            yield

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.left > -1:
                self.done.append(f"{name} {self._what(name, args)}")
            self.left -= 1
            if self.left >= 0:
                return real(*args, **kwargs)
            if self.left == -1:
                self._half(name, args)
            raise Killed

        return call

    def _half(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "rmtree":
            for inner in list(Path(args[0]).iterdir())[:1]:
                inner.unlink()
        elif name == "write_tensors":
            args[0].write_bytes(b"some bytes did get there")
        elif name == "dump":
            args[1].write('{"some')

    def _what(self, name: str, args: tuple[Any, ...]) -> str:
        if name == "fsync":
            return self._named(os.readlink(f"/proc/self/fd/{args[0]}"))
        if name == "dump":
            return self._named(args[1].name)
        if name == "rmtree":
            return "rubbish"  # in the order of the directory, which is no matter
        return " to ".join(self._named(str(arg)) for arg in args if isinstance(arg, Path))

    def _named(self, path: str) -> str:
        inner = os.path.relpath(path, self.folder)
        return "rubbish" if inner.startswith(".tmp-old") else inner


def _attempt(store: Any, method: Any, engine: Any, step: int, beside: bool) -> None:
    """One save; if it is beside the training, the training goes on meanwhile."""
    if not beside:
        store.save(engine, method, _facts(step))
        return
    store.begin(engine, method, _facts(step))
    advance(method, engine, step)
    outcome = None
    while outcome is None:
        outcome = store.poll(store.state)
    assert outcome.error is None


def _facts(step: int) -> dict[str, Any]:
    return {"data": {}, "config": {}, "scores": {"score": 0.5}, "step": step, "applied": step, "skipped": 0}


def _kill_everywhere(directory: str, step: int, leftovers: bool, beside: bool) -> dict[str, Any]:
    """Save the same step over the same folder again and again, each time dying one operation later."""
    from pipeline.checkpoint import files as saved
    from pipeline.checkpoint import reader, retention, selection
    from pipeline.checkpoint import writer as checkpoint

    method, engine = build(zero=2)
    folder, before = Path(directory) / "run", Path(directory) / "before"

    def store() -> Any:
        return checkpoint.Checkpoints(folder, keep_last=2, keep_best="score")

    for first in (1, 2, 3):
        store().save(engine, method, _facts(first))
    if leftovers:
        for name in (f".tmp-step_{step:09d}", ".tmp-step_000000002", ".tmp-old-0badf00d-step_000000001"):
            (folder / name).mkdir()
            (folder / name / "whole.safetensors").write_bytes(b"torn")
    folder.rename(before)
    operations, deaths = Operations(folder), []
    with operations.watched(checkpoint):
        while True:
            operations.start(NEVER)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(before, folder)
            operations.start(len(deaths))
            try:
                _attempt(store(), method, engine, step, beside)
            except Killed:
                deaths.append(operations.done[-1])
            else:
                break
            operations.start(NEVER)
            there = sorted(path.name for path in folder.glob("step_*"))
            whole = saved.committed_checkpoints(folder)
            for one in whole:
                saved.verify(one)
            assert there == sorted(one.path.name for one in whole), f"killed at {deaths[-1]}: {there} are not all whole"
            newest, _ = selection.newest(folder)
            assert newest is not None and newest.serial == max(one.serial for one in whole)
            best = retention.read_best(folder).get("checkpoint")
            assert best in there, f"killed at {deaths[-1]}: best.json names {best}, which is not there"
            assert {"step_000000001", "step_000000002"} & set(there), "the older ones were touched"
            reader.load(newest, engine, method)
            store().save(engine, method, _facts(9))
            assert (folder / "step_000000009").is_dir() and not list(folder.glob(".tmp-*"))
    engine.close()
    return {"deaths": deaths, "undisturbed": operations.done}


@pytest.mark.parametrize("leftovers", [False, True], ids=["into a clean folder", "over an earlier attempt's rubbish"])
@pytest.mark.parametrize("step", [3, 4], ids=["a step that is there", "a new step"])
@pytest.mark.parametrize("beside", [False, True], ids=["waiting", "beside the training"])
def test_killed_at_any_operation_of_a_save_every_directory_that_is_there_is_whole(
    tmp_path: Path, beside: bool, step: int, leftovers: bool
) -> None:
    (seen,) = pool(1).run(_kill_everywhere, directory=str(tmp_path), step=step, leftovers=leftovers, beside=beside)
    assert seen["deaths"] == seen["undisturbed"], "an operation was left out"
    assert len(seen["deaths"]) >= 12


def test_everything_is_on_the_disk_before_a_checkpoint_becomes_current(tmp_path: Path) -> None:
    (seen,) = pool(1).run(_kill_everywhere, directory=str(tmp_path), step=4, leftovers=False, beside=False)
    temporary, done = ".tmp-step_000000004", seen["undisturbed"]
    current = done.index(f"rename {temporary} to step_000000004")
    for name in ("rank_00000.safetensors", "whole.safetensors", "manifest.json"):
        assert done.index(f"fsync {temporary}/{name}") < current
    assert done.index(f"fsync {temporary}") < current < done.index("fsync .")
