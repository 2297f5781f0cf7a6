"""Benchmarks the signatures of steps: their time beside that of the step, and their bytes, in a real small training.

The run is a real one, of DINOv2 on synthetic scenes with data pipeline, engine, trainer and checkpoints; its signatures are timed
where the trainer takes and writes them. Both times are of the same steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.bench.plain import alone
from pipeline.config.load import load
from pipeline.data.augment.views import Batch
from pipeline.data.inputs import prepare
from pipeline.data.pack import synthetic
from pipeline.errors import ConfigError
from pipeline.methods.base import Step
from pipeline.runtime.process_group import World
from pipeline.runtime.run_directory import RunDirectory
from pipeline.runtime.stop_requests import StopRequests
from pipeline.runtime.watchdog import Watchdog
from pipeline.training.build import assemble
from pipeline.training.signature_file import STEP_BYTES
from pipeline.training.signatures import Signatures, Taken
from pipeline.training.trainer import Trainer

AIM = 0.002  # of a step's time
_WARM = 3
CONFIG = "dinov2/cifar10_vit_tiny"


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        steps: measured steps.
        batch: samples of a step.
        every: steps between two checkpoints, each of which adds digests of its tensors.
        workers: reader processes.
    """

    steps: int = 40
    batch: int = 64
    every: int = 20
    workers: int = 1


@dataclass(frozen=True)
class Result:
    """Seconds of wall time of each step, and in it of its signature; bytes of the file, with header and digests."""

    step: list[float]
    signature: list[float]
    size: int
    steps: int

    @property
    def share(self) -> float:
        """Time of a signature as a fraction of its step, quotient of medians."""
        return statistics.median(self.signature) / statistics.median(self.step)

    @property
    def bytes_per_step(self) -> float:
        """Bytes on disk of a step."""
        return self.size / self.steps


class _Timed(Signatures):
    """Signatures that note how long they take, and when."""

    def __init__(self, inner: Signatures) -> None:
        super().__init__(inner.file, inner.world)
        self.seconds: list[float] = []
        self.begins: list[float] = []

    def take(self, step: Step, batches: Sequence[Batch], terms: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Taken:
        """As the original."""
        begin = time.perf_counter()
        taken = super().take(step, batches, terms, norms)
        self.begins.append(begin)
        self.seconds.append(time.perf_counter() - begin)
        return taken

    def settle(self, taken: Taken, *, applied: bool, wait: bool = False) -> None:
        """As the original."""
        begin = time.perf_counter()
        super().settle(taken, applied=applied, wait=wait)
        self.seconds[-1] += time.perf_counter() - begin


class _NullLogger:
    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None: ...

    def log(self, text: str) -> None: ...


@contextmanager
def small_training(steps: int, batch: int, settings: Sequence[str]) -> Iterator[tuple[Trainer, RunDirectory]]:
    """Context of a training of DINOv2 on synthetic scenes, on one rank of one thread on the CPU: its trainer, and its directory.

    Args:
        steps: length.
        batch: samples of a step.
        settings: further ones, ``KEY=VALUE``.
    """
    threads = torch.get_num_threads()
    with alone() as folder:
        synthetic.write(folder / "scenes", train=4 * batch, val=8, size=32, seed=3)
        where = [f"data.shards={folder}/scenes/*train-*.tar", f"data.index={folder}/index", f"run.directory={folder}/run"]
        length = [f"train.global_batch_size={batch}", f"train.duration={steps} steps", "schedule.lr.warmup=0", "train.threads=1"]
        others = ["evaluation.knn.enabled=false", f"data.shuffle_block_size={batch}", "method.freeze_last_layer=0"]
        config = load(CONFIG, [*where, *length, *others, *settings]).config
        config = config.replace(evaluation=config.evaluation.only())
        world, run = World(0, 1, 0, torch.device("cpu"), None), RunDirectory(folder / "run")
        watchdog = Watchdog(run.logs(0), 0, 1)
        trainer = assemble(
            config,
            prepare(config, 1),
            world,
            run,
            attempt=0,
            resume=None,
            manifest_fields={"config": {}},
            requests=StopRequests(),
            journal=None,
            logger=_NullLogger(),
            watchdog=watchdog,
        )
        watchdog.start()
        try:
            yield trainer, run
        finally:
            watchdog.stop()
            torch.set_num_threads(threads)
        trainer.engine.close()


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Train on one rank on the CPU, with one thread.

    Raises:
        ConfigError: signatures are not recorded.
    """
    steps = _WARM + options.steps
    settings = [f"checkpoint.every={options.every} steps", f"data.num_workers={options.workers}"]
    with small_training(steps, options.batch, settings) as (trainer, run):
        if trainer.signatures is None:
            raise ConfigError("no signatures are recorded", where="train.signatures", hint="Set it to true")
        trainer.signatures = timed = _Timed(trainer.signatures)
        log(f"{steps} steps of {options.batch} samples")
        trainer.run()
        size = run.signatures(0, 0).stat().st_size
    ends = timed.begins[1:]
    durations = [end - begin for begin, end in zip(timed.begins, ends, strict=False)]
    return Result(durations[_WARM:], timed.seconds[_WARM:-1], size, steps)


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """Render the result page."""
    lines = ["# Signatures of steps", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items())]
    lines += [
        f"- {CONFIG} on synthetic scenes, {options.batch} samples, one rank of one thread, {options.steps} steps in one run"
    ]
    lines += ["", "| | median, ms | 90th percentile |", "|---|---:|---:|"]
    for name, values in (("step", result.step), ("signature", result.signature)):
        ordered = sorted(values)
        ninth = ordered[int(0.9 * (len(ordered) - 1))]
        lines.append(f"| {name} | {statistics.median(ordered) * 1e3:.3f} | {ninth * 1e3:.3f} |")
    time_text = "within" if result.share <= AIM else "above"
    size_text = "within" if result.bytes_per_step <= STEP_BYTES else "above"
    lines += [
        "",
        f"A signature takes {100 * result.share:.3f} % of its step, {time_text} the {100 * AIM:g} % targeted, and "
        f"{result.bytes_per_step:.0f} bytes on disk, {size_text} the {STEP_BYTES} targeted, with digests of a checkpoint every "
        f"{options.every} steps. Its time hardly depends on the model: steps shorter than "
        f"{statistics.median(result.signature) / AIM * 1e3:.0f} ms at this batch size would spend more.",
    ]
    return "\n".join(lines) + "\n"
