"""Compares the signatures of a replay with those that the run recorded, and names the first difference. Does not import torch."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.training.signature_file import SCHEDULES, Header, Signature

STAGES = ("samples", "inputs", "schedules", "loss terms", "gradient norms", "applied")  # in the order of a step
FIRST_BOUND, LATER_BOUND = 1e-3, 0.1  # of a value, or of 1 if it is smaller: at the first replayed step, and at later ones
_MOST = 5  # differences of a stage that are named
_SUM = 1 << 64

Sample = Callable[[int, int, int], str]  # the name of a sample by step, rank and index among the rank's samples


@dataclass(frozen=True)
class Difference:
    """What differs first at a step.

    Attributes:
        step: the step.
        stage: one of :data:`STAGES`.
        rank: the first rank that differs, ``None`` for all ranks together.
        text: what differs, with both values.
    """

    step: int
    stage: str
    rank: int | None
    text: str


@dataclass(frozen=True)
class Result:
    """The comparison of some steps.

    Attributes:
        compared: steps that were compared.
        missing: steps without a signature of every rank on either side.
        differences: the first difference of each step that has one, by step.
        exact: whether all values had to be equal bit for bit; else from some step on within bounds.
        pixels: whether inputs were compared.
        values: whether loss terms and norms were compared: they depend on the micro-batch where a loss compares its samples.
        deviation: largest difference of a loss term or norm that had to be equal only within bounds, as a fraction of it.
    """

    compared: list[int]
    missing: list[int]
    differences: list[Difference]
    exact: bool
    pixels: bool
    values: bool = True
    deviation: float = 0.0

    @property
    def first(self) -> Difference | None:
        """The first difference."""
        return self.differences[0] if self.differences else None


Steps = Sequence[Mapping[int, Signature]]  # by rank, then by step


def compare(
    recorded: Steps, replayed: Steps, headers: tuple[Mapping[int, Header], Header], steps: Sequence[int], sample: Sample
) -> Result:
    """Compares steps of the same ranks bit for bit, and all from the first of other ranks or another device on within bounds.

    Args:
        recorded: the run's signatures, of as many ranks as its attempts had at most.
        replayed: the replay's.
        headers: the header of the attempt that recorded each step, and the replay's.
        steps: the steps to compare, ascending.
        sample: names a sample.
    """
    of_step, now = headers
    compared, missing, differences = [], [], []
    exact, pixels, values, deviation = True, True, True, 0.0
    for step in steps:
        then = of_step.get(step)
        ours = [rank[step] for rank in replayed if step in rank]
        theirs = [rank[step] for rank in recorded[: then.world if then else 0] if step in rank]
        if then is None or len(ours) != now.world or len(theirs) != then.world:
            missing.append(step)
            continue
        compared.append(step)
        same_device = then.device == now.device
        pixels = pixels and same_device
        exact = exact and _alike(then, now)  # a step whose weights may differ makes those after it differ
        if exact:
            difference = _exact(theirs, ours, sample)
        else:
            values = values and then.micro_batch == now.micro_batch
            deviation = max(deviation, _deviation(theirs, ours)) if values else deviation
            bound = (FIRST_BOUND if step == steps[0] else LATER_BOUND) if values else None
            difference = _bounded(theirs, ours, bound, pixels=same_device)
        if difference is not None:
            differences.append(difference)
    return Result(compared, missing, differences, exact, pixels, values, deviation)


def _alike(then: Header, now: Header) -> bool:
    """Whether the same step on both is the same bit for bit: sums over ranks, micro-batches and threads have the same order."""
    same = ("world", "device", "zero_stage", "micro_batch", *(("threads",) if now.device == "cpu" else ()))
    return all(getattr(then, name) == getattr(now, name) for name in same)


def _exact(recorded: Sequence[Signature], replayed: Sequence[Signature], sample: Sample) -> Difference | None:
    """The first difference of a step in the order of the stages, and then of the ranks."""
    for stage in STAGES:
        texts = [(rank, _texts(stage, *pair, rank, sample)) for rank, pair in enumerate(zip(recorded, replayed, strict=True))]
        differing = [(rank, text) for rank, text in texts if text]
        if differing:
            rank, text = differing[0]
            others = [number for number, _ in differing[1:]]
            also = f"; also on rank{'s' if len(others) > 1 else ''} {_listed(others)}" if others else ""
            return Difference(recorded[0].step, stage, rank, f"{text}{also}")
    return None


def _texts(stage: str, recorded: Signature, replayed: Signature, rank: int, sample: Sample) -> str:
    if stage == "samples" and recorded.samples != replayed.samples:
        return _samples(recorded, replayed, rank, sample) or "other samples"
    if stage == "inputs" and recorded.inputs != replayed.inputs:
        return _samples(recorded, replayed, rank, sample) or "other views, tokens or masks"
    if stage == "schedules" and _bits(recorded.schedules) != _bits(replayed.schedules):
        pairs = zip(SCHEDULES, recorded.schedules, replayed.schedules, strict=False)
        return _values({name: (then, now) for name, then, now in pairs if then != now}) or "other schedules"
    if stage in ("loss terms", "gradient norms"):
        start = "term/" if stage == "loss terms" else "norm/"
        names = [name for name in {**recorded.values, **replayed.values} if name.startswith(start)]
        pairs_of = {name: (recorded.values.get(name), replayed.values.get(name)) for name in names}
        return _values({name.removeprefix(start): pair for name, pair in pairs_of.items() if _bits(pair[:1]) != _bits(pair[1:])})
    if stage == "applied" and recorded.applied != replayed.applied:
        return f"the step was {'' if recorded.applied else 'not '}applied, and is {'' if replayed.applied else 'not '}now"
    return ""


def _samples(recorded: Signature, replayed: Signature, rank: int, sample: Sample) -> str:
    """Names the samples whose bytes differ; empty if the step has too many values to have some."""
    if len(recorded.sketches) != len(replayed.sketches):
        return ""
    pairs = zip(recorded.sketches, replayed.sketches, strict=True)
    return _listed([sample(recorded.step, rank, index) for index, (then, now) in enumerate(pairs) if then != now])


def _bounded(
    recorded: Sequence[Signature], replayed: Sequence[Signature], bound: float | None, *, pixels: bool
) -> Difference | None:
    """The first difference of a step over all ranks together; values may differ within a bound, without one by any amount."""
    step = recorded[0].step
    if sum(one.samples for one in recorded) % _SUM != sum(one.samples for one in replayed) % _SUM:
        return Difference(step, "samples", None, "other samples in the global batch")
    if pixels and sum(one.inputs for one in recorded) % _SUM != sum(one.inputs for one in replayed) % _SUM:
        return Difference(step, "inputs", None, "other views, tokens or masks in the global batch")
    if _bits(recorded[0].schedules) != _bits(replayed[0].schedules):
        return Difference(step, "schedules", None, _texts("schedules", recorded[0], replayed[0], 0, lambda *_: ""))
    if bound is None:
        return None
    for stage, start in (("loss terms", "term/"), ("gradient norms", "norm/")):
        then, now = means(recorded, start), means(replayed, start)
        pairs = {name: (then.get(name), now.get(name)) for name in {**then, **now}}
        if text := _values({name: pair for name, pair in pairs.items() if not _close(*pair, bound)}):
            return Difference(step, stage, None, text)
    return None


def _deviation(recorded: Sequence[Signature], replayed: Sequence[Signature]) -> float:
    """The largest relative difference of a value that both have; values below 1 count as 1."""
    then, now = means(recorded, ""), means(replayed, "")
    pairs = [(then[name], now[name]) for name in then.keys() & now.keys()]
    return max((abs(a - b) / max(1.0, abs(a)) for a, b in pairs if math.isfinite(a - b)), default=0.0)


def means(signatures: Sequence[Signature], start: str) -> dict[str, float]:
    """Means over the ranks that have them, of the values whose names begin with ``start``, by the rest of the name."""
    values: dict[str, list[float]] = {}
    for one in signatures:
        for name, value in one.values.items():
            if name.startswith(start):
                values.setdefault(name.removeprefix(start), []).append(value)
    return {name: math.fsum(each) / len(each) if all(map(math.isfinite, each)) else math.nan for name, each in values.items()}


def loss(signatures: Sequence[Signature]) -> float:
    """The loss of a step: the sum of the loss terms, means over the ranks."""
    return sum(means(signatures, "term/").values())


def _close(then: float | None, now: float | None, bound: float) -> bool:
    if then is None or now is None:
        return then is now
    if not math.isfinite(then) or not math.isfinite(now):
        return math.isfinite(then) == math.isfinite(now)
    return abs(then - now) <= bound * max(1.0, abs(then))


def _bits(values: Sequence[float | None]) -> bytes | None:
    return None if None in values else struct.pack(f"<{len(values)}d", *values)


def _values(pairs: Mapping[str, tuple[float | None, float | None]]) -> str:
    texts = [f"{name} was {_number(then)} and is {_number(now)}" for name, (then, now) in pairs.items()]
    return "; ".join(texts)


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.9g}"


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - _MOST} more" if len(items) > _MOST else ""
    return ", ".join(map(str, items[:_MOST])) + more
