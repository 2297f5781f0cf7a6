"""Benchmarks a resume against a fresh start: engine, load and first step, against engine and first step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from pipeline.bench.plain import Plain, Size, advance, alone, batch_of, engine_of
from pipeline.checkpoint import files as saved
from pipeline.checkpoint import reader
from pipeline.checkpoint import writer as checkpoint
from pipeline.methods.base import Step

AIM = 1.2  # relative to a fresh start
BYTES = 16  # per trained parameter in a checkpoint: master, AdamW's two moments, teacher


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        size: of the method.
        rounds: measured rounds, fresh and resumed in turns.
    """

    size: Size = field(default_factory=lambda: Size(width=512, depth=16, samples=256))
    rounds: int = 5


@dataclass(frozen=True)
class Result:
    """Results.

    Attributes:
        parameters: of the student.
        stored: bytes of the checkpoint.
        fresh, resumed: CPU seconds of each round from an unused method to the end of its first step, one thread; the file is in
            the page cache.
    """

    parameters: int
    stored: int
    fresh: list[float]
    resumed: list[float]

    @property
    def ratio(self) -> float:
        """The fastest resumed start over the fastest fresh one."""
        return min(self.resumed) / min(self.fresh)


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Save once, then start in turns afresh and from the checkpoint."""
    size, batch = options.size, batch_of(options.size)
    at = Step(lr=1e-4, last_layer_lr=1e-4, momentum=0.99)
    with alone() as folder:
        log("saving")
        method = Plain(size)
        engine = engine_of(method, size)
        advance(engine, method, batch, at)
        store = checkpoint.Checkpoints(folder / "checkpoints", keep_last=1)
        facts = {"step": 1, "applied": 1, "skipped": 0, "scores": {}, "config": {}, "data": {}}
        path = store.save(engine, method, facts)
        store.close()
        engine.close()
        manifest_and_tensors = saved.read(path)

        def start(again: Path | None) -> float:
            second = Plain(size)
            begin = time.process_time()
            started = engine_of(second, size)
            if again is not None:
                checkpoint = saved.read(again)
                saved.verify(checkpoint)
                reader.load(checkpoint, started, second)
            advance(started, second, batch, at)
            spent = time.process_time() - begin
            started.close()
            return spent

        log("starting")
        acts = {"fresh": partial(start, None), "resumed": partial(start, path)}
        seconds: dict[str, list[float]] = {name: [] for name in acts}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # others would use CPU time while they wait
        try:
            for act in acts.values():
                act()
            for _ in range(options.rounds):
                for name, act in acts.items():
                    seconds[name].append(act())
        finally:
            torch.set_num_threads(threads)
    stored = sum(file["size"] for file in manifest_and_tensors.manifest["files"])
    return Result(sum(p.numel() for p in method.parameters()), stored, **seconds)


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    comparison = "within" if result.ratio <= AIM else "above"
    lines = ["# Time to resume from a checkpoint", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items())]
    lines += [
        f"- {result.parameters:,} parameters, {options.size.samples} rows a step; checkpoint {result.stored:,} bytes, "
        f"{result.stored / result.parameters:.2f} a parameter ({BYTES} by formula)",
        "",
        "| from an untouched method to the end of its first step | CPU s, fastest | CPU s, slowest |",
        "|---|---:|---:|",
        f"| fresh | {min(result.fresh):.3f} | {max(result.fresh):.3f} |",
        f"| from a checkpoint, verified | {min(result.resumed):.3f} | {max(result.resumed):.3f} |",
        "",
        f"{result.ratio:.2f} times a fresh start, {comparison} the {AIM} targeted.",
    ]
    return "\n".join(lines) + "\n"
