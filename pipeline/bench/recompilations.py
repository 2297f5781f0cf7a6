"""Counts the graphs that Dynamo compiles in each step of a method, at small width but with the depth of its config.

Masks and captions vary from step to step as in a run. Graphs are counted by a backend that runs them uncompiled: how often there
is something to compile depends neither on Inductor nor on the device. Each method runs in a process of its own, with this
checkout and, if asked, with an earlier one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from pipeline.bench.plain import alone
from pipeline.bench.prove.batches import random_batch
from pipeline.bench.prove.methods import CONFIGS
from pipeline.config.load import load
from pipeline.data.augment import masks as block_masks
from pipeline.data.augment.views import Batch, Masks, ViewSpec
from pipeline.data.loader.text import last_positions, trimmed
from pipeline.errors import TrainingError
from pipeline.methods.base import Method, Step
from pipeline.methods.registry import build_seeded_method
from pipeline.training.build import prepare_towers

FIRST = 2  # steps whose compilations are expected
_WORLD, _SAMPLES = 8, 8
_SMALL = {"prototypes": 64, "head_hidden": 32, "head_bottleneck": 16, "queue_size": 64}
_VIEWS = {"global_size": 64, "local_size": 32}
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """What was compiled for one method.

    Attributes:
        graphs: graphs compiled in each step.
        calls: calls of compiled graphs in each step; each is one block.
        breaks: graph breaks.
    """

    graphs: list[int]
    calls: list[int]
    breaks: int

    @property
    def first(self) -> int:
        """Graphs compiled in the first steps."""
        return sum(self.graphs[:FIRST])

    @property
    def later(self) -> int:
        """Graphs compiled in all further steps."""
        return sum(self.graphs[FIRST:])


def measure(names: Sequence[str], steps: int, before: Path | None) -> Iterator[tuple[str, Row | None, Row]]:
    """Yield each method's name, its counts with the earlier checkout (if there is one), and with this one.

    Args:
        names: of :data:`pipeline.bench.prove.methods.CONFIGS`.
        steps: number of steps.
        before: root of the earlier checkout.
    """
    for name in names:
        yield name, None if before is None else _process(name, steps, before), _process(name, steps, _ROOT)


def _process(name: str, steps: int, checkout: Path) -> Row:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), name, str(steps)],
        env={**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise TrainingError(f"{name} ended with {done.returncode}: {last}", where=str(checkout), hint="Run it alone")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def count(name: str, steps: int) -> Row:
    """Count in this process; to be called once.

    Args:
        name: of the method.
        steps: number of steps.
    """
    from torch._dynamo.utils import counters

    graphs, calls = [0] * steps, [0] * steps
    now = 0

    def backend(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs[now] += 1

        def run(*arguments: Any) -> Any:
            calls[now] += 1
            return graph.forward(*arguments)

        return run

    original: Any = nn.Module.compile

    def compile_(module: nn.Module, *_: Any, dynamic: bool | None = None, **__: Any) -> None:
        original(module, backend=backend, dynamic=dynamic)

    with mock.patch.object(nn.Module, "compile", compile_):
        config = load(CONFIGS[name], overrides(name)).config
        method = build_seeded_method(config, torch.device("cpu")).train()
        prepare_towers(method, config)
    for now in range(steps):
        batch, step = batch_at(method, _SAMPLES, now), Step(index=now)
        torch.manual_seed(now)
        with torch.no_grad():
            method.before_accumulation([batch], step)
        torch.stack(list(method(batch, step).values())).sum().backward()
        method.after_step(step)
    return Row(graphs, calls, sum(counters["graph_break"].values()))


def overrides(name: str) -> list[str]:
    """Overrides that make a method's config narrow and keep its depth."""
    plain = ["data.shards=none-*.tar", "train.zero_stage=1", "train.micro_batch_size=null", "train.compile=true"]
    settings = load(CONFIGS[name], plain).config
    method, model = settings.method, settings.model
    narrow = ("timm_name=null", "embed_dim=32", "num_heads=2", "patch_size=8")
    if (model.timm_name or "").startswith("resnet"):
        changes = ["model.timm_name=resnet10t"]
    else:
        changes = [f"model.{word}" for word in (*narrow, f"depth={model.depth or 12}")]
    if hasattr(method, "teacher_model"):
        changes += [f"method.teacher_model.{word}" for word in (*narrow, "depth=12")]
    if getattr(method, "text", None) is not None:
        changes += ["method.text.width=32", "method.text.num_heads=2"]
    changes += [f"method.{key}={value}" for key, value in _SMALL.items() if hasattr(method, key)]
    changes += [f"method.views.{key}={value}" for key, value in _VIEWS.items() if hasattr(method.views, key)]
    return [*plain, *changes, f"train.global_batch_size={_SAMPLES * _WORLD}"]


def batch_at(method: Method, samples: int, number: int) -> Batch:
    """A rank's random batch of a step, with masks and captions whose number and length depend on the step."""
    batch = random_batch(method.views, samples, method.text, seed=number)
    masks = {view.name: _masks(view, samples, number) for view in method.views if view.mask is not None}
    tokens = batch.tokens
    if tokens is not None and method.text is not None:
        draw, (_, context), end = np.random.default_rng(number), tokens.shape, int(tokens.max())
        array = np.zeros((samples, context), dtype=np.int64)
        for row, length in enumerate(draw.integers(3, draw.integers(4, context + 1), samples)):
            array[row, :length] = [*draw.integers(1, min(end, 1000), length - 1), end]
        tokens = torch.from_numpy(np.ascontiguousarray(trimmed(array)) if method.text.trim else array)
    ends = None if tokens is None else last_positions(tokens.numpy())
    ids = torch.arange(number * samples, (number + 1) * samples)
    return replace(batch, masks=masks, tokens=tokens, text_ends=ends, ids=ids.tolist(), id_tensor=ids)


def _masks(view: ViewSpec, samples: int, number: int) -> Masks:
    assert view.mask is not None
    (rows, columns), total = view.grid(view.mask.patch), samples * _WORLD
    crops, patches = view.count * total, rows * columns
    counts = block_masks.mask_counts(crops, patches, view.mask, number).reshape(total, view.count)[:samples].T.reshape(-1)
    grid = block_masks.block_masks(counts, rows, columns, np.arange(len(counts), dtype=np.uint64), number)
    weight = np.repeat(1.0 / np.maximum(counts, 1), counts).astype(np.float32)
    masks = Masks(torch.from_numpy(grid), torch.from_numpy(np.flatnonzero(grid)), torch.from_numpy(weight))
    if not hasattr(masks, "capacity"):  # an earlier checkout
        return masks
    return replace(masks, capacity=block_masks.mask_capacity(len(grid), crops, patches, view.mask))


def document(rows: Sequence[tuple[str, Row | None, Row]]) -> dict[str, Any]:
    """All figures, for the JSON file."""
    return {
        "methods": {
            name: {"before": None if before is None else asdict(before), "after": asdict(after)} for name, before, after in rows
        }
    }


def markdown(rows: Sequence[tuple[str, Row | None, Row]], machine: dict[str, str], command: str) -> str:
    """Render the page; cells are before → after where they differ."""
    steps = len(rows[0][2].graphs)
    lines = ["# Graphs compiled in each step", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items()), ""]
    heads = ["method", "config", f"graphs in steps 1 to {FIRST}", f"in steps {FIRST + 1} to {steps}"]
    lines += [f"| {' | '.join([*heads, 'compiled blocks a step', 'breaks'])} |", "|---|---|---:|---:|---:|---:|"]
    for name, before, after in rows:
        pairs = [(row.first, row.later, row.calls[-1], row.breaks) for row in (before or after, after)]
        cells = [str(old) if old == new else f"{old} → {new}" for old, new in zip(*pairs, strict=True)]
        lines.append(f"| {name} | {CONFIGS[name]} | {' | '.join(cells)} |")
    lines += [
        "",
        "Rank 0 of 8, 8 samples a step, width 32, depth of the config, fp32 on a CPU, `train.compile=true`. A block counts once",
        "for each pass through it, also of a teacher. Methods with a ResNet have no blocks to compile. What a graph costs to",
        "compile, and what it saves, is not measured here: that needs a GPU.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with alone():
        print("\n" + json.dumps(asdict(count(sys.argv[1], int(sys.argv[2])))))
