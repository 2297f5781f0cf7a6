"""fovea beside lightly: the same network, views, rates, batches and samples, compared by k-NN during training and by CPU time.

The peer is a plain loop of lightly's modules (:mod:`pipeline.bench.peer_probe`) on a folder of the same images. Learning is
compared over seeds; time by the difference between two lengths of run without evaluation, so that starts do not count.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.bench.collapse_ablation import read_journal
from pipeline.bench.methods import train
from pipeline.bench.probes import run_probe
from pipeline.bench.reproduction.agreement import interval, quantile
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.data.storage.patterns import expand
from pipeline.errors import ConfigError, FoveaError, TrainingError
from pipeline.evaluation.results import baseline_metric
from pipeline.runtime.interpreter import alone_environment

METHODS = ("simclr", "byol", "mocov2", "dino")
SIDES = ("fovea", "lightly")
INSTALL = "Run pip install --no-deps lightly lightly-utils"
_PROBE = Path(__file__).with_name("peer_probe.py")
_POINTS = 8  # comparisons in a run
_LIMIT = 6 * 3600.0  # seconds for one run


@dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
        shards: pattern of labelled training shards, ``val-*.tar`` beside them; 8-bit images of the config's size.
        directory: of runs and images; what has ended in it is not repeated.
        seeds: number of seeds.
        epochs: length of a run; ``None`` for the config's.
        steps: lengths of the two runs between which CPU time is compared.
        rounds: of them.
    """

    shards: str
    directory: Path
    seeds: int = 3
    epochs: float | None = None
    steps: tuple[int, int] = (20, 80)
    rounds: int = 3


@dataclass(frozen=True)
class PeerResult:
    """One run of one side, or one comparison of time.

    Attributes:
        method: its name.
        side: ``fovea`` or ``lightly``.
        seed: of the run; of a comparison of time its round.
        batch: samples of a step.
        knn: accuracy in 0..1 by samples seen; empty for a comparison of time.
        cpu: CPU seconds per 1000 samples; NaN for a run that was compared by k-NN.
        failed: error of a failed run.
    """

    method: str
    side: str
    seed: int
    batch: int = 0
    knn: Mapping[int, float] = field(default_factory=dict)
    cpu: float = math.nan
    failed: str = ""


def measure(methods: Sequence[str], options: Options) -> Iterator[PeerResult]:
    """Run both sides of each method in turns.

    Raises:
        ConfigError: lightly is not installed.
    """
    if find_spec("lightly") is None:
        raise ConfigError("lightly is not installed", where="fovea bench peers", hint=INSTALL)
    _write_images(options)
    for method in methods:
        for at in range(options.rounds):
            for side in SIDES:
                yield _timed(method, side, at, options)
        for seed in range(options.seeds):
            for side in SIDES:
                yield _learned(method, side, seed, options)


def _config(method: str, options: Options) -> tuple[str, list[str], Config]:
    name = f"{method}/cifar10_small"
    settings = [f"data.shards={json.dumps(options.shards)}"]
    if options.epochs is not None:
        settings += [f"train.duration={options.epochs:g} epochs", f"schedule.lr.warmup={options.epochs / 10:g} epochs"]
    return name, settings, load(name, settings).config


def _learned(method: str, side: str, seed: int, options: Options) -> PeerResult:
    name, settings, config = _config(method, options)
    images = _count(options.directory / "images" / "train")
    batch = config.train.global_batch_size
    steps = config.train.duration.steps(images, batch)
    every = math.ceil(steps / _POINTS)
    kept = options.directory / f"{method}-{side}-{seed}.json"
    try:
        if kept.exists():
            knn = {int(samples): value for samples, value in json.loads(kept.read_text()).items()}
        else:
            if side == "fovea":
                knn = _ours(name, [*settings, *_every(every, steps)], seed, kept.with_suffix(""), batch)
            else:
                knn = _theirs(name, settings, steps, every, seed, options)["knn"]
            kept.write_text(json.dumps(knn))
    except FoveaError as error:
        return PeerResult(method, side, seed, batch, failed=str(error))
    return PeerResult(method, side, seed, batch, {int(samples): value for samples, value in knn.items()})


def _every(every: int, steps: int) -> list[str]:
    return [f"evaluation.knn.every={every} steps", f"checkpoint.every={steps} steps", "tracking.enabled=false"]


def _ours(name: str, settings: Sequence[str], seed: int, directory: Path, batch: int) -> dict[int, float]:
    outcome = train(name, directory, [*settings, f"run.seed={seed}"])
    logged, _ = read_journal(directory)
    metric = max((each for each in logged if each.startswith("knn/k")), key=lambda each: int(each.removeprefix("knn/k")))
    points = {0: outcome["scores"][baseline_metric("random_init", metric)]}
    return points | {step * batch: value for step, value in sorted(logged[metric].items())}


def _theirs(name: str, settings: Sequence[str], steps: int, every: int, seed: int, options: Options) -> dict[str, Any]:
    """Result of the probe.

    Raises:
        TrainingError: it failed.
    """
    request = {"config": name, "settings": list(settings), "folder": str(options.directory / "images"), "steps": steps}
    argv = [sys.executable, str(_PROBE), json.dumps(request | {"every": every, "seed": seed})]
    environment = alone_environment()
    done = run_probe(argv, environment, limit=_LIMIT, what=f"lightly's {name}", where="fovea bench peers")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise TrainingError(f"lightly's {name}: {last}", where="fovea bench peers", hint="Run the probe alone to see its output")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def _timed(method: str, side: str, at: int, options: Options) -> PeerResult:
    """CPU seconds per 1000 samples, from the difference of two lengths."""
    name, settings, config = _config(method, options)
    batch = config.train.global_batch_size
    costs = []
    try:
        for steps in options.steps:
            before = _children()
            short = [*settings, f"train.duration={steps} steps", "schedule.lr.warmup=1 steps"]
            if side == "fovea":
                folder = options.directory / f"time-{method}-{at}-{steps}"
                quiet = ["evaluation.knn.enabled=false", f"checkpoint.every={steps} steps", "tracking.enabled=false"]
                train(name, folder, [*short, *quiet])
            else:
                _theirs(name, short, steps, 0, at, options)
            costs.append(_children() - before)
    except FoveaError as error:
        return PeerResult(method, side, at, batch, failed=str(error))
    samples = (options.steps[1] - options.steps[0]) * batch
    return PeerResult(method, side, at, batch, cpu=1000 * (costs[1] - costs[0]) / samples)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _write_images(options: Options) -> None:
    """Write the images of the shards to ``images/PART/CLASS/``, once."""
    done = options.directory / "images" / "complete"
    if done.exists():
        return
    shards = [Path(path) for path in expand(options.shards)]
    validation = sorted(shards[0].parent.glob("val-*.tar"))
    for part, files in (("train", shards), ("val", validation)):
        for file in files:
            _unpack(file, options.directory / "images" / part)
    done.touch()


def _unpack(shard: Path, folder: Path) -> None:
    """Images of a shard, by the number of their class, under their position: names in the archive decide nothing."""
    labels, images = {}, {}
    with tarfile.open(shard) as archive:
        for member in archive:
            stem, _, suffix = PurePosixPath(member.name).name.partition(".")
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None and suffix == "cls":
                labels[stem] = int(content.read())
            elif content is not None and suffix in ("jpg", "jpeg", "png"):
                images[stem] = (suffix, content.read())
    for number, (stem, (suffix, data)) in enumerate(images.items()):
        if stem in labels:
            target = folder / str(labels[stem])
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{shard.stem}-{number:06d}.{suffix}").write_bytes(data)


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*/*"))


def line(result: PeerResult) -> str:
    """One line of a log."""
    name = f"{result.method}, {result.side}, {result.seed}"
    if result.failed:
        return f"{name}: {result.failed}"
    if not result.knn:
        return f"{name}: {result.cpu:.2f} CPU s for 1000 samples"
    return f"{name}: k-NN {result.knn[max(result.knn)]:.3f} after {max(result.knn)} samples"


def markdown(results: Sequence[PeerResult], machine: Mapping[str, str], command: str) -> str:
    """The page."""
    lines = ["# Beside lightly", "", f"`{command}`", "", *(f"- {name}: {value}" for name, value in machine.items()), ""]
    lines += [
        "A plain loop of lightly's heads, losses, momentum updates and transforms, with backbone, rates, schedules, batch and "
        "samples of a config of fovea; both on one thread, in bf16 where the config says so. k-NN of held-out images, means over "
        "seeds with 95 % intervals of Student's t; *within* says whether the last difference is less than two standard errors "
        "below 0. lightly passes each view alone through SimCLR's network, fovea both together, as the paper does.",
        "",
        "## k-NN after training",
        "",
        "| method | samples | untrained | fovea | lightly | difference | within | seeds |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    methods = list(dict.fromkeys(result.method for result in results))
    for method in methods:
        ours, theirs = (_of(results, method, side) for side in SIDES)
        if ours and theirs:
            lines.append(_row(method, ours, theirs))
    lines += ["", "## k-NN by samples seen, percent", ""]
    for method in methods:
        for side in SIDES:
            if of_side := _of(results, method, side):
                points = sorted(set.intersection(*(set(result.knn) for result in of_side)))
                values = (f"{at:,}: {100 * sum(r.knn[at] for r in of_side) / len(of_side):.1f}" for at in points)
                lines.append(f"- {method}, {side}: {' · '.join(values)}")
    lines += ["", "## CPU seconds for 1000 samples", "", "Decoding, views and the step; the least of the rounds.", ""]
    lines += ["| method | batch | fovea | lightly | ratio |", "|---|---:|---:|---:|---:|"]
    for method in methods:
        least = {side: _least(results, method, side) for side in SIDES}
        if all(math.isfinite(value) for value in least.values()):
            batch = next(result.batch for result in results if result.method == method)
            cells = f"{least['fovea']:.2f} | {least['lightly']:.2f} | {least['fovea'] / least['lightly']:.2f}"
            lines.append(f"| {method} | {batch} | {cells} |")
    failed = [f"- {line(result)}" for result in results if result.failed]
    return "\n".join([*lines, *(["", *failed] if failed else []), ""])


def _of(results: Sequence[PeerResult], method: str, side: str) -> list[PeerResult]:
    return [r for r in results if r.method == method and r.side == side and r.knn]


def _least(results: Sequence[PeerResult], method: str, side: str) -> float:
    costs = [r.cpu for r in results if r.method == method and r.side == side and math.isfinite(r.cpu)]
    return min(costs, default=math.nan)


def _row(method: str, ours: Sequence[PeerResult], theirs: Sequence[PeerResult]) -> str:
    last = [[r.knn[max(r.knn)] for r in side] for side in (ours, theirs)]
    untrained = [r.knn[0] for r in ours if 0 in r.knn]
    means = [interval(values) for values in last]
    difference, error = difference_of(*last)
    half = f" ± {100 * quantile(len(last[0]) + len(last[1]) - 2) * error:.1f}" if math.isfinite(error) else ""
    within = "undecided" if not math.isfinite(error) else "yes" if difference >= -2 * error else "no"
    begun = f"{100 * sum(untrained) / len(untrained):.1f} %" if untrained else ""
    cells = [method, f"{max(ours[0].knn):,}", begun, *(mean.percent() for mean in means), f"{100 * difference:+.1f}{half}"]
    return "| " + " | ".join([*cells, within, str(min(len(values) for values in last))]) + " |"


def difference_of(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Difference of two means and its standard error with the pooled standard deviation; NaN for single values."""
    difference = sum(a) / len(a) - sum(b) / len(b)
    degrees = len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return difference, math.nan
    squares = sum(sum((x - sum(values) / len(values)) ** 2 for x in values) for values in (a, b))
    return difference, math.sqrt(squares / degrees * (1 / len(a) + 1 / len(b)))
