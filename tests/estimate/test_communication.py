"""Buckets by size of model and world, as a table."""

from __future__ import annotations

import pytest

from pipeline.estimate.communication import communication

M = 1_000_000


@pytest.mark.parametrize(
    ("parameters", "largest", "ranks", "bucket", "gathered"),
    [
        (300, 200, 2, 1 << 20, 1 << 20),  # a toy
        (22 * M, M, 2, 5.5 * M, 22 * M),  # a small tower, quarter by quarter
        (22 * M, M, 8, 16 * M, 22 * M),  # more ranks, longer messages
        (22 * M, M, 64, 22 * M, 22 * M),  # but never more than there is
        (110 * M, 17 * M, 8, 27.5 * M, 110 * M),  # base with prototypes
        (350 * M, 34 * M, 64, 87.5 * M, 200 * M),  # large
        (1200 * M, 50 * M, 256, 100 * M, 200 * M),  # giant
        (400 * M, 130 * M, 8, 130 * M, 200 * M),  # a matrix that fits into no other bucket
    ],
)
def test_buckets_by_parameters_and_ranks(parameters: int, largest: int, ranks: int, bucket: float, gathered: int) -> None:
    chosen = communication(parameters, largest=largest, ranks=ranks, cuda=True)
    assert (chosen.reduce_bucket, chosen.allgather_bucket) == (bucket, gathered)
    assert largest <= chosen.reduce_bucket and chosen.prefetch <= chosen.reduce_bucket
    assert chosen.overlap and chosen.held == 2 * bucket


def test_nothing_overlaps_on_a_cpu_or_alone() -> None:
    for ranks, cuda in ((8, False), (1, True)):
        chosen = communication(M, largest=M, ranks=ranks, cuda=cuda)
        assert not chosen.overlap and chosen.held == chosen.reduce_bucket


def test_buckets_are_such_as_deepspeed_takes_whatever_the_number_of_parameters() -> None:
    for parameters in (1_048_577, 2_345_679, 33_333_333):
        chosen = communication(parameters, largest=1_048_583, ranks=2, cuda=True)
        assert chosen.reduce_bucket % 16 == chosen.allgather_bucket % 16 == 0
        assert chosen.reduce_bucket >= 1_048_583 and chosen.allgather_bucket >= parameters
