"""Where a step's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.training.timing import peak_tflops
from tests.helpers.rank_pool import pool


def timed(slow: int, folder: str) -> dict[str, Any]:
    """On a rank: three steps, in which one rank is slow with its data, by a clock of their own."""
    import torch
    import torch.distributed as dist

    from pipeline.runtime.process_group import World
    from pipeline.runtime.watchdog import CHECKPOINT, COMPUTE, DATA, LOG, STEP, TEACHER, Watchdog
    from pipeline.training import timing

    now = [0.0]

    def passes(seconds: float) -> None:
        now[0] += seconds

    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, torch.device("cpu"), None)
    watchdog = Watchdog(Path(folder), rank, size, clock=lambda: now[0])
    phases = timing.Phases(world, watchdog, peak=1e-3, clock=lambda: now[0])
    a, b = torch.randn(64, 32, requires_grad=True), torch.randn(32, 16, requires_grad=True)

    def work(x: torch.Tensor) -> float:
        loss = (x @ b).sum()
        loss.backward()
        return float(loss.detach())

    results = []
    for step in range(4):
        phases.enter(DATA, step)
        passes(0.25 if rank == slow else 0.0625)
        phases.enter(COMPUTE)
        results.append(phases.counted(work, 2, "whole")(a) if step < 3 else phases.counted(work, 2, "half")(a[:32]))
        phases.enter(STEP)
        dist.barrier()
        passes(0.0 if rank == slow else 0.1875)  # it waits for the slow one
        phases.enter(TEACHER)
        phases.enter(LOG)
    with phases.phase(CHECKPOINT):
        passes(0.125)
    return {**phases.read(), "results": results}


def test_the_slowest_rank_its_data_and_the_flops_are_told(tmp_path: Path) -> None:
    ranks = pool(2).run(timed, slow=1, folder=str(tmp_path))
    for rank, values in enumerate(ranks):
        assert values["slowest_rank"] == 1
        assert (values["busy_seconds_max"], values["busy_seconds_min"]) == (0.25, 0.0625)
        assert values["checkpoint_seconds"] == 0.125
        assert values["step_seconds"] == 0.25
        assert values["data_seconds"] == (0.25 if rank == 1 else 0.0625)
        assert values["optimizer_seconds"] == (0.0 if rank == 1 else 0.1875)
        assert len(set(values["results"][:3])) == 1  # counting changes nothing
        flops = 3.5 / 4 * 3 * 2 * 64 * 32 * 16 * 2  # forward, two products backward; two micro-batches; one step in four is half
        assert values["tflops_per_rank"] == pytest.approx(flops / values["step_seconds"] / 1e12)
        assert values["mfu"] == pytest.approx(values["tflops_per_rank"] / 1e-3)


def test_peaks_are_found_by_name_and_only_for_the_precision_of_the_table() -> None:
    assert peak_tflops("NVIDIA H200", "bf16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bf16") == 312
    assert peak_tflops("NVIDIA L40S", "bf16") == 362
    assert peak_tflops("NVIDIA H200", "fp32") is None
    assert peak_tflops("Voodoo 2", "bf16") is None
