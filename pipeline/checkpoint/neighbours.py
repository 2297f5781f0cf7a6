"""Copies of snapshots on several nodes: each rank's file also lies in the memory of the next node.

When a node is lost, every file is still somewhere, and the nodes that go on, a spare one among them, are given what they lack.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.files import Saved, rank_file, read, verify
from pipeline.checkpoint.manifest import MANIFEST
from pipeline.errors import CheckpointError
from pipeline.runtime.process_group import World

_PIECE = 64 << 20  # bytes sent at a time


@dataclass(frozen=True)
class NodePlace:
    """This rank among ranks on several nodes.

    Attributes:
        leads: whether it is the first rank of its node, which keeps the node's folder.
        target: rank of the same position on the next node, to which this rank's file is copied.
        source: rank of the same position on the node before, whose file this node keeps too.
        copies: gloo group of all ranks for these copies, which one thread in the background uses.
        leaders: gloo group of the first ranks of all nodes; ``None`` on other ranks.
        control: group of all ranks for small collectives of the main thread.
        per_node: ranks of each node.
    """

    leads: bool
    target: int
    source: int
    copies: dist.ProcessGroup
    leaders: dist.ProcessGroup | None
    control: dist.ProcessGroup | None
    per_node: int

    def trim(self, directory: Path) -> None:
        """Deletes from this node's snapshots the files of other nodes than this one and the one before; by its first rank, when
        all ranks have loaded.
        """
        world, first = dist.get_world_size(), dist.get_rank()
        own = {rank_file((first + offset) % world) for offset in range(-self.per_node, self.per_node)}
        for path in directory.glob("step_*/rank_*"):
            if path.name not in own:
                with contextlib.suppress(OSError):
                    path.unlink()


def nodes_of(world: World, timeout: float = 600.0) -> NodePlace | None:
    """This rank's position; ``None`` on a single node, and on nodes with different numbers of ranks, or whose ranks are not
    numbered node by node. Collective.

    Args:
        world: the ranks.
        timeout: of a copy's collectives, seconds.
    """
    if world.local_size == world.size:
        return None
    positions: list[Any] = [None] * world.size
    dist.all_gather_object(positions, (world.local_rank, world.local_size), group=world.control)
    if any(position != (rank % world.local_size, world.local_size) for rank, position in enumerate(positions)):
        return None
    first = list(range(0, world.size, world.local_size))
    copies, leaders = _group(range(world.size), timeout), _group(first, timeout)
    return NodePlace(
        world.rank in first,
        (world.rank + world.local_size) % world.size,
        (world.rank - world.local_size) % world.size,
        copies,
        leaders if world.rank in first else None,
        world.control,
        world.local_size,
    )


def _group(ranks: Sequence[int], timeout: float) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout), backend="gloo")
    return cast(dist.ProcessGroup, group)  # torch gives ranks outside of it a number instead


def exchange(nodes: NodePlace, own: Path | None, copy: Path) -> None:
    """Sends a file to the next node and receives that of the node before. In the background; all ranks take part.

    Args:
        nodes: this rank's position.
        own: the file, or ``None`` if it could not be written: the other side then learns it.
        copy: path of the file that is received; not written if there is none.

    Raises:
        OSError: a file cannot be read or written, or the other rank is gone.
    """
    failed: OSError | None = None
    with contextlib.ExitStack() as stack:
        try:
            sent = stack.enter_context(own.open("rb", buffering=0)) if own is not None else None
        except OSError as error:
            sent, failed = None, error
        left = os.fstat(sent.fileno()).st_size if sent is not None else -1
        expected = torch.empty(1, dtype=torch.int64)
        _pass(nodes, torch.tensor([left]), expected)
        coming = int(expected)
        received = None
        if coming >= 0:
            try:
                received = stack.enter_context(copy.open("wb", buffering=0))
            except OSError as error:  # goes on, so that the other rank does not wait
                failed = error
        while left > 0 or coming > 0:
            out, into = _buffer(left), _buffer(coming)
            if out is not None and sent is not None:
                left -= len(out)
                try:
                    _filled(sent, out)
                except OSError as error:  # goes on, so that the other rank does not wait
                    failed = error
            _pass(nodes, out, into)
            if into is not None:
                coming -= len(into)
                if received is not None and failed is None:
                    try:
                        _written(received, into)
                    except OSError as error:
                        failed = error
    if failed is not None:
        copy.unlink(missing_ok=True)
        raise failed


def _pass(nodes: NodePlace, out: Tensor | None, into: Tensor | None) -> None:
    try:
        works = []
        if into is not None:
            works.append(dist.irecv(into, nodes.source, group=nodes.copies))
        if out is not None:
            works.append(dist.isend(out, nodes.target, group=nodes.copies))
        for work in works:
            if work is not None:
                work.wait()
    except RuntimeError as error:
        raise OSError(f"the copy on the next node failed: {error}") from error


def _buffer(left: int) -> Tensor | None:
    return torch.empty(min(left, _PIECE), dtype=torch.uint8) if left > 0 else None


def _filled(file: Any, buffer: Tensor) -> None:
    view = memoryview(buffer.numpy().data)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError("the file has become shorter")
        view = view[count:]


def _written(file: Any, buffer: Tensor) -> None:
    view = memoryview(buffer.numpy().data)
    while view:
        view = view[file.write(view) :]


def newest_anywhere(directory: Path, nodes: NodePlace) -> Saved | None:
    """The newest snapshot whose files are all somewhere, completed on every node; collective over all ranks.

    Snapshots of one step that different attempts have written are different ones, and none is made of parts of both. If there is
    none, what is left of others is deleted.

    Args:
        directory: this node's folder.
        nodes: this rank's position.

    Raises:
        RuntimeError: a rank is gone.

    Returns:
        The snapshot in this node's folder, the same step on all nodes; ``None`` if there is none.
    """
    listed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(listed, _listing(directory) if nodes.leads else {}, group=nodes.control)
    snapshots = {(of.step, of.id): (name, rank, of) for rank, one in enumerate(listed) for name, of in one.items()}
    for (_, id), (name, first, of) in sorted(snapshots.items(), key=lambda one: one[0], reverse=True):
        manifest = {MANIFEST: of.present[MANIFEST]}  # of the same files on all nodes, though not of the same size
        kept = {rank: one[name].present | manifest for rank, one in enumerate(listed) if name in one and one[name].id == id}
        holders = {MANIFEST: (manifest[MANIFEST], first)}
        for file, size in of.files.items():
            holders[file] = size, next((rank for rank, present in kept.items() if present.get(file) == size), -1)
        if min(holder for _, holder in holders.values()) < 0:
            continue
        leaders = range(0, dist.get_world_size(), nodes.per_node)
        wanting = {n: one for n, one in holders.items() if any(kept.get(rank, {}).get(n) != one[0] for rank in leaders)}
        present = kept.get(dist.get_rank(), {})
        complete = torch.ones(1, dtype=torch.int32)
        if nodes.leads:
            try:
                _complete(directory / name, wanting, present, nodes)
                verify(saved := read(directory / name))
                complete.fill_(saved.id == id)
            except (OSError, CheckpointError):
                _undo(directory / name, wanting, present)
                complete.zero_()
        dist.all_reduce(complete, op=dist.ReduceOp.MIN, group=nodes.control)
        if int(complete):
            return read(directory / name)
        if nodes.leads:  # what was fetched may be wrong, as from a holder that could not read it
            _undo(directory / name, wanting, present)
    if nodes.leads:
        for path in directory.glob("step_*"):
            shutil.rmtree(path, ignore_errors=True)
    return None


@dataclass(frozen=True)
class _Listed:
    """A snapshot in a folder: its steps and ID, and the size by name of all its files, and of those that are there."""

    step: int
    id: str
    files: dict[str, int]
    present: dict[str, int]


def _listing(directory: Path) -> dict[str, _Listed]:
    """The snapshots of a folder, by name."""
    snapshots = {}
    for path in directory.glob("step_*"):
        with contextlib.suppress(OSError, CheckpointError):
            saved = read(path)
            files = {file["name"]: int(file["size"]) for file in saved.manifest["files"]}
            present = {file.name: file.stat().st_size for file in path.iterdir()}
            snapshots[path.name] = _Listed(saved.step, saved.id, files, present)
    return snapshots


def _complete(path: Path, holders: dict[str, tuple[int, int]], present: dict[str, int], nodes: NodePlace) -> None:
    """Fetches what this node lacks of a snapshot. Collective over the first ranks of the nodes, also after an error of the disk.

    Args:
        path: its directory.
        holders: size of each file that a node lacks, and the rank whose node has it.
        present: size of each file of this snapshot that this node has; empty if the directory holds another one.
        nodes: this rank's position.

    Raises:
        OSError: a file cannot be read or written, or a node is gone.
    """
    failed: OSError | None = None
    try:
        if not present and path.exists():
            shutil.rmtree(path)
        path.mkdir(exist_ok=True)
    except OSError as error:
        failed = error
    for name, (size, holder) in holders.items():
        try:
            _fetch(path / name, size, holder, nodes, lacking=present.get(name) != size and failed is None)
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def _undo(path: Path, holders: dict[str, tuple[int, int]], present: dict[str, int]) -> None:
    """Deletes what :func:`_complete` has fetched, and leaves what this node had."""
    if not present:
        shutil.rmtree(path, ignore_errors=True)
        return
    for name, (size, _) in holders.items():
        if present.get(name) != size:
            for fetched in (path / name, path / f".{name}"):
                with contextlib.suppress(OSError):
                    fetched.unlink()


def _fetch(path: Path, size: int, holder: int, nodes: NodePlace, *, lacking: bool) -> None:
    """Sends a file from its holder to the nodes that lack it; it has its name only when it is there to the end.

    Raises:
        OSError: it cannot be read or written, once all have sent and received; or a node is gone.
    """
    failed: OSError | None = None
    temporary = path.with_name(f".{path.name}")
    with contextlib.ExitStack() as stack:
        source = target = None
        try:
            if holder == dist.get_rank():
                source = stack.enter_context(path.open("rb", buffering=0))
            elif lacking:
                target = stack.enter_context(temporary.open("wb", buffering=0))
        except OSError as error:
            failed = error
        while (buffer := _buffer(size)) is not None:
            size -= len(buffer)
            try:
                if source is not None and failed is None:
                    _filled(source, buffer)
            except OSError as error:
                failed = error
            try:
                dist.broadcast(buffer, holder, group=nodes.leaders)
            except RuntimeError as error:
                raise OSError(f"a node is gone: {error}") from error
            try:
                if target is not None and failed is None:
                    _written(target, buffer)
            except OSError as error:
                failed = error
    if failed is not None:
        raise failed
    if lacking and holder != dist.get_rank():
        temporary.replace(path)
