"""Chooses DeepSpeed's communication settings (bucket sizes, overlap) from parameter counts.

No setting here changes results. The considerations, in elements of 4 bytes:

- *Gradient bucket.* Gradients are reduced while others are still computed, but only when a bucket is full: with a bucket as
  large as the model nothing overlaps, and two buckets hold the gradients twice more. So the bucket is a quarter of the model,
  within bounds. Lower bound: 2 million elements per rank, at most 25 million, since a ring of R ranks takes ``2 (R-1)`` hops,
  whose latency a message must outweigh. Upper bound: 100 million, since longer messages are no faster, and two buckets take
  800 MB. DeepSpeed handles a parameter that exceeds a bucket separately, so a bucket holds the largest one, in DINOv2 a
  prototype matrix.
- *Parameter bucket* (stages 1 and 2, after the step): nothing overlaps with it, so everything at once, up to 200 million.
- *Stage 3* prefetches half a bucket, and keeps as much gathered between forward and backward pass as DeepSpeed's default: up
  to 1 000 million parameters the student is gathered once per micro-batch instead of twice.
- *Overlap* on GPUs with more than one rank; a CPU has no second stream. DeepSpeed then lets the host wait for the device once
  a backward pass, which ``training.zero_layouts.order_streams`` avoids; without overlap every bucket would stop that pass.
- Not used: ZeRO++'s quantized weights and gradients, which change results, and its copy inside each node, which does not
  cover the teacher's shards. NCCL handles the hierarchy of links inside and between nodes.

The figures for links and messages are estimates for GPU clusters, not measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGE_0_BUCKET = 500_000_000  # DeepSpeed's own, not configurable
_LEAST, _PER_RANK, _LOW, _HIGH = 1 << 20, 2_000_000, 25_000_000, 100_000_000
_GATHER, _LIVE, _AHEAD = 200_000_000, 1_000_000_000, 50_000_000
_ALIGNMENT = 16  # DeepSpeed requires buckets to be multiples of its own alignment, 2


@dataclass(frozen=True)
class Communication:
    """DeepSpeed's communication settings; sizes in elements.

    Attributes:
        reduce_bucket: gradients reduced at once.
        allgather_bucket: parameters gathered at once after a step, stages 1 and 2.
        overlap: whether gradients are reduced while others are computed; takes a second bucket.
        prefetch: parameters prefetched in stage 3.
        live: maximum parameters kept gathered in stage 3.
    """

    reduce_bucket: int
    allgather_bucket: int
    overlap: bool
    prefetch: int
    live: int

    @property
    def held(self) -> int:
        """Elements of all gradient buckets."""
        return self.reduce_bucket * (1 + self.overlap)


def communication(parameters: int, *, largest: int, ranks: int, cuda: bool) -> Communication:
    """Chooses the settings; see the module.

    Args:
        parameters: number of trained parameters.
        largest: elements of the largest of them.
        ranks: world size.
        cuda: whether training runs on GPUs.
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
