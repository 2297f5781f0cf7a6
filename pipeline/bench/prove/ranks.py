"""Compares two ranks with one in every ZeRO stage; measures the bandwidth of an all-reduce and the speed of a rank among many."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.bench import step_config
from pipeline.bench.plain import Plain, Size, batch_of
from pipeline.bench.prove.batches import moved
from pipeline.bench.prove.methods import overrides_of
from pipeline.bench.prove.stage import Check, Setup, at_least, at_most
from pipeline.config.load import load
from pipeline.data.augment.views import Batch
from pipeline.methods.base import Step
from pipeline.training.engine import Engine, EngineOptions

_STAGES = (0, 1, 2, 3)
_APART = 1e-5  # relative, of all weights together after three steps
_CONFIG, _SAMPLES = "dinov2/vitl16_short", 64  # a rank
_WEAK = 0.93  # speed of a rank among many relative to one alone
_WARM, _MEASURED = 3, 5  # steps
_STEP = Step(lr=1e-3, last_layer_lr=1e-3, momentum=0.9)


def checks(setup: Setup) -> Iterator[Check]:
    """Two ranks against one in each stage, the bandwidth of an all-reduce, and the speed of a rank among all."""
    devices = torch.cuda.device_count() if setup.device == "cuda" else 2
    if devices < 2:
        yield Check("two ranks", "one device only")
        return
    size = Size(width=32, depth=2, samples=8) if setup.toy else Size(width=1024, depth=8, samples=64)
    alone, both = (_train(setup, size, world, stages) for world, stages in ((1, (0,)), (2, _STAGES)))
    for stage in _STAGES:
        weights = both[f"weights {stage}"]
        apart = float((weights - alone["weights 0"]).norm() / weights.norm())
        yield at_most(f"ZeRO {stage}: two ranks against one, relative difference of the weights", apart, _APART)
    yield Check("all-reduce over two ranks, GB/s", f"{float(both['bandwidth']):.3g}")
    for world, measured in ((2, both), *(((devices, None),) if devices > 2 else ())):
        many = measured or _train(setup, size, world, ())
        name = f"{_CONFIG}: speed of a rank among {world} relative to one alone"
        share = float(alone["seconds"] / many["seconds"])
        yield Check(name, f"{share:.3g}") if setup.toy else at_least(name, share, _WEAK)


def _train(setup: Setup, size: Size, world: int, stages: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Weights after three steps in each stage, the bandwidth, and the seconds of a step of a real method."""
    with tempfile.TemporaryDirectory(dir=setup.folder) as folder:
        mp.spawn(_rank, args=(world, stages, size, setup, folder), nprocs=world)
        results: dict[str, torch.Tensor] = torch.load(Path(folder) / "results.pt", weights_only=True)
        return results


def _rank(rank: int, world: int, stages: tuple[int, ...], size: Size, setup: Setup, folder: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    kind = setup.device
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {f"weights {stage}": _trained(stage, size, device) for stage in stages}
    results["bandwidth"] = _bandwidth(1 << (16 if kind == "cpu" else 28), device)
    results["seconds"] = _seconds(device, toy=setup.toy)
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


def _seconds(device: torch.device, *, toy: bool) -> torch.Tensor:
    """Of a step, the mean of several."""
    samples = 2 if toy else _SAMPLES
    precision = "bf16" if device.type == "cuda" else "fp32"
    sizes = (f"train.global_batch_size={samples * dist.get_world_size()}", f"train.micro_batch_size={samples}")
    settings = load(_CONFIG, [*overrides_of(_CONFIG, toy=toy), *sizes, f"train.precision={precision}"]).config
    step = step_config.contest(settings, device).ours
    for number in range(_WARM + _MEASURED):
        if number == _WARM:
            dist.barrier()
            began = time.perf_counter()
        step()  # returns the loss, for which the host waits
    return torch.tensor((time.perf_counter() - began) / _MEASURED)


def _trained(stage: int, size: Size, device: torch.device) -> torch.Tensor:
    method = Plain(size).to(device)
    batch = moved(_share(batch_of(size), dist.get_rank(), dist.get_world_size()), device)
    options = EngineOptions(stage, "fp32", len(batch.ids), 1, (0.9, 0.95), 1e-8, None, "network")  # type: ignore[arg-type]
    engine = Engine(method, options, device)
    for _ in range(3):
        terms = engine.forward_backward(batch, _STEP)
        engine.step(_STEP, torch.stack(list(terms.values())).isfinite().all())
        method.after_step(_STEP)
    with engine.gathered(teacher=True):
        weights = torch.cat([p.detach().flatten().cpu() for p in method.parameters()])
    engine.close()
    return weights


def _bandwidth(numbers: int, device: torch.device) -> torch.Tensor:
    """Gigabytes of fp32 numbers that are reduced in a second."""
    payload = torch.ones(numbers, device=device)
    dist.all_reduce(payload)
    began = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(payload)
    float(payload[0])  # waits for the device
    return torch.tensor(3 * payload.numel() * payload.element_size() / (time.perf_counter() - began) / 1e9)


def _share(batch: Batch, rank: int, world: int) -> Batch:
    """A rank's rows: as many from the front as from the back, because the method pairs the first with the last."""
    half = len(batch.ids) // world // 2
    rows = [*range(rank * half, (rank + 1) * half), *range(len(batch.ids) - (rank + 1) * half, len(batch.ids) - rank * half)]
    return replace(
        batch, views={"view": [batch.views["view"][0][rows]]}, labels=batch.labels[rows], keys=[str(n) for n in rows], ids=rows
    )
