"""Benchmarks a whole training step against other implementations: same weights, same batch; the losses are compared first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.bench import official, pairs, step_clip, step_dinov2
from pipeline.bench.plain import alone
from pipeline.errors import ConfigError
from pipeline.models.fp8 import use_fp8
from pipeline.training.compilation import allow_graphs

OURS, COMPILED, GRAPHS, FP8 = "fovea", "fovea, compiled", "fovea, compiled, CUDA graphs", ", fp8"
METHODS = {"clip": list(step_clip.TOWERS), "dinov2": step_dinov2.MODELS}
_APART = {True: 1e-2, False: 1e-4}  # tolerance of the losses, in bf16 and in fp32


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        method: one of :data:`METHODS`.
        model: one of the method's models.
        batch: samples per step.
        caption: tokens per caption (CLIP).
        prototypes: of the head (DINOv2).
        drop: rate of stochastic depth (DINOv2).
        compiled: whether to also measure ours with compiled blocks.
        graphs: whether those are replayed as CUDA graphs.
        fp8: whether our blocks compute their products in 8-bit floats after the losses were compared; then only ours is measured.
        rounds: measured rounds.
        device: ``cpu`` or ``cuda``.
        bf16: compute under autocast.
    """

    method: str = "clip"
    model: str = "B-32"
    batch: int = 8
    caption: int = 20
    prototypes: int = 65536
    drop: float = 0.3
    compiled: bool = False
    graphs: bool = False
    fp8: bool = False
    rounds: int = 3
    device: str = "cpu"
    bf16: bool = False


@dataclass(frozen=True)
class Result:
    """Results.

    Attributes:
        cases: by name: ours, ours compiled, the baseline.
        losses: for the same weights and batch, by name; only ours without a baseline.
        operations: dispatched per step, by name; compiled ones are not counted.
        baseline: name of the baseline; empty if it is not installed.
        about: model, batch and content of a step.
    """

    cases: dict[str, pairs.Case]
    losses: dict[str, float]
    operations: dict[str, int]
    baseline: str
    about: str


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Compare the losses for the same weights first, then times, memory and operations.

    Raises:
        ConfigError: no such model, or the losses differ: a faster step with wrong results does not count.
    """
    if options.model not in METHODS.get(options.method, ()):
        known = "; ".join(f"{method}: {', '.join(models)}" for method, models in METHODS.items())
        raise ConfigError(f"{options.method} has no size {options.model!r}", where="--model", hint=f"Choose one of {known}")
    with alone(options.device):
        log("building both")
        return compare(_contest(options), options, log=log)


def compare(contest: pairs.Contest, options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """As :func:`measure`, of steps that are built and a process group that is there.

    Args:
        contest: the steps; method, model and sizes of ``options`` are not used.
        options: how to measure.
        log: called with a description of each stage.

    Raises:
        ConfigError: the losses differ.
    """
    losses = {}
    if contest.losses is not None and contest.theirs is not None:
        losses = dict(zip((OURS, contest.theirs[0]), contest.losses(), strict=True))
        ours, theirs = losses.values()
        if abs(ours - theirs) > _APART[options.bf16] * abs(theirs):
            raise ConfigError(
                f"the losses of the same weights differ: {losses}",
                where="fovea bench step",
                hint="Report it with the versions of both packages",
            )
    else:
        log(f"no baseline: {', '.join(official.missing())} not installed ({official.INSTALL})")
        losses = {OURS: contest.ours()}
    steps: dict[str, Callable[[], float]] = {OURS: contest.ours}
    if contest.theirs is not None:
        steps[contest.theirs[0]] = contest.theirs[1]
    operations = {name: pairs.operations(act) for name, act in steps.items()}
    if options.compiled or options.graphs:
        steps = _with_compiled(steps, contest, graphs=options.graphs)
    if options.fp8:
        use_fp8(nn.ModuleList(contest.blocks))
        steps = {name + FP8: act for name, act in steps.items() if name.startswith(OURS)}
    log("measuring")
    cases = pairs.measure(steps, rounds=options.rounds, device=torch.device(options.device))
    return Result(cases, losses, operations, contest.theirs[0] if contest.theirs else "", contest.about)


def _contest(options: Options) -> pairs.Contest:
    device, bf16 = torch.device(options.device), options.bf16
    if options.method == "clip":
        return step_clip.contest(options.model, options.batch, options.caption, bf16=bf16, device=device)
    return step_dinov2.contest(options.model, options.batch, options.prototypes, options.drop, bf16=bf16, device=device)


def _with_compiled(
    steps: dict[str, Callable[[], float]], contest: pairs.Contest, *, graphs: bool
) -> dict[str, Callable[[], float]]:
    torch._dynamo.reset()  # graphs of an earlier model in this process count towards the limit
    allow_graphs()
    block: Any
    for block in contest.blocks:
        block.compile(dynamic=False, mode="reduce-overhead" if graphs else None)

    def eager() -> float:
        with torch.compiler.set_stance("force_eager"):
            return contest.ours()

    def compiled() -> float:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return contest.ours()

    return {OURS: eager, GRAPHS if graphs else COMPILED: compiled, **{name: act for name, act in steps.items() if name != OURS}}


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    losses = ", ".join(f"{name} {loss:.6f}" for name, loss in result.losses.items())
    counted = ", ".join(f"{name} {count}" for name, count in result.operations.items())
    lines = [f"# A training step of {options.method}", "", f"`{command}`", "", *(f"- {k}: {v}" for k, v in machine.items())]
    lines += [
        f"- {result.about}, {'bf16' if options.bf16 else 'fp32'}",
        f"- losses of the same weights and batch: {losses}",
        f"- operations dispatched in a step: {counted}",
        "",
        *pairs.table(result.cases, result.baseline or OURS),
    ]
    if not result.baseline:
        lines += ["", f"No baseline: {', '.join(official.missing())} not installed. `{official.INSTALL}`"]
    return "\n".join(lines) + "\n"
