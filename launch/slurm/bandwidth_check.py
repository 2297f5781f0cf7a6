"""Measures the bandwidth of an all-reduce over all ranks before the training, to detect badly connected nodes.

``python -m launch.slurm.bandwidth_check FILE MEGABYTES``, one task per rank; rank 0 writes the result.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from launch.rank_environment import RankEnvironment

_ROUNDS = 5


def main() -> int:
    """Entry of ``python -m launch.slurm.bandwidth_check``."""
    file, megabytes = Path(sys.argv[1]), float(sys.argv[2])
    here = RankEnvironment.read()
    import torch
    import torch.distributed as dist

    from pipeline.runtime import process_group as distributed

    world = distributed.join(
        rank=here.rank,
        size=here.world_size,
        local_rank=here.local_rank,
        address=here.address,
        port=here.port,
        key=here.key,
        timeout=60.0,
        local_size=here.local_world_size,
    )
    numbers = torch.ones(int(megabytes * 1e6 / 4), device=world.device)
    seconds = []
    for _ in range(_ROUNDS + 1):
        dist.barrier(group=world.control)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        float(numbers[0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    middle = statistics.median(seconds[1:])  # the first one sets up connections
    if here.rank == 0:
        temporary = file.with_suffix(".new")
        temporary.write_text(json.dumps({"gbps": megabytes / 1e3 / middle, "seconds": middle, "ranks": here.world_size}))
        temporary.replace(file)
    distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
