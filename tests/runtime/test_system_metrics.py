"""What each machine of a run tells of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.rank_pool import pool


def _read(nodes: list[int], tmp: str) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from pipeline.runtime.process_group import World
    from pipeline.runtime.system_metrics import Nodes

    rank = dist.get_rank()
    local = sum(nodes[other] == nodes[rank] for other in range(rank))
    found = Nodes(World(rank, len(nodes), local, torch.device("cpu"), None), Path(tmp))
    return found.read()


def test_one_rank_speaks_for_each_machine_and_all_hear_it(tmp_path: Path) -> None:
    machines: Any = [0, 0, 1, 1]
    told = pool(4).run(_read, nodes=machines, tmp=str(tmp_path))
    assert all(one == told[0] for one in told)
    assert {key.split("/")[0] for key in told[0]} == {"node0", "node1"}
    for node in ("node0", "node1"):
        assert 0 <= told[0][f"{node}/cpu_share"] <= 1 and 0 < told[0][f"{node}/memory_share"] < 1
        assert told[0][f"{node}/disk_free_gb"] > 0 and told[0][f"{node}/received_mb_per_s"] >= 0
        assert f"{node}/gpu_share" not in told[0], "there is no GPU here"


def test_what_cannot_be_read_is_left_out_and_stops_nothing(tmp_path: Path) -> None:
    (told,) = pool(1).run(_read, nodes=[0], tmp=str(tmp_path / "gone"))
    assert "node0/disk_free_gb" not in told and told["node0/memory_share"] > 0
