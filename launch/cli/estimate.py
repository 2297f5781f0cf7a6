"""``fovea estimate``: estimates GPU memory by ZeRO stage and number of GPUs, time and cost before a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rich.box import SIMPLE
from rich.table import Table

from launch.slurm.profile import ClusterProfile
from launch.terminal import Terminal
from pipeline.config.schema import Config
from pipeline.errors import ConfigError
from pipeline.estimate import activations
from pipeline.estimate.flops import counted_run
from pipeline.estimate.memory import FP32, Held, held
from pipeline.runtime.gpus import gpus

_SLACK = 0.92  # usable share of a GPU's memory: the rest is the CUDA context, NCCL and allocator fragmentation


@dataclass(frozen=True)
class Sizes:
    """Element counts of a method's parameters.

    Attributes:
        groups: trained parameters, by parameter group.
        frozen: untrained parameters of the student.
        teacher: parameters of the teacher.
        networks: trained elements, by sub-network.
        live: activations kept by a forward pass.
        views: bytes of a sample's views as produced by DALI, fp32 pixels.
    """

    groups: list[list[int]]
    frozen: list[int]
    teacher: list[int]
    networks: dict[str, int]
    live: activations.Activations
    views: float

    @property
    def trained(self) -> int:
        """Number of trained elements."""
        return sum(map(sum, self.groups))


def measure(config: Config) -> Sizes:
    """Build the method on the meta device and count its parameters."""
    import torch

    from pipeline.methods.registry import build_method

    with torch.device("meta"):
        method = build_method(config)
    return Sizes(
        groups=[[p.numel() for p in group.params] for group in method.parameter_groups()],
        frozen=[p.numel() for p in method.parameters() if not p.requires_grad],
        teacher=[p.numel() for _, p in method.teacher.named_parameters()] if method.teacher is not None else [],
        networks={
            name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in method.networks().items()
        },
        live=activations.counted(config),
        views=max(
            sum(view.count * view.in_channels * math.prod(view.shape) * FP32 for view in one.views)
            for one in method.all_view_sets
        ),
    )


def needed(config: Config, sizes: Sizes, stage: int, ranks: int) -> tuple[Held, float]:
    """Persistent bytes on one GPU, and its activations."""
    share = max(config.train.global_batch_size // ranks, 1)
    micro = min(config.train.micro_batch_size or share, share)
    bf16 = config.train.precision == "bf16"
    memory = held(
        sizes.groups,
        frozen=sizes.frozen,
        teacher=sizes.teacher,
        stage=stage,
        ranks=ranks,
        accumulation=max(share // micro, 1),
        bf16=bf16,
        moments=config.optim.moments,
    )
    # Batches that wait, the one that is computed, and the one that is being produced.
    memory = replace(memory, input=(config.data.prefetch + 2) * share * sizes.views)
    if stage and config.train.offload == "cpu":
        memory = memory.offloaded(stage=stage, accumulation=max(share // micro, 1))
    return memory, max(sizes.live.of(micro) - memory.rounded, 0.0)  # already included above


def advice(config: Config, sizes: Sizes, ranks: int, capacity: float) -> str:
    """Recommendation, in one sentence."""
    for stage in (1, 2, 3):
        memory, live = needed(config, sizes, stage, ranks)
        if memory.total + live <= capacity:
            taken = f"{(memory.total + live) / 1e9:.1f} of {capacity / 1e9:.0f} GB"
            return f"Choose train.zero_stage={stage}: {taken} on each of {ranks} GPUs."
    share = max(config.train.global_batch_size // ranks, 1)
    micro = min(config.train.micro_batch_size or share, share)
    while micro > 1:
        micro = max(divisor for divisor in range(1, micro // 2 + 1) if share % divisor == 0)
        smaller = config.replace(train=config.train.model_copy(update={"micro_batch_size": micro}))
        for stage in (2, 3):
            memory, live = needed(smaller, sizes, stage, ranks)
            if memory.total + live <= capacity:
                return (
                    f"Choose train.zero_stage={stage} and train.micro_batch_size={micro}: {(memory.total + live) / 1e9:.1f} GB; "
                    "or use activation checkpointing, or more GPUs."
                )
    memory, _ = needed(config, sizes, 3, ranks)
    enough = next((r for r in (2**n for n in range(20)) if r > ranks and needed(config, sizes, 3, r)[0].total < capacity), None)
    more = f"{enough} GPUs with train.zero_stage=3 hold the states" if enough else "no number of such GPUs holds it"
    if config.train.offload == "none" and config.optim.name == "adamw":
        more += f"; train.offload=cpu takes {(memory.masters + memory.moments) / 1e9:.1f} GB of them to host memory"
    return f"Does not fit: without activations it is {memory.total / 1e9:.1f} GB at stage 3 on {ranks} GPUs; {more}."


def ranks_of(config: Config, ranks: int | None) -> int:
    """Number of GPUs: as given, as configured, as many as this machine has, or one."""
    return ranks or config.launch.num_processes or gpus() or 1


def run(config: Config, sizes: Sizes, *, ranks: int, gigabytes: float, console: Terminal | None = None) -> int:
    """Print the table and the recommendation; returns 0 if something fits, 1 if nothing does.

    Args:
        config: the settings.
        sizes: as :func:`measure` returns them.
        ranks: GPUs.
        gigabytes: memory of one.
        console: the terminal.

    Raises:
        ConfigError: the global batch cannot be divided among the GPUs.
    """
    out = console or Terminal()
    if config.train.global_batch_size % ranks:
        raise ConfigError(
            f"{config.train.global_batch_size} samples are not divisible by {ranks} GPUs",
            where="train.global_batch_size",
            hint="Choose another --gpus",
        )
    capacity = gigabytes * 1e9 * _SLACK
    parts = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in sizes.networks.items())
    out.print(f"Student {sizes.trained / 1e6:.1f} M parameters ({parts}); teacher {sum(sizes.teacher) / 1e6:.1f} M, in fp32.")
    table = Table(
        title=f"GB on one GPU; {config.train.global_batch_size} samples a step, compute in {config.train.precision}",
        box=SIMPLE,
        padding=(0, 1, 0, 0),  # eleven columns in a terminal of 80 characters
    )
    for name in ("GPUs", "ZeRO", "weights", "grads", "optim.", "teacher", "DALI", "buff.", "activ.", "all", "fits"):
        table.add_column(name, justify="right")
    fits = False
    counts = sorted({ranks, *(r for r in (1, 2, 4, 8, 64, 256) if r < ranks and config.train.global_batch_size % r == 0)})
    for count in counts:
        for stage in range(4):
            memory, live = needed(config, sizes, stage, count)
            good = memory.total + live <= capacity
            fits |= good and count == ranks
            row = (
                memory.parameters + memory.frozen,
                memory.gradients,
                memory.masters + memory.moments,
                memory.teacher,
                memory.input,
                memory.buckets + memory.gathered + memory.rounded,
                live,
                memory.total + live,
            )
            table.add_row(str(count), str(stage), *(f"{size / 1e9:.2f}" for size in row), "yes" if good else "no")
        table.add_section()
    out.print(table)
    memory, live = needed(config, sizes, config.train.zero_stage, ranks)
    share = memory.teacher / (memory.total + live)
    out.print(f"The teacher takes {share:.0%} of a GPU's memory at train.zero_stage={config.train.zero_stage} on {ranks} GPUs.")
    if config.train.offload == "cpu" and config.train.zero_stage:
        out.print(f"Host memory: {memory.host / 1e9:.2f} GB for each GPU, for AdamW (train.offload=cpu).")
    out.print(advice(config, sizes, ranks, capacity))
    out.print(
        f"Weights, gradients, optimizer and teacher are exact to a few percent; activations are counted, buffers a bound; "
        f"DALI is its finished batches (data.prefetch={config.data.prefetch}), without what its decoder needs to work in; "
        f"{math.floor(_SLACK * 100)} % of {gigabytes:g} GB counts as usable.",
        style="dim",
    )
    return 0 if fits else 1


@dataclass(frozen=True)
class Bill:
    """Time and cost of a run.

    Attributes:
        steps: optimizer steps.
        samples: samples of the whole run.
        gflop: GFLOP per sample, a mean over the run.
        rate: samples per second of all GPUs together.
        hours: duration of the run.
        gpu_hours: of all GPUs.
        price: in the profile's currency, ``None`` if it has no price.
        gigabytes: read from storage, ``None`` if the size of a sample is not known.
        epoch: samples per epoch, ``None`` if no setting needs them.
    """

    steps: int
    samples: int
    gflop: float
    rate: float
    hours: float
    gpu_hours: float
    price: float | None
    gigabytes: float | None
    epoch: int | None = None


def bill(config: Config, site: ClusterProfile, *, ranks: int, efficiency: float, samples: int | None) -> Bill:
    """Estimate time and cost of a run.

    Args:
        config: the settings.
        site: the cluster, with the peak FLOPS of its GPUs.
        ranks: GPUs.
        efficiency: assumed share of that peak that a step reaches; not measured here.
        samples: samples per epoch; ``None`` counts those of the shards if the duration, or the interval of checkpoints or
            snapshots or of a stage of the curriculum, is in epochs.

    Raises:
        ConfigError: the profile has no peak.
    """
    if site.gpu_tflops is None:
        raise ConfigError(
            "the GPU's peak throughput is unknown",
            where="gpu_tflops of the cluster profile",
            hint="Set it in TFLOP/s, such as 989 for an H100",
        )
    length, size = config.train.duration, None
    stages = (stage.until for stage in config.method.views.curriculum)
    lengths = (length, config.checkpoint.every, config.checkpoint.snapshot_every, *stages)
    if samples is None and any(one is not None and one.unit == "epochs" for one in lengths):
        from pipeline.data.indexing import indexed

        manifest = indexed(config, config.data.patterns)
        samples, size = manifest.total, int(manifest.shards.sizes.sum()) / max(manifest.total, 1)
    steps = length.steps(samples or 0, config.train.global_batch_size)
    total_samples = steps * config.train.global_batch_size
    flop = counted_run(config, samples or 0)
    rate = ranks * site.gpu_tflops * 1e12 * efficiency / flop
    hours = total_samples / rate / 3600
    price = None if site.gpu_hour_price is None else hours * ranks * site.gpu_hour_price
    volume = None if size is None else size * total_samples / 1e9
    return Bill(steps, total_samples, flop / 1e9, rate, hours, hours * ranks, price, volume, samples)


def cost(
    config: Config, site: ClusterProfile, *, ranks: int, efficiency: float, samples: int | None, console: Terminal | None = None
) -> Bill | None:
    """Print :func:`bill` with its assumptions; ``None``, and a line that says why, without a peak."""
    out = console or Terminal()
    if site.gpu_tflops is None:
        what = "its nodes have no GPUs" if not site.gpus_per_node else "it has no gpu_tflops (989 for an H100)"
        out.print(f"Hours and cost are not estimated from this profile: {what}.", style="dim")
        return None
    b = bill(config, site, ranks=ranks, efficiency=efficiency, samples=samples)
    attempts = max(math.ceil(b.hours * 3600 / site.seconds), 1)
    out.print(
        f"{b.steps:,} steps of {config.train.global_batch_size:,}, {b.samples:,} samples at {b.gflop:,.1f} GFLOP: about "
        f"{b.rate:,.0f} samples/s on {ranks} GPUs, {b.hours:,.1f} hours, {b.gpu_hours:,.0f} GPU-hours"
        + ("" if b.price is None else f", {b.price:,.0f} in the profile's currency")
        + ("" if b.gigabytes is None else f"; {b.gigabytes:,.0f} GB read where no node keeps its shards")
        + "."
    )
    out.print(
        f"Assumes {efficiency:.0%} of {site.gpu_tflops:,.0f} TFLOP/s (--efficiency), no waiting for data or machines. "
        f"At {site.time} a job that is {attempts} attempt{'s' * (attempts > 1)}."
        + ("" if b.price is not None else " With gpu_hour_price in the profile it also says what that costs."),
        style="dim",
    )
    return b
