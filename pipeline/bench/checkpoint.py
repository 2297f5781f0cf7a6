"""Benchmarks checkpoints: how long training pauses for a synchronous and an asynchronous save, and how long loading takes.

One rank, DINOv2 on random images, on the CPU or the first CUDA device. The cost of a save has two parts: the time for which the
loop pauses, and the slowdown of its steps while a checkpoint is written in the background.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint import files as saved
from pipeline.checkpoint import reader
from pipeline.checkpoint import writer as checkpoint
from pipeline.data.augment.masks import block_masks, mask_counts
from pipeline.data.augment.settings import MultiCropSettings
from pipeline.data.augment.views import Batch, Masks
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.methods.dinov2.method import DINOv2, dinov2_views
from pipeline.methods.dinov2.settings import Dinov2Settings
from pipeline.models.settings import ModelSettings
from pipeline.models.vision import build_tower
from pipeline.training.engine import Engine, EngineOptions

MODELS = {name: f"vit_{name}_patch16_224" for name in ("tiny", "small", "base", "large")}
_TARGET = 0.05


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        model: one of :data:`MODELS`.
        batch: samples per step.
        side: of the two global crops, pixels; the four local crops have half of it.
        prototypes: per head; there are two heads.
        saves: checkpoints of each kind.
        device: ``cpu`` or ``cuda``.
        directory: on the disk to measure; by default a temporary folder.
    """

    model: str = "small"
    batch: int = 16
    side: int = 224
    prototypes: int = 65536
    saves: int = 3
    device: str = "cpu"
    directory: Path | None = None


@dataclass
class Result:
    """Results in seconds, medians over all saves; shares refer to one step.

    Attributes:
        parameters: of the student.
        size: bytes of a checkpoint.
        step: a step without a save.
        waiting: pause for a synchronous save.
        beside: pause for an asynchronous save: the copy to host memory, and all that is waited for in later steps.
        slower: total slowdown of the steps during an asynchronous save.
        until_current: from the copy until the checkpoint is complete.
        verify, load: of one checkpoint.
    """

    parameters: int = 0
    size: int = 0
    step: float = 0.0
    waiting: float = 0.0
    beside: float = 0.0
    slower: float = 0.0
    until_current: float = 0.0
    verify: float = 0.0
    load: float = 0.0
    samples: dict[str, list[float]] = field(default_factory=dict)


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Train, save and load.

    Raises:
        ConfigError: no such model, or no CUDA device.
    """
    if options.model not in MODELS:
        raise ConfigError(f"{options.model!r} is not a size", where="--model", hint=f"Choose one of {', '.join(MODELS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available", where="--device", hint="Choose cpu")
    with tempfile.TemporaryDirectory(prefix="fovea-bench-", dir=options.directory) as folder:
        if dist.is_initialized():  # DeepSpeed does not support a second group in one process
            return _measure(options, Path(folder) / "checkpoints", dist.new_group(backend="gloo"), log)
        backend = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            control: Any = dist.new_group(backend="gloo")
            return _measure(options, Path(folder) / "checkpoints", control, log)
        finally:
            dist.destroy_process_group()


def _measure(options: Options, folder: Path, control: Any, log: Callable[[str], None]) -> Result:
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    method, batch = make_method(options, device)
    precision: Literal["fp32", "bf16"] = "bf16" if options.device == "cuda" else "fp32"
    engine = Engine(method, EngineOptions(2, precision, options.batch, 1, (0.9, 0.999), 1e-8, 3.0, "network"), device)
    store = checkpoint.Checkpoints(folder, keep_last=2, group=control)
    number = 0

    def step() -> float:
        nonlocal number
        begin = time.perf_counter()
        at = Step(index=number, lr=1e-4, last_layer_lr=1e-4, momentum=0.99)
        terms = engine.forward_backward(batch, at)
        engine.step(at, torch.stack(list(terms.values())).isfinite().all())
        method.after_step(at)
        if device.type == "cuda":
            torch.cuda.synchronize()
        number += 1
        return time.perf_counter() - begin

    def facts() -> dict[str, Any]:
        return {"step": number, "applied": number, "skipped": 0, "scores": {}, "config": {}, "data": {}}

    def timed(act: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        act()
        return time.perf_counter() - begin

    result = Result(parameters=sum(p.numel() for p in method.parameters()))
    lists: dict[str, list[float]] = {name: [] for name in ("step", "waiting", "beside", "slower", "until_current")}
    log("steps")
    for _ in range(3):
        step()
    lists["step"] = [step() for _ in range(6)]
    plain = statistics.median(lists["step"])
    log("synchronous saves")
    for _ in range(options.saves):
        step()
        lists["waiting"].append(timed(lambda: store.save(engine, method, facts())))
    log("asynchronous saves")
    for number_of in range(options.saves + 1):
        begin, slower = time.perf_counter(), 0.0
        still = timed(lambda: store.begin(engine, method, facts()))
        done = False
        while not done:
            slower += step() - plain
            poll = time.perf_counter()
            done = store.poll(store.state) is not None
            still += time.perf_counter() - poll
        if number_of:  # the first save allocates the host memory
            lists["beside"].append(still)
            lists["slower"].append(slower)
            lists["until_current"].append(time.perf_counter() - begin)
    last = saved.committed_checkpoints(folder)[-1]
    result.size = sum(file["size"] for file in last.manifest["files"])
    log("loading")
    result.verify = timed(lambda: saved.verify(last))
    result.load = timed(lambda: reader.load(last, engine, method))
    for name, values in lists.items():
        setattr(result, name, statistics.median(values))
    result.samples = lists
    engine.close()
    return result


def make_method(options: Options, device: torch.device) -> tuple[DINOv2, Batch]:
    """DINOv2 with a batch of noise, both on the device."""
    torch.manual_seed(0)
    local = max(options.side // 2 // 16 * 16, 16)
    views = MultiCropSettings(global_size=options.side, local_size=local, local_count=4)
    settings = Dinov2Settings(views=views, prototypes=options.prototypes)
    tower = build_tower(ModelSettings(timm_name=MODELS[options.model]), image_size=options.side)
    method = DINOv2(tower, settings).to(device).move_state(device)
    spec = dinov2_views(settings, patch=16)[0].mask
    grid, rows = options.side // 16, 2 * options.batch
    hidden = np.zeros((rows, grid * grid), dtype=bool)
    if spec is not None:
        hidden = block_masks(mask_counts(rows, grid * grid, spec, 0), grid, grid, np.arange(rows, dtype=np.uint64), 0, 1)
    mask = torch.from_numpy(hidden).reshape(rows, -1)
    weight = (1.0 / mask.sum(1, keepdim=True).clamp(min=1)).expand(mask.shape)[mask]
    masks = Masks(mask.to(device), mask.flatten().nonzero().flatten().to(device), weight.to(device))

    def crops(side: int) -> torch.Tensor:
        return torch.randn(options.batch, 3, side, side).to(device)

    batch = Batch(
        views={"global": [crops(options.side) for _ in range(2)], "local": [crops(local) for _ in range(4)]},
        masks={"global": masks},
        labels=torch.full((options.batch,), -1),
        keys=[str(n) for n in range(options.batch)],
        ids=list(range(options.batch)),
        position=0,
    )
    return method, batch


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    about = {
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(0) if options.device == "cuda" else "cpu",
        "model": f"{MODELS[options.model]}, heads of {options.prototypes} prototypes, {result.parameters / 1e6:.1f} M parameters",
        "a step": f"{options.batch} samples, 2 crops of {options.side} and 4 of {options.side // 2} pixels, {result.step:.3f} s",
        "a checkpoint": f"{result.size / 1e6:,.0f} MB; medians of {options.saves}, all in the JSON file",
    }
    rate = result.size / 1e6
    rows = [
        ("training pauses, synchronous save", result.waiting),
        ("training pauses, asynchronous save", result.beside),
        ("slowdown of the steps during an asynchronous save, in total", result.slower),
        ("from the copy until the checkpoint is complete", result.until_current),
        ("verify", result.verify),
        ("load", result.load),
    ]
    lines = ["# Cost of a checkpoint", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in {**machine, **about}.items()]
    lines += ["", "| | seconds | of a step | MB/s |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {seconds:.3f} | {seconds / result.step:.1%} | {rate / seconds if seconds > 0 else 0:,.0f} |"
        for name, seconds in rows
    ]
    share = result.beside / result.step
    comparison = "below" if share < _TARGET else "not below"
    lines += ["", f"Training pauses for {share:.1%} of a step, {comparison} the target of {_TARGET:.0%}."]
    return "\n".join(lines) + "\n"
