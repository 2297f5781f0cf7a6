"""Memory per rank by formula: parameters, gradients, optimizer state, teacher and buffers in each ZeRO stage.

Parameters are fp32 and only compute is bf16. Bytes per trained parameter with R ranks and an optimizer of m moments (two of AdamW
and LAMB, one of LARS and SGD)::

    stage   parameters  gradients  masters  moments   teacher
    0       4           4          -        4 m       4
    1, 2    4           4/R        4/R      4 m/R     4
    3       4/R         4/R        4/R      4 m/R     4/R

Stages 1 and 2 differ while gradients of several micro-batches are accumulated: stage 1 then holds them whole. Both partition
gradients by whole parameters: one that crosses the boundary of two ranks' shards is held by both. Additional memory:
DeepSpeed's buckets, in stage 3 the gathered parameters, with bf16 the cast weights of a forward pass, and activations.
``tests/estimate/test_memory.py`` compares the persistent part with an engine's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from pipeline.estimate.communication import STAGE_0_BUCKET, communication

FP32 = 4  # bytes of an element


@dataclass(frozen=True)
class Held:
    """Bytes on one rank.

    Attributes:
        parameters, gradients, masters, moments, frozen, teacher: persistent memory, with gradients at their peak.
        buckets: communication buckets.
        gathered: stage 3's gathered parameters of student and teacher during compute, at most.
        rounded: bf16 copies of weights while the student computes.
        input: batches that DALI prefetches.
        host: host memory of an offloaded optimizer; not part of the total.
    """

    parameters: float
    gradients: float
    masters: float
    moments: float
    frozen: float
    teacher: float
    buckets: float = 0.0
    gathered: float = 0.0
    rounded: float = 0.0
    input: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all memory on the device."""
        return float(sum(getattr(self, field.name) for field in fields(self) if field.name != "host"))

    def offloaded(self, *, stage: int, accumulation: int = 1) -> Held:
        """The same with AdamW in host memory: masters, moments, a flat gradient, and DeepSpeed's staging buffers of weights
        (stages 1 and 2) or of gradients (stage 3); with several micro-batches also accumulated gradients. Gradients still pass
        through the device and count there as before, so this is an upper bound.
        """
        each = self.masters
        flat = each + (self.gradients if accumulation > 1 and stage < 3 else 0.0)
        return replace(self, masters=0.0, moments=0.0, host=self.masters + self.moments + each + flat)


def held(
    groups: Sequence[Sequence[int]],
    *,
    frozen: Sequence[int] = (),
    teacher: Sequence[int] = (),
    stage: int,
    ranks: int,
    accumulation: int = 1,
    bf16: bool = True,
    overlap: bool = True,
    moments: int = 2,
) -> Held:
    """Bytes on the rank that holds most.

    Args:
        groups: elements of each trained parameter, by parameter group; on GPUs the engine makes one of them all.
        frozen: elements of each parameter that is not trained.
        teacher: elements of each teacher parameter.
        stage: ZeRO stage, 0 to 3.
        ranks: world size.
        accumulation: micro-batches per step.
        bf16: compute in bf16.
        overlap: on GPUs, whether gradients are reduced while others are computed.
        moments: of the optimizer, for each parameter.
    """
    trained = [size for group in groups for size in group]
    total = sum(trained)
    chosen = communication(total, largest=max(trained, default=0), ranks=ranks, cuda=overlap)
    rounded = 2.0 * total if bf16 else 0.0
    if stage == 0:
        return Held(
            parameters=FP32 * total,
            gradients=FP32 * total,
            masters=0,
            moments=FP32 * moments * total,
            frozen=FP32 * sum(frozen),
            teacher=FP32 * sum(teacher),
            buckets=FP32 * min(total, STAGE_0_BUCKET) if ranks > 1 else 0,
            rounded=rounded,
        )
    if stage == 3:
        pieces = sum(math.ceil(size / ranks) for size in trained)
        return Held(
            parameters=FP32 * pieces,
            gradients=FP32 * pieces,
            masters=FP32 * pieces,
            moments=FP32 * moments * pieces,
            frozen=FP32 * sum(math.ceil(size / ranks) for size in frozen),
            teacher=FP32 * sum(math.ceil(size / ranks) for size in teacher),
            buckets=FP32 * chosen.held,
            gathered=FP32 * (min(total, chosen.live) + min(sum(teacher), chosen.live)),
            rounded=rounded,
        )
    if overlap:
        groups = [trained]
    padded = [2 * ranks * math.ceil(sum(group) / (2 * ranks)) for group in groups]
    share = sum(padded) // ranks
    gradients = FP32 * max(
        sum(_touched(group, size // ranks, rank) for group, size in zip(groups, padded, strict=True)) for rank in range(ranks)
    )
    if stage == 1 and accumulation > 1:
        gradients += FP32 * total
    return Held(
        parameters=FP32 * sum(padded),
        gradients=gradients,
        masters=FP32 * share,
        moments=FP32 * moments * share,
        frozen=FP32 * sum(frozen),
        teacher=FP32 * sum(teacher),
        buckets=FP32 * chosen.held,
        rounded=rounded,
    )


def _touched(group: Sequence[int], share: int, rank: int) -> int:
    """Elements of all parameters that the rank's shard of the group intersects."""
    low, high = rank * share, (rank + 1) * share
    begin = elements = 0
    for size in group:
        if begin < high and begin + size > low:
            elements += size
        begin += size
    return elements
