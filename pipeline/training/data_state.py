"""The data side's part of a checkpoint: what must not change, and the bad samples of all ranks."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import torch.distributed as dist

from pipeline.data.inputs import Inputs, data_identity
from pipeline.data.loader.bad_samples import MOST_KNOWN, BadSamples
from pipeline.runtime.process_group import World


def data_state(inputs: Inputs, bad_samples: BadSamples, world: World) -> dict[str, Any]:
    """Returns the data state, the same on all ranks. Collective.

    Rank 0 alone receives what each rank has to add since the last checkpoint; the others receive the sum, so that nothing grows
    with the square of the world size.
    """
    first = world.rank == 0
    states: list[Any] | None = [None] * world.size if first else None
    dist.gather_object(bad_samples.changes(), states, dst=0, group=world.control)
    merged = [_merged(states or [])]
    dist.broadcast_object_list(merged, src=0, group=world.control)
    total = merged[0]
    bad_samples.merge(total["quarantine"])
    return {
        **data_identity(inputs),
        "samples": inputs.train.total,
        "seen": total["seen"],
        "substituted": total["reasons"],
        "counts": total["counts"],
        "quarantine": {str(number): reason for number, reason in bad_samples.of_all_ranks.items()},
    }


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    quarantine: dict[int, str] = {}
    for state in states:
        reasons.update(state["reasons"])
        counts.update(state["counts"])
        quarantine |= islice(state["quarantine"].items(), MOST_KNOWN - len(quarantine))
    return {
        "seen": sum(state["seen"] for state in states),
        "reasons": dict(reasons),
        "counts": dict(counts),
        "quarantine": quarantine,
    }
