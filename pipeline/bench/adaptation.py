"""Adaptation to a shifted domain: ways to continue training, beside training from nothing, with several seeds.

One network is pretrained on synthetic scenes. Each way then trains with the same samples of the shifted domain, and k-NN is
measured on held-out images of both domains, with voters of the same domain. The start is the pretrained network itself.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.bench.methods import fovea, train
from pipeline.data.pack.shifts import Shift
from pipeline.data.pack.synthetic import write
from pipeline.errors import FoveaError

REPLAY = "and replay of old scenes"
WAYS: dict[str, tuple[str, ...]] = {
    "all of the tower": (),
    "and preservation": ("adapt.preserve_cls=1", "adapt.preserve_patches=1"),
    REPLAY: (),
    "and L2 to the start": ("adapt.l2_to_start=10",),
    "the last block": ("adapt={train: last_blocks, last_blocks: 1}",),
    "adapters of rank 4": ("adapt={train: lora, lora: {rank: 4, alpha: 8.0}}",),
}
NOTHING = "from nothing"
ALL_WAYS = (*WAYS, NOTHING)
_PRETRAINED = 27_000  # samples
_PRETRAIN_SEED, _DATA_SEED = 0, 1
_K = "knn/k20"
_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class AdaptationResult:
    """Result of one run.

    Attributes:
        shift: the new domain.
        way: how it was trained.
        seed: of the run.
        new, old: k-NN accuracy on the new and on the old domain, 0 to 1.
        new_start, old_start: of the pretrained network.
        halfway: new and old at the middle of the straight line from start to result; ``None`` for training from nothing.
        failed: error of a failed run.
    """

    shift: str
    way: str
    seed: int
    new: float = math.nan
    old: float = math.nan
    new_start: float = math.nan
    old_start: float = math.nan
    halfway: tuple[float, float] | None = None
    failed: str = ""


def measure(
    shifts: Sequence[Shift],
    *,
    seeds: Sequence[int],
    samples: int,
    images: int,
    ranks: int,
    directory: Path,
    ways: Sequence[str] = ALL_WAYS,
) -> Iterator[AdaptationResult]:
    """Pretrain, then train in every way in every domain, seed by seed; runs that have ended are not repeated.

    Args:
        shifts: the new domains.
        seeds: of the runs.
        samples: samples of each run.
        images: training images of each domain.
        ranks: ranks of each run.
        directory: where runs and shards are written.
        ways: names, of :data:`ALL_WAYS`.
    """
    write(directory / "scenes", train=8000, val=1000)
    start = directory / "start"
    pretraining = [
        f"data.shards={directory / 'scenes'}/*train-*.tar",
        f"train.duration={_PRETRAINED} samples",
        f"run.seed={_PRETRAIN_SEED}",
        "schedule.lr.warmup=50 steps",
        "checkpoint.every=100 steps",
        *_common(ranks),
    ]
    train("dinov2/scenes_vit_tiny", start, pretraining)
    write(directory / "none", train=images, val=1000, seed=_DATA_SEED)
    for shift in shifts:
        write(directory / shift, train=images, val=1000, seed=_DATA_SEED, shift=shift)
    for seed in seeds:
        for shift in shifts:
            for way in ways:
                folder = directory / f"{shift}-{way.replace(' ', '_')}-{seed}"
                try:
                    yield _one(shift, way, seed, folder, start, directory, samples, ranks)
                except FoveaError as error:
                    yield AdaptationResult(shift, way, seed, failed=str(error))


def _common(ranks: int) -> list[str]:
    return ["tracking.enabled=false", f"launch.num_processes={ranks}", "evaluation.knn.every=100000 steps"]


def _one(
    shift: str, way: str, seed: int, folder: Path, start: Path, directory: Path, samples: int, ranks: int
) -> AdaptationResult:
    shards = f"{directory / shift}/*train-*.tar"
    settings = [f"train.duration={samples} samples", f"run.seed={seed}", "evaluation.knn.max_train=null", *_common(ranks)]
    if way == NOTHING:
        train("dinov2/scenes_vit_tiny", folder, [f"data.shards={shards}", "checkpoint.every=100 steps", *settings])
    else:
        replay = ["--replay", f"{directory / 'scenes'}/*train-*.tar"] if way == REPLAY else []
        fovea(["adapt", shards, "--from", str(start), "--to", str(folder), *replay, *settings, *WAYS[way]])
    scores = {name: _scores(folder, directory / name, start=way != NOTHING) for name in (shift, "none")}
    new, old = scores[shift], scores["none"]
    middle = f"between/0.50/{_K}"
    return AdaptationResult(
        shift,
        way,
        seed,
        new=new[_K],
        old=old[_K],
        new_start=new.get(f"between/0.00/{_K}", math.nan),
        old_start=old.get(f"between/0.00/{_K}", math.nan),
        halfway=(new[middle], old[middle]) if middle in new else None,
    )


def _scores(run: Path, shards: Path, *, start: bool) -> dict[str, float]:
    """Scores with voters and queries of one domain."""
    file = run / f"scores-{shards.name}.json"
    data = [f"evaluation.knn.train_shards={shards}/*train-*.tar", f"evaluation.knn.val_shards={shards}/*val-*.tar"]
    points = ["--between", "0,0.5,1"] if start else []
    fovea(["eval", str(run), "--knn", *points, "--output", str(file), *data])
    scores: dict[str, float] = json.loads(file.read_text())["scores"]
    return scores


def line(result: AdaptationResult) -> str:
    """One line of a log."""
    name = f"{result.shift}, {result.way}, seed {result.seed}"
    return f"{name}: {result.failed}" if result.failed else f"{name}: new {result.new:.3f}, old {result.old:.3f}"


def markdown(results: Sequence[AdaptationResult], machine: Mapping[str, str], command: str) -> str:
    """The page: means over seeds with 95 % intervals, in percent."""
    rows = []
    for shift in dict.fromkeys(result.shift for result in results):
        of_shift = [result for result in results if result.shift == shift and not result.failed]
        begun = next((result for result in of_shift if not math.isnan(result.new_start)), None)
        if begun is not None:
            rows.append([shift, "the start", _percent([begun.new_start]), _percent([begun.old_start]), "", ""])
        for way in dict.fromkeys(result.way for result in of_shift):
            own = [result for result in of_shift if result.way == way]
            half = [result.halfway for result in own if result.halfway is not None]
            cells = [_percent([r.new for r in own]), _percent([r.old for r in own])]
            rows.append([shift, way, *cells, _percent([h[0] for h in half]), _percent([h[1] for h in half])])
    head = ["domain", "trained", "new", "old", "halfway: new", "old"]
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    failed = [line(result) for result in results if result.failed]
    about = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = (
        "k-NN (k=20) in percent on 1 000 held-out images of the new and of the old domain, means over seeds with 95 % intervals "
        "of Student's t; *halfway* has the mean of the weights of start and result."
    )
    return "\n".join(["# Adaptation to a shifted domain", "", text, "", *table, "", *failed, f"`{command}`", "", about, ""])


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * _T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"
