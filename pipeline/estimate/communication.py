"""How DeepSpeed is to communicate, chosen from sizes alone: the one place where its buckets are decided.

No setting here changes a result. What is weighed, in elements of 4 bytes:

- *Bucket of gradients.* Gradients are sent while others are still computed, but only when a bucket is full: with one as large as
  the model nothing overlaps, and two of them hold the gradients twice more. So a quarter of the model, within bounds. Below, 2
  million elements for each rank, 25 million at most: a ring of R ranks takes ``2 (R-1)`` hops, which a message has to outlast.
  Above, 100 million: longer messages are no faster, and two of them are 800 MB. A parameter that exceeds a bucket takes another
  way through DeepSpeed, so a bucket holds the largest, which in DINOv2 is a matrix of prototypes.
- *Bucket of parameters* (stages 1 and 2, after the step): nothing overlaps with it, so all at once up to 200 million.
- *Stage 3* reads half a bucket ahead, and keeps as much gathered between forward and backward pass as DeepSpeed's own default
  says: up to 1 000 million parameters the student is gathered once a micro-batch and not twice.
- *Overlap* on GPUs where there is somebody to speak to; a CPU has no second stream.
- Left off: ZeRO++'s rounded weights and gradients, which change results, and its copy inside each node, which the teacher's
  pieces do not follow. The hierarchy of links inside and between nodes is NCCL's own to use.

The figures of links and messages are estimates for GPU clusters, not measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGE_0_BUCKET = 500_000_000  # DeepSpeed's own, not for us to set
_LEAST, _PER_RANK, _LOW, _HIGH = 1 << 20, 2_000_000, 25_000_000, 100_000_000
_GATHER, _LIVE, _AHEAD = 200_000_000, 1_000_000_000, 50_000_000
_ALIGNMENT = 16  # DeepSpeed refuses buckets that are no multiple of its own, 2


@dataclass(frozen=True)
class Communication:
    """DeepSpeed's settings; sizes in elements.

    Attributes:
        reduce_bucket: gradients sent at once.
        allgather_bucket: parameters gathered at once after a step, stages 1 and 2.
        overlap: whether gradients are sent while others are computed; takes a second bucket.
        prefetch: parameters read ahead in stage 3.
        live: parameters kept gathered in stage 3 at most.
    """

    reduce_bucket: int
    allgather_bucket: int
    overlap: bool
    prefetch: int
    live: int

    @property
    def held(self) -> int:
        """Elements of all buckets of gradients."""
        return self.reduce_bucket * (1 + self.overlap)


def communication(parameters: int, *, largest: int, ranks: int, cuda: bool) -> Communication:
    """Chooses; see the module.

    Args:
        parameters: that are trained.
        largest: elements of the largest of them.
        ranks: of the run.
        cuda: whether they compute on GPUs.
    """
    low = min(_PER_RANK * ranks, _LOW)
    bucket = max(largest, min(max(parameters // 4, low), _HIGH))
    bucket = max(min(bucket, parameters), _LEAST)
    return Communication(
        reduce_bucket=_rounded(bucket),
        allgather_bucket=_rounded(max(min(parameters, _GATHER), _LEAST)),
        overlap=cuda and ranks > 1,
        prefetch=min(bucket // 2, _AHEAD),
        live=_LIVE,
    )


def _rounded(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT
