"""Curation on sets whose truth is known: near-duplicates, leaks, balance, and what a network learns from a selection.

The network that embeds is trained here too: SimCLR on the set itself for duplicates, CLIP on other scenes for balance.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.bench.curation_sets import KINDS, kind_of, original_of, write_leak, write_resaved, write_scenes
from pipeline.bench.methods import fovea, train
from pipeline.bench.reproduction.agreement import interval
from pipeline.data.curation.balance import BalanceOptions, balance
from pipeline.data.curation.dedup import DedupOptions, dedup
from pipeline.data.curation.kmeans import default_levels
from pipeline.data.curation.outcome import Outcome, write_outcome
from pipeline.data.curation.vectors import Vectors
from pipeline.data.embeddings.reader import Embeddings
from pipeline.data.pack import synthetic
from pipeline.errors import FoveaError

STAGES = ("duplicates", "photographs", "leak", "balance", "learning", "scale")
THRESHOLDS = (0.9, 0.95, 0.97, 0.98, 0.99)
CHOSEN = 0.97  # looked up on the page of seed 0's pairs
LEVELS = (400, 15)  # of clusters, chosen on seeds 0 to 2 of eight
_ORIGINALS, _COPIES = 2800, 0.3
_SIMCLR, _CLIP, _DINOV2 = 60_000, 160_000, 20_000  # samples
_DIM = 384
_COLUMNS = {
    "duplicates": ("set", "threshold", "removed copies", "lost originals", *KINDS),
    "photographs": ("set", "threshold", "removed copies", "lost originals"),
    "leak": ("set", "threshold", "detected copies", "other samples removed"),
    "balance": ("set", "levels", "coarse", "mode", "skew before", "skew in an epoch", "samples"),
    "learning": ("set", "trained on", "k-NN (k=20)"),
    "scale": ("embeddings", "clusters", "CPU seconds", "seconds", "peak memory, GB", "disk, GB"),
}
_TITLES = {
    "duplicates": f"""## Near-duplicates in scenes

{_COPIES:.0%} of the samples are altered copies; the classes have a skew of 50 to 1. SimCLR is trained on the set itself, on
{_SIMCLR} samples. The threshold {CHOSEN:g} was chosen on the page of seed 0's pairs. The last columns: copies of each kind whose
group was reduced to one sample.""",
    "photographs": """## Photographs that were saved again

JPEG quality 20 to 90; SimCLR is trained on them.""",
    "leak": """## Evaluation images among training images

`fovea shards dedup --only-against`; the copies are altered as those of the scenes.""",
    "balance": f"""## Balanced sampling

Embedded by CLIP, trained on {_CLIP} samples of other scenes. The skew is that of the most to the least frequent class.""",
    "learning": f"""## What is learned from a selection

DINOv2 (`dinov2/scenes_vit_tiny`) with {_DINOV2} samples, of all samples or of a selection: deduplicated at {CHOSEN:g}, then
balanced with weights. The voters and the 1 000 queries are other scenes with ten classes of equal size. The last row has the mean
difference over seeds with its 95 % interval.""",
    "scale": """## Memory and time

Deduplication of synthetic embeddings in fp16 with two probes. Peak memory of the process.""",
}


@dataclass(frozen=True)
class CurationResult:
    """One row of a table.

    Attributes:
        stage: the table.
        row: cells by column.
        failed: error of a failed measurement.
    """

    stage: str
    row: dict[str, str] = field(default_factory=dict)
    failed: str = ""


@dataclass(frozen=True)
class Folders:
    """Folders of the benchmark.

    Attributes:
        directory: where sets, runs and embeddings are written; what is there is used again.
        photos: folder of photographs.
        cifar: folder of CIFAR-10's shards.
    """

    directory: Path
    photos: Path | None = None
    cifar: Path | None = None


def measure(
    stages: Sequence[str], folders: Folders, *, seeds: Sequence[int], sizes: Sequence[int], samples: int | None = None
) -> Iterator[CurationResult]:
    """Measures the stages one after the other.

    Args:
        stages: of :data:`STAGES`.
        folders: where sets, runs and results are.
        seeds: of the sets of duplicates and of balance.
        sizes: numbers of synthetic embeddings of the stage ``scale``.
        samples: samples that networks are trained with, instead of the usual numbers.
    """
    work: dict[str, Callable[[], Iterator[CurationResult]]] = {
        "duplicates": lambda: _duplicates(folders, seeds, samples or _SIMCLR),
        "photographs": lambda: _photographs(folders, samples or _SIMCLR),
        "leak": lambda: _leak(folders, samples or _SIMCLR),
        "balance": lambda: _balance(folders, seeds, samples or _CLIP),
        "learning": lambda: _learning(folders, seeds, samples),
        "scale": lambda: _scale(folders.directory, sizes),
    }
    for stage in stages:
        try:
            yield from work[stage]()
        except FoveaError as error:
            yield CurationResult(stage, failed=str(error))


def _quiet(stage: str, done: int, total: int) -> None:
    pass


def _embedded(folders: Folders, run: Path, shards: str, name: str) -> Vectors:
    folder = folders.directory / name
    if not (folder / "embeddings.json").exists():
        fovea(["embed", str(run), shards, "--out", str(folder), f"data.index={folders.directory / 'index'}"])
    return Vectors.of(Embeddings.open(folder))


def _network(folders: Folders, config: str, name: str, shards: str, samples: int, *settings: str) -> Path:
    run = folders.directory / name
    common = [f"data.index={folders.directory / 'index'}", "tracking.enabled=false", "launch.num_processes=1"]
    duration = [f"train.duration={samples} samples", "evaluation.knn.enabled=false"]
    train(config, run, [f"data.shards={shards}", *common, *duration, *settings])
    return run


def _duplicates(folders: Folders, seeds: Sequence[int], samples: int) -> Iterator[CurationResult]:
    for seed in seeds:
        vectors = _scenes(folders, seed, samples)
        for threshold in THRESHOLDS:
            outcome = _deduplicated(vectors, threshold, folders.directory / f"work-{seed}-{threshold}")
            truth = _truth(vectors, outcome)
            by_kind = {kind: _percent(truth.removed_of[kind]) for kind in KINDS}
            cells = {"set": f"scenes, seed {seed}", "threshold": f"{threshold:g}", **by_kind}
            yield CurationResult("duplicates", {**cells, **truth.cells()})


def _scenes(folders: Folders, seed: int, samples: int) -> Vectors:
    """Scenes with planted copies, embedded by SimCLR that is trained on them."""
    folder = folders.directory / f"scenes-{seed}"
    if not list(folder.glob("val-*.tar")):
        write_scenes(folder, _ORIGINALS, _COPIES, seed)
    shards = f"{folder}/raw-*.tar"
    run = _network(folders, "simclr/cifar10_small", f"simclr-{seed}", shards, samples, f"run.seed={seed}")
    return _embedded(folders, run, shards, f"scenes-{seed}-embedded")


def _photographs(folders: Folders, samples: int) -> Iterator[CurationResult]:
    if folders.photos is None:
        yield CurationResult("photographs", failed="no folder of photographs: --photos")
        return
    files = sorted(path for path in folders.photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    folder = folders.directory / "photographs"
    if not list(folder.glob("raw-*.tar")):
        write_resaved(folder, files, 5, 0)
    shards = f"{folder}/raw-*.tar"
    run = _network(folders, "simclr/cifar10_small", "simclr-photographs", shards, samples)
    vectors = _embedded(folders, run, shards, "photographs-embedded")
    for threshold in THRESHOLDS:
        truth = _truth(vectors, _deduplicated(vectors, threshold, folders.directory / f"work-photographs-{threshold}"))
        cells = {"set": f"{len(files)} photographs, each with 5 copies", "threshold": f"{threshold:g}"}
        yield CurationResult("photographs", {**cells, **truth.cells()})


def _leak(folders: Folders, samples: int) -> Iterator[CurationResult]:
    """Hides altered copies of validation images among training images, and looks for them with the validation set."""
    if folders.cifar is None:
        yield CurationResult("leak", failed="no folder of CIFAR-10 shards: --cifar")
        return
    folder = folders.directory / "leak"
    if not list(folder.glob("val-*.tar")):
        write_leak(folder, folders.cifar, 0)
    run = _network(folders, "simclr/cifar10_small", "simclr-leak", f"{folder}/raw-*.tar", samples)
    vectors = _embedded(folders, run, f"{folder}/raw-*.tar", "leak-embedded")
    other = _embedded(folders, run, f"{folder}/val-*.tar", "leak-val-embedded")
    copies = np.array([str(key).startswith("copy") for key in vectors.column("key")])
    for threshold in THRESHOLDS:
        options = DedupOptions(threshold, threshold, within=False)
        outcome = dedup(vectors, options, folders.directory / f"work-leak-{threshold}", against=[other], progress=_quiet)
        assert outcome is not None
        removed = outcome.weights == 0
        yield CurationResult(
            "leak",
            {
                "set": f"CIFAR-10, {int(copies.sum())} copies of {other.total} validation images among {vectors.total}",
                "threshold": f"{threshold:g}",
                "detected copies": _percent(float(removed[copies].mean())),
                "other samples removed": _percent(float(removed[~copies].mean())),
            },
        )


def _balance(folders: Folders, seeds: Sequence[int], samples: int) -> Iterator[CurationResult]:
    run = _clip(folders, samples)
    for seed in seeds:
        folder = folders.directory / f"scenes-{seed}"
        if not list(folder.glob("val-*.tar")):
            write_scenes(folder, _ORIGINALS, _COPIES, seed)
        vectors = _embedded(folders, run, f"{folder}/raw-*.tar", f"scenes-{seed}-clip")
        labels = vectors.column("label")
        before = np.bincount(labels)
        for levels, coarse, mode, target, most in (
            (LEVELS, "linkage", "subset", 300, 1.0),
            (LEVELS, "linkage", "weights", 1000, 4.0),
            (default_levels(vectors.total), "auto", "weights", 1000, 4.0),
            (LEVELS, "kmeans", "weights", 1000, 4.0),
            ((200, 50, 10), "kmeans", "weights", 1000, 4.0),
            ((200,), "kmeans", "weights", 1000, 4.0),
        ):
            options = BalanceOptions(levels, target, mode, most, seed, coarse)  # type: ignore[arg-type]
            outcome = balance(vectors, options, folders.directory / f"work-balance-{seed}-{levels[0]}", progress=_quiet)
            assert outcome is not None
            after = np.bincount(labels, weights=outcome.weights, minlength=len(before))
            yield CurationResult(
                "balance",
                {
                    "set": f"scenes, seed {seed}",
                    "levels": ", ".join(map(str, levels)),
                    "coarse": coarse if len(levels) > 1 else "",
                    "mode": mode,
                    "skew before": f"{before.max() / before.min():.1f}",
                    "skew in an epoch": f"{after.max() / max(after.min(), 1e-9):.1f}",
                    "samples": f"{outcome.counts['kept']} of {vectors.total}",
                },
            )


def _clip(folders: Folders, samples: int) -> Path:
    pretrain = folders.directory / "pretrain"
    synthetic.write(pretrain, train=8000, val=1000, seed=1234)
    return _network(folders, "clip/scenes", "clip", f"{pretrain}/*train-*.tar", samples)


def _learning(folders: Folders, seeds: Sequence[int], samples: int | None) -> Iterator[CurationResult]:
    """Trains DINOv2 on all samples and on a selection of them, for the same number of steps."""
    clip = _clip(folders, samples or _CLIP)
    pretrain, gains = folders.directory / "pretrain", []
    for seed in seeds:
        vectors = _scenes(folders, seed, samples or _SIMCLR)
        unique = _deduplicated(vectors, CHOSEN, folders.directory / f"work-{seed}-{CHOSEN}")
        by_clip = _embedded(folders, clip, f"{folders.directory / f'scenes-{seed}'}/raw-*.tar", f"scenes-{seed}-clip")
        options = BalanceOptions(LEVELS, 1000, "weights", 4.0, seed)
        work = folders.directory / f"work-balance-{seed}"
        chosen = balance(by_clip, options, work, among=unique.weights, progress=_quiet)
        assert chosen is not None
        file = folders.directory / f"balanced-{seed}.parquet"
        write_outcome(file, chosen, by_clip, {"command": "fovea bench curation"})
        scores = []
        for name, settings in (("all samples", ()), ("the selection", (f"data.selection={file}",))):
            run = folders.directory / f"dinov2-{seed}-{name.split()[-1]}"
            shards = f"{folders.directory / f'scenes-{seed}'}/raw-*.tar"
            common = [f"data.shards={shards}", f"data.index={folders.directory / 'index'}", "evaluation.knn.every=100000 steps"]
            knn = [f"evaluation.knn.train_shards={pretrain}/*train-*.tar", f"evaluation.knn.val_shards={pretrain}/*val-*.tar"]
            length = [f"train.duration={samples or _DINOV2} samples", "schedule.lr.warmup=30 steps"]
            fixed = ["tracking.enabled=false", "launch.num_processes=1", f"run.seed={seed}", "checkpoint.every=100000 steps"]
            outcome = train("dinov2/scenes_vit_tiny", run, [*common, *knn, *length, *fixed, *settings])
            scores.append(float(outcome["scores"]["knn/k20"]))
            yield CurationResult("learning", {"set": f"seed {seed}", "trained on": name, "k-NN (k=20)": _percent(scores[-1])})
        gains.append(scores[1] - scores[0])
    if len(gains) > 1:
        gain = interval(gains)
        text = f"{100 * gain.mean:+.1f} ± {100 * (gain.half or 0.0):.1f} points"
        yield CurationResult("learning", {"set": f"{len(gains)} seeds", "trained on": "difference", "k-NN (k=20)": text})


def _scale(directory: Path, sizes: Sequence[int]) -> Iterator[CurationResult]:
    """Deduplicates synthetic embeddings in a process of its own, whose peak memory is measured."""
    for size in sizes:
        folder = directory / f"vectors-{size}"
        code = "import sys; from pipeline.bench.curation import deduplicate_synthetic as f; f(sys.argv[1], int(sys.argv[2]))"
        done = subprocess.run([sys.executable, "-c", code, str(folder), str(size)], capture_output=True, text=True, check=False)
        if done.returncode:
            last = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
            yield CurationResult("scale", failed=last)
            continue
        facts = json.loads(done.stdout.splitlines()[-1])
        yield CurationResult(
            "scale",
            {
                "embeddings": f"{size:,} x {_DIM}".replace(",", " "),
                "clusters": str(facts["clusters"]),
                "CPU seconds": f"{facts['cpu']:.0f}",
                "seconds": f"{facts['seconds']:.0f}",
                "peak memory, GB": f"{facts['peak'] / 1e9:.2f}",
                "disk, GB": f"{facts['disk'] / 1e9:.2f}",
            },
        )


def deduplicate_synthetic(folder: str, size: int) -> None:
    """Writes random embeddings if they are not there, deduplicates them, and prints what it cost as JSON.

    Args:
        folder: for the embeddings.
        size: their number.
    """
    vectors = _synthetic(Path(folder), size)
    work = Path(f"{folder}.work")
    begun, cpu = time.monotonic(), time.process_time()
    outcome = dedup(vectors, DedupOptions(0.95, probes=2), work, progress=_quiet)
    assert outcome is not None
    facts = {
        "clusters": max(1, size // 4096),
        "cpu": time.process_time() - cpu,
        "seconds": time.monotonic() - begun,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "disk": sum(path.stat().st_size for path in work.rglob("*") if path.is_file()),
        "kept": outcome.counts["kept"],
    }
    for path in sorted(work.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    work.rmdir()
    print(json.dumps(facts))


def _synthetic(folder: Path, size: int) -> Vectors:
    """Vectors around a thousand centers, one in ten a near-copy of another."""
    from pipeline.data.embeddings.document import EmbeddingSpec
    from pipeline.data.embeddings.reader import finish, write_shard

    if (folder / "embeddings.json").exists():
        return Vectors.of(Embeddings.open(folder, verify=False))
    spec, done, per_shard = EmbeddingSpec("cls", _DIM, "float16"), [], 10_000
    centers = np.random.default_rng(0).normal(size=(1000, _DIM)).astype(np.float32)
    for number in range(-(-size // per_shard)):
        draw, n = np.random.default_rng([1, number]), min(per_shard, size - number * per_shard)
        values = centers[draw.integers(0, 1000, n)] + draw.normal(size=(n, _DIM)).astype(np.float32)
        copies = n // 10
        values[n - copies :] = values[:copies] + 0.05 * draw.normal(size=(copies, _DIM)).astype(np.float32)
        filled = np.full(n, 256, dtype=np.int32)
        columns = {
            "key": [f"{number * per_shard + row:010d}" for row in range(n)],
            "shard": np.full(n, number, dtype=np.int32),
            "row": np.arange(n, dtype=np.int32),
            "embedding": values,
            "width": filled,
            "height": filled,
            "label": np.full(n, -1),
            "caption_bytes": 0 * filled,
            "image_bytes": filled,
            "digest": draw.integers(0, 256, (n, 16), dtype=np.uint8),
        }
        url, digest = f"/synthetic/{number:06d}.tar", f"{number:032x}"
        done.append(write_shard(folder, spec, number, columns, url=url, digest=digest, samples=n))
    return Vectors.of(finish(folder, spec, "0" * 32, done))


def _deduplicated(vectors: Vectors, threshold: float, work: Path) -> Outcome:
    outcome = dedup(vectors, DedupOptions(threshold), work, progress=_quiet)
    assert outcome is not None
    return outcome


@dataclass(frozen=True)
class _Truth:
    """How a selection compares with what was planted.

    Attributes:
        removed: fraction of the superfluous samples that were removed.
        lost: fraction of the originals of which no sample is left.
        removed_of: fraction of the copies of each kind whose group was reduced to one.
    """

    removed: float
    lost: float
    removed_of: dict[str, float]

    def cells(self) -> dict[str, str]:
        return {"removed copies": _percent(self.removed), "lost originals": _percent(self.lost)}


def _truth(vectors: Vectors, outcome: Outcome) -> _Truth:
    keys = [str(key) for key in vectors.column("key")]
    originals = np.array([original_of(key) for key in keys])
    kept = outcome.weights > 0
    sizes, left = np.bincount(originals), np.bincount(originals, weights=kept)
    superfluous = np.maximum(sizes - 1, 0)
    removed = np.minimum(sizes - left, superfluous)
    kinds = np.array([kind_of(key) for key in keys])
    reduced = left[originals] <= 1
    by_kind = {kind: float(reduced[kinds == kind].mean()) if (kinds == kind).any() else 1.0 for kind in KINDS}
    return _Truth(float(removed.sum() / superfluous.sum()), float((left == 0)[sizes > 0].mean()), by_kind)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def line(result: CurationResult) -> str:
    """One line of a log."""
    cells = ", ".join(f"{name} {value}" for name, value in result.row.items())
    return f"{result.stage}: {result.failed or cells}"


def markdown(results: Sequence[CurationResult], machine: Mapping[str, str], command: str) -> str:
    """The page."""
    parts: list[str] = []
    for stage in dict.fromkeys(result.stage for result in results):
        own = [result for result in results if result.stage == stage]
        head = _COLUMNS[stage]
        rows = [[result.row.get(name, "") for name in head] for result in own if not result.failed]
        table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] if rows else []
        if stage == "scale":
            table += _growth([result.row for result in own if not result.failed])
        parts += [_TITLES[stage], "", *table, "", *(line(result) for result in own if result.failed), ""]
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join(["# Curation", "", *parts, f"`{command}`", "", about, ""])


def _growth(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """What the last two sizes let expect of a billion embeddings; nothing for fewer sizes."""
    if len(rows) < 2:
        return []
    sizes = [int(row["embeddings"].partition("x")[0].replace(" ", "")) for row in rows[-2:]]
    (cpu, more_cpu), (memory, more_memory), (_, disk) = (
        [float(row[name]) for row in rows[-2:]] for name in ("CPU seconds", "peak memory, GB", "disk, GB")
    )
    power = math.log(more_cpu / cpu) / math.log(sizes[1] / sizes[0])
    times = 1e9 / sizes[1]
    per_million = (more_memory - memory) / (sizes[1] - sizes[0]) * 1e6
    hours, held = more_cpu * times**power / 3600, more_memory + per_million * (1e9 - sizes[1]) / 1e6
    return [
        "",
        f"Between the last two sizes CPU time grows with the exponent {power:.2f}, memory by {per_million:.2f} GB for a million. "
        f"On paper, a billion embeddings take {hours:,.0f} CPU hours, {disk * times / 1000:.1f} TB of disk and {held:,.0f} GB of "
        "memory.",
    ]
