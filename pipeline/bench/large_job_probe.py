"""One start of a simulated job of many ranks on this host, in a process of its own: ``python large_job_probe.py JSON``.

Ranks are forks without a model around the real data side, control group, checkpoints and resume: they read encoded samples and
run the collectives of a step. Each rank writes to a file what each phase cost it; bytes and messages are those of its own TCP
connections, as the kernel counts them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.bench.large_job import LOCAL, Start
from pipeline.checkpoint import files, reader
from pipeline.checkpoint.data_check import check_data
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.selection import newest
from pipeline.checkpoint.writer import Checkpoints
from pipeline.config.load import load
from pipeline.data.inputs import Inputs, prepare
from pipeline.data.loader.bad_samples import BadSamples, Event
from pipeline.data.loader.reader import Reader
from pipeline.runtime import process_group
from pipeline.runtime.process_group import World
from pipeline.runtime.run_directory import RunDirectory
from pipeline.runtime.stop_requests import StopRequests
from pipeline.runtime.system_metrics import Nodes
from pipeline.training.data_state import data_state

_TCP_INFO = 11
_SENT, _RECEIVED, _MESSAGES = 120, 128, 152  # offsets in struct tcp_info: bytes acked and received, data segments in and out
_WIDTH = 64
_BLOCK = (("norm", 1), ("attn.qkv", 3 * _WIDTH), ("attn.proj", _WIDTH), ("mlp.fc1", 4 * _WIDTH), ("mlp.fc2", 4 * _WIDTH))
_TIMEOUT = 1200.0


def network() -> dict[str, int]:
    """Bytes and segments with data that this process's open TCP connections have sent and received, and their number."""
    total = dict.fromkeys(("sent", "received", "messages_in", "messages_out", "connections"), 0)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            copy = os.dup(int(name))
            try:
                one = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
                continue
            with contextlib.closing(one):
                info = one.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
            total["sent"] += struct.unpack_from("Q", info, _SENT)[0]
            total["received"] += struct.unpack_from("Q", info, _RECEIVED)[0]
            incoming, outgoing = struct.unpack_from("II", info, _MESSAGES)
            total["messages_in"] += incoming
            total["messages_out"] += outgoing
            total["connections"] += 1
    return total


class Phases:
    """What each phase costs this rank: CPU seconds, bytes and messages, and files of the run that it opened."""

    def __init__(self, run: Path) -> None:
        self.costs: dict[str, dict[str, float]] = {}
        self._opened, self._run = 0, str(run)
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        self._opened += event == "open" and str(arguments[0]).startswith(self._run)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a phase."""
        before, cpu, begun, opened = network(), time.process_time(), time.monotonic(), self._opened
        yield
        after = network()
        self.costs[name] = {
            **{key: max(after[key] - before[key], 0) for key in after},
            "cpu": time.process_time() - cpu,
            "wall": time.monotonic() - begun,
            "opened": self._opened - opened,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def value_of(number: int, start: int, length: int) -> Tensor:
    """Weights of a made-up parameter, each determined by its position."""
    index = torch.arange(start, start + length, dtype=torch.int64)
    return ((index * 2654435761 + number * 40503) % 1048573).to(torch.float32)


class Weights:
    """Parameters of a small transformer, as ZeRO shards them: each rank owns a part of one flat vector."""

    def __init__(self, world: World, *, filled: bool) -> None:
        layers = {f"backbone.blocks.{block}.{name}": (rows, _WIDTH) for block in range(12) for name, rows in _BLOCK}
        self.shapes = {f"{name}.weight": shape for name, shape in layers.items()}
        sizes = [rows * width for rows, width in self.shapes.values()]
        low, high = (sum(sizes) * (world.rank + more) // world.size for more in (0, 1))
        self.own: list[Fragment] = []
        begin = 0
        for number, (name, shape) in enumerate(self.shapes.items()):
            first, last = max(low, begin), min(high, begin + sizes[number])
            if first < last:
                value = value_of(number, first - begin, last - first)
                value = value if filled else torch.zeros_like(value)
                moments = {moment: value.clone() for moment in ("exp_avg", "exp_avg_sq")}
                self.own.append(Fragment(name, first - begin, shape, value, moments, None))
            begin += sizes[number]

    def fragments(self) -> Iterator[Fragment]:
        """As in :class:`pipeline.checkpoint.fragments.ShardedWeights`, like the following."""
        return iter(self.own)

    held = fragments

    def teacher_pieces(self, *, owned: bool) -> Iterator[tuple[str, int, Tensor]]:
        """None."""
        return iter(())

    def gathered(self, *, teacher: bool = False, write: bool = False) -> contextlib.AbstractContextManager[None]:
        """Nothing is sharded otherwise."""
        return contextlib.nullcontext()

    def set_optimizer_steps(self, steps: int) -> None:
        """There is no optimizer."""

    def refresh(self) -> None:
        """There are no other copies."""

    def wrong(self) -> int:
        """Elements, of weights and moments, that are not what was saved."""
        names = list(self.shapes)
        pairs = [
            (value_of(names.index(f.name), f.start, f.master.numel()), tensor)
            for f in self.own
            for tensor in (f.master, *f.moments.values())
        ]
        return sum(int((expected != tensor).sum()) for expected, tensor in pairs)


def _rank(start: Start, config: Any, rank: int) -> dict[str, Any]:
    """The life of a rank; returns its costs, samples and findings."""
    run = RunDirectory(Path(start.folder) / "run")
    phases = Phases(run.path)
    ids: list[list[int]] = []
    result: dict[str, Any] = {"ids": ids, "wrong": 0}
    with phases.phase("rendezvous"):
        world = process_group.join(
            rank=rank,
            size=start.world,
            local_rank=rank % LOCAL,
            address="127.0.0.1",
            port=start.port,
            key=f"{start.world}",
            backend="gloo",
            timeout=_TIMEOUT,
            local_size=min(LOCAL, start.world),
        )
    with phases.phase("index and order"):
        inputs: Inputs = importlib.import_module("launch.rank_data").agreed_inputs(config, world, None)
    weights: Any = Weights(world, filled=start.resume == 0)
    method: Any = nn.Linear(2, 2)
    method.extra_state, method.constant_names, method.teacher = {}, frozenset(), None
    bad_samples, step = BadSamples(None, budget=1.0), 0
    if start.resume:
        with phases.phase("resume"):
            step = _resumed(run, world, inputs, weights, method, bad_samples)
            result["wrong"] = weights.wrong()
    source, requests, nodes = Reader(inputs.train), StopRequests(), Nodes(world, run.path)
    with phases.phase("steps"):
        for number in range(step, step + start.steps):
            batch = inputs.order.rank_batch(number, world.size, world.rank)
            records = source.fetch(batch.ids)
            # One sample of each rank counts as bad, so that checkpoints have something to gather.
            bad = [Event(number, records[0].id, records[0].key, "", "corrupt", -1)] if number == step else []
            bad_samples.saw(len(records), bad)
            ids.append([record.id for record in records])
            requests.agreed(world.control)
    with phases.phase("metrics of a logged step"):
        own = torch.zeros(2, dtype=torch.float64)
        dist.all_gather([torch.zeros_like(own) for _ in range(world.size)], own, group=world.control)
        nodes.read()
    store = Checkpoints(run.checkpoints, group=world.control)
    with phases.phase("checkpoint"):
        fields = {"step": step + start.steps, "applied": step + start.steps, "skipped": 0, "scores": {}, "seconds": 0.0}
        state = data_state(inputs, bad_samples, world)
        store.save(weights, method, {**fields, "config": {}, "data": state})
    result["quarantine"], result["seen"] = len(state["quarantine"]), state["seen"]
    store.release()
    process_group.leave()
    return {**result, "costs": phases.costs}


def _resumed(run: RunDirectory, world: World, inputs: Inputs, weights: Any, method: Any, bad_samples: BadSamples) -> int:
    """Resumes as ranks do: the first one verifies the newest checkpoint, the others read what they need of it."""
    chosen = [str(newest(run.checkpoints)[0].path)] if world.rank == 0 else [""]  # type: ignore[union-attr]
    dist.broadcast_object_list(chosen, group=world.control)
    saved = files.read(Path(chosen[0]))
    check_data(saved, inputs)
    reader.load(saved, weights, method)
    data, first = saved.manifest["data"], world.rank == 0
    seen = data["seen"] if first else 0
    bad_samples.load({"seen": seen, "reasons": {}, "counts": {}, "quarantine": data["quarantine"]})
    return saved.step


def _forked(start: Start, config: Any, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        result = _rank(start, config, rank)
        (Path(start.folder) / f"rank-{rank}.json").write_text(json.dumps(result))
    except BaseException as error:  # a fork must not return into the parent's code
        traceback.print_exc()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            (Path(start.folder) / f"rank-{rank}.error").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Fork the ranks; print costs of each phase, and whether batches and weights are right, as JSON."""
    start = Start(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    shards, run = f"{start.folder}/data/*train-*.tar", f"{start.folder}/run"
    own = ["evaluation.knn.enabled=false", f"run.directory={run}", f"data.index={start.folder}/index", f"data.shards={shards}"]
    config = load("dinov2/cifar10_vit_tiny", [*own, f"train.global_batch_size={start.batch}"]).config
    importlib.import_module("launch.rank_data")
    inputs = prepare(config, start.world)  # as the launcher does; ranks map what is there
    gc.collect()
    gc.freeze()  # the ranks share the pages of what is there
    children = {_forked(start, config, rank): rank for rank in range(start.world)}
    failed: int | None = None
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status and failed is None:
            failed = rank
            for other in children:  # they would wait for it until their timeout
                os.kill(other, signal.SIGKILL)
    if failed is not None:
        file = Path(start.folder) / f"rank-{failed}.error"
        sys.exit(f"rank {failed} of {start.world}: {' '.join(file.read_text().split()) if file.exists() else 'killed'}")
    results = [json.loads((Path(start.folder) / f"rank-{rank}.json").read_text()) for rank in range(start.world)]
    right = all(
        np.array_equal(
            np.concatenate([np.array(result["ids"][n], dtype=np.uint64) for result in results]),
            inputs.order.batch(start.resume + n).ids,
        )
        for n in range(start.steps)
    )
    print(json.dumps({"phases": _summary(results), "right": right, **_findings(results), "streams": inputs.order.streams}))


def _findings(results: list[dict[str, Any]]) -> dict[str, int]:
    states = {(result["quarantine"], result["seen"]) for result in results}
    quarantine, seen = states.pop() if len(states) == 1 else (-1, -1)  # all ranks have the same
    return {"wrong": sum(result["wrong"] for result in results), "quarantine": quarantine, "seen": seen}


def _summary(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Costs by phase: of the first rank, the largest of the others, and of all."""
    phases = {}
    for name in results[0]["costs"]:
        rows = [result["costs"][name] for result in results]
        phases[name] = {
            "first": rows[0],
            "others": {key: max(row[key] for row in rows[1:]) for key in rows[0]},
            "all": {key: sum(row[key] for row in rows) for key in rows[0]},
        }
    return phases


if __name__ == "__main__":
    main()
