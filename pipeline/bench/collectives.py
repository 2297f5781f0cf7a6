"""Counts the collectives and bytes of a step for each ZeRO stage, as dispatched by torch, and compares them with theory.

The bytes do not depend on the device, so that gloo ranks on a CPU show what NCCL transfers between as many GPUs. With N trained
fp32 parameters (4 N bytes, rounded up to whole shares) and a teacher of the same size, for each optimizer step of A
micro-batches::

    stage   gradients                      parameters
    0       all-reduce 4 N                 -
    1       all-reduce 4 N                 all-gather 4 N
    2       all-reduce 4 N A               all-gather 4 N
    3       reduce-scatter 4 N A           all-gather 4 (N or 2 N, + N of the teacher) A

Stage 1 reduces once per step, stage 2 with each micro-batch. Stage 3 gathers the student for the forward and for the backward
pass, for both at once where it may keep all of it (:mod:`pipeline.estimate.communication`), and the teacher for its own forward
pass. With ring algorithms an all-reduce makes each rank send ``2 (R-1)/R`` of its bytes, the other collectives ``(R-1)/R``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pipeline.bench.plain import Plain, Size, batch_of
from pipeline.bench.ranks import on_ranks
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.training.engine import Engine, EngineOptions

STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
_KINDS = {
    "c10d::allreduce_": "all-reduce",
    "c10d::reduce_": "reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::allgather_": "all-gather",
    "c10d::_allgather_base_": "all-gather",
    "c10d::allgather_into_tensor_coalesced_": "all-gather",
    "c10d::reduce_scatter_": "reduce-scatter",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce-scatter",
}
_SMALL = 1024  # bytes: norms, flags and counts


class Collectives(TorchDispatchMode):
    """Counts the collectives of this thread, and of the backward passes that it starts, while active.

    Attributes:
        calls: by kind; those below a kibibyte, which only synchronize numbers, are of kind ``small``.
        payload: bytes by kind: of the whole tensor that is reduced, gathered or scattered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and args:
            size = max(_bytes(argument) for argument in args[:2])  # outputs and inputs, of which one is whole
            kind = _KINDS.get(func._schema.name, func._schema.name.removeprefix("c10d::"))
            kind = "small" if size < _SMALL else kind
            self.calls[kind] += 1
            self.payload[kind] += size
        return func(*args, **(kwargs or {}))


def _bytes(argument: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_flatten(argument)[0] if isinstance(t, torch.Tensor))


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        width, depth: of the student.
        ranks: gloo ranks on this host.
        accumulation: micro-batches per step.
    """

    width: int = 256
    depth: int = 4
    ranks: int = 2
    accumulation: int = 1


@dataclass(frozen=True)
class Counted:
    """A step of one stage on rank 0.

    Attributes:
        stage: ZeRO stage.
        calls, payload: see :class:`Collectives`.
        expected: payload by theory, without small collectives.
    """

    stage: int
    calls: dict[str, int]
    payload: dict[str, int]
    expected: dict[str, int]


def expected(parameters: int, teacher: int, *, stage: int, accumulation: int = 1, kept: bool = True) -> dict[str, int]:
    """Expected bytes by kind, without padding; see the module.

    Args:
        parameters: number of trained parameters.
        teacher: parameters of the teacher.
        stage: ZeRO stage.
        accumulation: micro-batches per step.
        kept: whether stage 3 keeps the student whole between its forward and its backward pass.
    """
    n = 4 * parameters
    if stage == 3:
        gathered = (n * (1 if kept else 2) + 4 * teacher) * accumulation
        return {"reduce-scatter": n * accumulation, "all-gather": gathered}
    reduced = {"all-reduce": n * (accumulation if stage == 2 else 1)}
    return reduced | ({"all-gather": n} if stage else {})


def count(stage: Literal[0, 1, 2, 3], *, width: int = 64, depth: int = 4, accumulation: int = 1) -> dict[str, dict[str, int]]:
    """On a rank: calls and bytes of the third step, after all one-time work."""
    size = Size(width=width, depth=depth)
    method = Plain(size)
    options = EngineOptions(stage, "fp32", size.samples, accumulation, (0.9, 0.95), 1e-8, None, "network")
    engine = Engine(method, options, torch.device("cpu"))
    at = Step(lr=1e-3, last_layer_lr=1e-3, momentum=0.9)

    def step() -> None:
        for number in range(accumulation):
            terms = engine.forward_backward(batch_of(size, dist.get_rank() + 2 * number), at)
        engine.step(at, torch.stack(list(terms.values())).isfinite().all())
        method.after_step(at)

    step()
    step()
    with Collectives() as seen:
        step()
    engine.close()
    return {"calls": dict(seen.calls), "payload": dict(seen.payload)}


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> list[Counted]:
    """Count a step of each stage on newly started ranks.

    Raises:
        ConfigError: a single rank, which has no collectives, or ranks that failed.
    """
    if options.ranks < 2:
        raise ConfigError("must be at least 2", where="--ranks", hint="Choose 2 or more: a single rank has no collectives")
    log(f"starting {options.ranks} ranks")
    seen = on_ranks(_stages, options.ranks, command="fovea bench collectives", options=options)
    elements = options.depth * (options.width**2 + options.width)
    return [
        Counted(stage, **counts, expected=expected(elements, elements, stage=stage, accumulation=options.accumulation))
        for stage, counts in zip(STAGES, seen, strict=True)
    ]


def _stages(options: Options) -> list[dict[str, dict[str, int]]]:
    """On a rank: calls and bytes of each stage."""
    return [count(stage, width=options.width, depth=options.depth, accumulation=options.accumulation) for stage in STAGES]


def on_the_wire(kind: str, payload: int, ranks: int) -> float:
    """Bytes that each rank sends for a collective with a ring algorithm."""
    return payload * (ranks - 1) / ranks * (2 if kind == "all-reduce" else 1)


def markdown(results: list[Counted], options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    parameters = options.depth * (options.width**2 + options.width)
    lines = ["# Collectives of a step", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        f"- {parameters:,} fp32 parameters and a teacher of as many, {options.ranks} ranks, {options.accumulation} micro-batches",
        "",
        "| stage | collective | calls | bytes | by theory | sent by each rank, ring |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for one in results:
        for kind in sorted(one.calls):
            theory = f"{one.expected[kind]:,}" if kind in one.expected else "-"
            sent = on_the_wire(kind, one.payload[kind], options.ranks)
            lines.append(f"| {one.stage} | {kind} | {one.calls[kind]} | {one.payload[kind]:,} | {theory} | {sent:,.0f} |")
    return "\n".join(lines) + "\n"
