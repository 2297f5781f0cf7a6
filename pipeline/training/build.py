"""Builds the trainer of one rank from the settings."""

from __future__ import annotations

import math
import platform
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from pipeline.checkpoint.data_check import check_data, record_data
from pipeline.checkpoint.files import Saved, read
from pipeline.checkpoint.memory import Snapshots
from pipeline.checkpoint.mirror import Copies
from pipeline.checkpoint.neighbours import NodePlace
from pipeline.checkpoint.reader import load
from pipeline.checkpoint.selection import newest
from pipeline.checkpoint.writer import Checkpoints
from pipeline.config.schema import Config
from pipeline.config.validate import check_devices
from pipeline.data.augment.curriculum import curriculum_text, stage_ends
from pipeline.data.indexing import open_storage
from pipeline.data.inputs import Inputs
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.columns import ColumnReader
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.prefetch import Prefetcher
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.data.storage import Storage
from pipeline.errors import CheckpointError, ConfigError, NonFiniteError
from pipeline.estimate.flops import counted_sets
from pipeline.evaluation.runner import Evaluations, Show
from pipeline.methods.base import Method
from pipeline.methods.registry import build_seeded_method
from pipeline.models.fp8 import use_fp8
from pipeline.models.text import TextTower
from pipeline.models.vision import VisionTower
from pipeline.runtime.process_group import World
from pipeline.runtime.run_directory import RunDirectory
from pipeline.runtime.startup_phases import StartupPhases
from pipeline.runtime.stop_requests import StopRequests
from pipeline.runtime.system_metrics import Nodes
from pipeline.runtime.watchdog import Watchdog
from pipeline.tracking import Journal
from pipeline.training.alerts import Alerts
from pipeline.training.compilation import compile_blocks, networks_of, why_uncompiled
from pipeline.training.data_state import data_state
from pipeline.training.engine import Engine, EngineOptions
from pipeline.training.progress import Plan, Progress, ProgressLogger
from pipeline.training.rollback import SkippedSteps
from pipeline.training.schedules import Schedules
from pipeline.training.signature_file import SignatureFile
from pipeline.training.signatures import Signatures, header_of
from pipeline.training.timing import Phases, peak_tflops
from pipeline.training.trainer import Trainer
from pipeline.training.verification import Verification
from pipeline.weights import init_from as initial


def make_plan(config: Config, order: Order, run: RunDirectory, attempt: int, rank: int) -> Plan:
    """Convert lengths and intervals to optimizer steps."""
    batch, epoch = config.train.global_batch_size, order.samples_per_epoch
    record = run.batches(attempt, rank) if config.train.record_batches else None
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
    return Plan(
        steps=config.train.duration.steps(epoch, batch),
        log_every=config.train.log_every,
        evaluate_every=math.gcd(*(every.steps(epoch, batch) for every in config.evaluation.enabled.values())),
        checkpoint_every=config.checkpoint.every.steps(epoch, batch),
        max_nonfinite=config.train.max_consecutive_nonfinite,
        seed=config.run.seed,
        record=record,
        rollback_after=config.watchdog.rollback_after,
        rollback_margin=config.watchdog.rollback_margin,
        max_rollbacks=config.watchdog.max_rollbacks,
        asynchronous=config.checkpoint.async_save,
        save_evaluated=config.checkpoint.keep_best,
        pause_at=config.train.pause_at.steps(epoch, batch) if config.train.pause_at is not None else None,
    )


def prepare_towers(
    method: Method, config: Config, device: torch.device | None = None, *, before: bool | None = None
) -> str | None:
    """Enable activation checkpointing, fp8 products and compilation as configured.

    Args:
        method: the method, before its first forward pass.
        config: the settings.
        device: where it runs; a GPU if there is one.
        before: see :func:`pipeline.training.compilation.why_uncompiled`.

    Returns:
        Why blocks are not compiled; ``None`` if they are.

    Raises:
        ConfigError: ``train.compile`` without the compiler that it needs, or ``train.fp8`` on a GPU that does not support it.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.train.fp8 != "off" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise ConfigError(
            f"{torch.cuda.get_device_name()} does not support fp8 matrix products", where="train.fp8", hint="Set train.fp8=off"
        )
    towers = [m for root in networks_of(method) for m in root.modules() if isinstance(m, VisionTower | TextTower)]
    for tower in towers:
        tower.checkpointing = config.train.activation_checkpointing
        if config.train.fp8 == "all" or (config.train.fp8 == "teacher" and not any(p.requires_grad for p in tower.parameters())):
            use_fp8(_blocks(tower))
    reason = why_uncompiled(config, device, before)
    if reason is None:
        compile_blocks(method, cuda_graphs=config.train.cuda_graphs)
    return reason


def _blocks(tower: VisionTower | TextTower) -> Any:
    """The module list of a tower's blocks."""
    blocks: nn.Module = tower.vit.blocks if isinstance(tower, VisionTower) else tower.blocks
    return blocks


def engine_options(config: Config, micro_batch: int, accumulation: int) -> EngineOptions:
    """The engine's options of a config, for this many samples in a forward pass and forward passes in a step."""
    return EngineOptions(
        zero=config.train.zero_stage,
        precision=config.train.precision,
        micro_batch=micro_batch,
        accumulation=accumulation,
        betas=config.optim.betas,
        eps=config.optim.eps,
        clip_norm=config.method.clip_norm,
        clip_scope=config.method.clip_scope,
        optimizer=config.optim.name,
        momentum=config.optim.momentum,
        trust=config.optim.trust_coefficient,
        offload=config.train.offload,
        init=config.launch.deepspeed_init,
        graphs=config.train.cuda_graphs,
        l2_to_start=config.adapt.l2_to_start,
    )


def assemble(
    config: Config,
    inputs: Inputs,
    world: World,
    run: RunDirectory,
    *,
    attempt: int,
    resume: Saved | None,
    manifest_fields: dict[str, Any],
    requests: StopRequests,
    journal: Journal | None,
    logger: ProgressLogger,
    watchdog: Watchdog,
    copies: Copies | None = None,
    excluded: Sequence[int] = (),
    snapshots: Path | None = None,
    last_start: bool = False,
    nodes: NodePlace | None = None,
    startup: StartupPhases | None = None,
) -> Trainer:
    """Build everything one rank needs and load the checkpoint ``resume``, if given; samples in ``excluded`` are substituted.

    ``snapshots`` is the folder of this node in host memory, ``nodes`` this rank's place among several nodes. Without a folder, or
    in the ``last_start``, no snapshots are taken, since nothing would continue from them. ``startup`` takes its marks.

    Raises:
        CheckpointError: the checkpoint does not fit this run.
    """
    startup = startup or StartupPhases()
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    method = build_seeded_method(config, world.device)
    init = resume.manifest.get("init") if resume is not None else None
    if resume is None and (start := initial.begin(method, config, record=world.rank == 0)) is not None:
        init = start.record
        for note in start.notes:
            logger.log(note)
        if journal is not None:
            journal.tags({f"fovea.init.{key}": value for key, value in start.record.items()})
    compiled_before = bool(resume.manifest.get("compiled")) if resume is not None else None
    uncompiled = prepare_towers(method, config, world.device, before=compiled_before)
    if world.device.type == "cuda" or config.train.compile is True:
        logger.log(f"blocks are not compiled: {uncompiled}" if uncompiled else "blocks are compiled in the first steps")
    if method.curriculum:
        logger.log(f"views: {curriculum_text(config.method.views)}")
    share = config.train.global_batch_size // world.size
    flops = _step_flops(config, share) if uncompiled is None and world.rank == 0 else None
    micro = config.train.micro_batch_size or share
    startup.mark("networks")
    engine = Engine(method, engine_options(config, micro, share // micro), world.device)
    startup.mark("engine")
    bad_samples = BadSamples(
        run.bad_samples(world.rank),
        budget=config.data.max_bad_fraction,
        window=config.data.bad_fraction_window,
        excluded=excluded,
    )
    progress = Progress()
    if resume is not None:
        progress = _restore(resume, engine, method, bad_samples, inputs, config.checkpoint.allow_data_change)
        startup.mark("checkpoint loaded")
    if world.rank == 0:
        record_data(run.data, inputs)
    store = open_storage(config)
    store.prefetched = Prefetcher.useful(inputs.train, store)
    reader = _reader(config, inputs, store)
    if (method.text is not None) != config.method.reads_text:
        raise ConfigError(
            f"the method {'reads' if method.text else 'does not read'} text, but its settings declare the opposite",
            where=f"{type(config.method).__name__}.reads_text",
            hint="Make both agree: the settings decide before the start whether samples without a caption are left out",
        )
    dataset = StepDataset(
        reader,
        inputs.order,
        method.views,
        seed=config.run.seed,
        world=world.size,
        rank=world.rank,
        text=method.text,
        sources=inputs.sources,
        sets=method.view_sets,
        stages=[stage.views for stage in method.curriculum],
        ends=_stage_ends(method, inputs.order),
    )
    options = StreamOptions(
        micro_batch=micro,
        workers=config.data.num_workers,
        threads=config.data.decode_threads,
        prefetch=config.data.prefetch,
        hue=config.method.augment.hue_space,
    )

    def stream(first: int, last: int) -> BatchStream:
        prefetcher = None
        if store.prefetched:
            prefetcher = Prefetcher(
                inputs.train,
                inputs.order,
                store,
                world=world.size,
                rank=world.rank,
                last=last,
                horizon=2 * inputs.order.block_size * inputs.order.streams // inputs.order.global_batch,
                share=1 / world.local_size,
            )
        return BatchStream(
            dataset, device=world.device, options=options, bad_samples=bad_samples, first=first, last=last, prefetcher=prefetcher
        )

    def load_last_checkpoint() -> Progress:
        chosen: list[str | None] = [None]
        if world.rank == 0:
            checkpoint, _ = newest(run.checkpoints)
            chosen = [str(checkpoint.path) if checkpoint else None]
        dist.broadcast_object_list(chosen, group=world.control)
        if chosen[0] is None:
            raise NonFiniteError(
                "the loss is not finite and there is no checkpoint to roll back to",
                where=str(run.checkpoints),
                hint="Lower schedule.lr.peak or lengthen schedule.lr.warmup, or save more often with checkpoint.every",
            )
        return _restore(read(Path(chosen[0])), engine, method, bad_samples, inputs, config.checkpoint.allow_data_change)

    evaluate = None
    if config.evaluation.enabled:
        show = _sheets(run, journal) if journal is not None else None
        evaluate = Evaluations(config, inputs, method, world, resume is None, show=show)
    return Trainer(
        world=world,
        method=method,
        engine=engine,
        schedules=Schedules.from_config(config, epoch_samples=inputs.order.samples_per_epoch),
        stream=stream,
        checkpoints=_checkpoints(config, inputs, run, world, copies),
        evaluate=evaluate,
        data_state=lambda: data_state(inputs, bad_samples, world),
        manifest_fields={
            **manifest_fields,
            "init": init,
            "world": world.size,
            "compiled": uncompiled is None,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        journal=journal,
        logger=logger,
        plan=make_plan(config, inputs.order, run, attempt, world.rank),
        requests=requests,
        phases=Phases(world, watchdog, _peak(config, world.device), count=uncompiled is not None, flops=flops),
        skipped_steps=SkippedSteps(run.path / "skipped_steps.json"),
        load_last_checkpoint=load_last_checkpoint,
        alerts=Alerts(method.health_metrics),
        node_metrics=Nodes(world, run.path).read,
        signatures=_signatures(config, world, run, attempt, micro, str(manifest_fields.get("fovea", ""))),
        snapshots=_snapshots(config, inputs, world, None if last_start else snapshots, nodes),
        only_in_memory=resume is not None and resume.path.parent == snapshots,
        verification=_verification(config, engine, method, world),
        progress=progress,
        startup=startup,
    )


def _stage_ends(method: Method, order: Order) -> tuple[int, ...]:
    """First step after each stage of the curriculum."""
    lengths = [stage.until for stage in method.curriculum]
    return stage_ends(lengths, epoch_samples=order.samples_per_epoch, global_batch=order.global_batch)


def _reader(config: Config, inputs: Inputs, store: Storage) -> Reader:
    """Reads training samples, and the columns of metadata that guide the method."""
    checksum = config.data.verify_checksums
    if columns := {column.name: column.values for column in config.guidance.columns}:
        return ColumnReader(inputs.train, columns, checksum=checksum, store=store)
    return Reader(inputs.train, wants=("image", "label", "caption"), checksum=checksum, store=store)


def _step_flops(config: Config, samples: int) -> dict[Hashable, float]:
    """FLOPs of a step of a rank by the layout of its batches, counted on tensors without values, since compiled blocks cannot be
    counted while they run.
    """
    with torch.random.fork_rng(devices=[]):
        return {one.layout: one.flops * samples for one in counted_sets(config)}


def _sheets(run: RunDirectory, journal: Journal) -> Show:
    """Save image sheets beside the journal and queue them for upload."""

    def keep(step: int, name: str, sheet: NDArray[np.uint8]) -> None:
        path = run.path / "pictures" / f"{name}-{step:09d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(path)
        journal.artifact(path.resolve())

    return keep


def _peak(config: Config, device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return config.watchdog.peak_tflops or peak_tflops(name, config.train.precision)


def _checkpoints(config: Config, inputs: Inputs, run: RunDirectory, world: World, copies: Copies | None) -> Checkpoints:
    c = config.checkpoint
    return Checkpoints(
        run.checkpoints,
        keep_last=c.keep_last,
        keep_every=c.keep_every.steps(inputs.order.samples_per_epoch, config.train.global_batch_size) if c.keep_every else 0,
        keep_best=c.keep_best,
        max_failures=c.max_failures,
        group=world.control,
        on_commit=copies.offer if copies else None,
        pinned=copies.pinned if copies else set,
        sign=config.train.signatures,
    )


def _snapshots(config: Config, inputs: Inputs, world: World, folder: Path | None, nodes: NodePlace | None) -> Snapshots:
    every = config.checkpoint.snapshot_every
    steps = every.steps(inputs.order.samples_per_epoch, config.train.global_batch_size) if every is not None else 0
    return Snapshots(folder, steps, group=world.control, nodes=nodes)


def _signatures(config: Config, world: World, run: RunDirectory, attempt: int, micro: int, fovea: str) -> Signatures | None:
    if not config.train.signatures:
        return None
    header = header_of(world, attempt, zero_stage=config.train.zero_stage, micro_batch=micro, fovea=fovea)
    return Signatures(SignatureFile(run.signatures(attempt, world.rank), header), world)


def _verification(config: Config, engine: Engine, method: Method, world: World) -> Verification | None:
    if config.train.verify_every is None:
        return None
    for key, message in check_devices(config, on_gpu=world.device.type == "cuda"):
        raise ConfigError(message, where=key)
    return Verification(engine, method, world, config.train.verify_every)


def _restore(saved: Saved, engine: Engine, method: Method, bad_samples: BadSamples, inputs: Inputs, allow: bool) -> Progress:
    changed = check_data(saved, inputs, allow=allow)
    load(saved, engine, method)
    missing = [key for key in ("applied", "skipped", "scores", "seconds", "data") if key not in saved.manifest]
    missing += [key for key in ("seen", "substituted", "quarantine") if key not in saved.manifest.get("data", {})]
    if missing:
        raise CheckpointError(
            f"its manifest lacks {', '.join(missing)}", where=str(saved.path), hint="Resume from another checkpoint"
        )
    data = saved.manifest["data"]
    # After this point rank 0 holds the totals; the other ranks count only their own samples.
    first = dist.get_rank() == 0
    bad_samples.load(
        {
            "seen": data["seen"] if first else 0,
            "reasons": data["substituted"] if first else {},
            "counts": data.get("counts", {}) if first else {},
            "quarantine": {} if changed else data["quarantine"],  # with other data, its numbers refer to other samples
        }
    )
    m = saved.manifest
    return replace(
        Progress(),
        step=m["step"],
        applied=m["applied"],
        skipped=m["skipped"],
        scores=dict(m["scores"]),
        scores_step=int(m.get("scored", -1)),
        evaluated_metrics=tuple(m.get("judged", m["scores"])),
        seconds=float(m["seconds"]),
    )
