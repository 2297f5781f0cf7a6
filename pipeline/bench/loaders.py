"""Benchmarks the loader as a library against webdataset, MosaicML Streaming, Hugging Face datasets and torchvision folders.

All read the same images, each measurement in a process of its own, the loaders in turns over several rounds, of which the best
counts. CPU time is measured: unlike wall time, it hardly depends on the load of the host.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bench.loader_peers import PEERS, convert
from pipeline.errors import ConfigError

_PATIENCE = 120.0  # seconds
_HINT = "pip install 'fovea[peers]'"


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        images: number of images; a multiple of twice the batch.
        batch: samples of a step.
        rounds: rounds, of which the best counts.
        photos: folder of photographs to pack; ``None`` for synthetic scenes.
    """

    images: int = 512
    batch: int = 32
    rounds: int = 3
    photos: Path | None = None


@dataclass
class Measured:
    """Results of one loader; ``None`` where a measurement failed.

    Attributes:
        skipped: why it was not measured; empty if it was.
        raw, decoded: samples per CPU second, of each round.
        start, resume: CPU seconds to the first decoded batch, at the start and in the middle of an epoch, of each round.
        rank, worker: memory that the loader adds to a rank's process, and private memory of a worker, MB.
        once, resumed, ranks, elastic: whether each sample comes once an epoch; whether the samples after a resume are those of an
            undisturbed epoch; whether two ranks have the global batches of one; whether an epoch can be ended on two.
        errors: messages of failed measurements.
    """

    skipped: str = ""
    raw: list[float] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    resume: list[float] = field(default_factory=list)
    rank: float | None = None
    worker: float | None = None
    once: str = ""
    resumed: str = ""
    ranks: str = ""
    elastic: str = ""
    errors: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """Results.

    Attributes:
        images: description of the images.
        versions: version of each package.
        loaders: results by loader.
    """

    images: str
    versions: dict[str, str]
    loaders: dict[str, Measured]


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Packs the images, converts them, and runs every loader that is installed.

    Args:
        options: options of the benchmark.
        log: called with a description of each stage.

    Raises:
        ConfigError: the number of images does not fit the batch.
    """
    from pipeline.bench.data import Options as Images
    from pipeline.bench.data import prepare

    if options.images % (2 * options.batch) or options.batch % 2:
        raise ConfigError(
            f"{options.images} images are not a multiple of twice the batch of {options.batch}",
            where="fovea bench loaders",
            hint="Choose --images 512 --batch 32",
        )
    with tempfile.TemporaryDirectory(prefix="fovea-bench-") as name:
        folder = Path(name)
        manifest, about = prepare(Images(photos=options.photos, images=options.images, batch=options.batch), folder)
        shards = [shard.url for shard in manifest.shards]
        log("converting")
        convert(shards, folder)
        setup = {"shards": shards, "folder": name, "batch": options.batch}
        result = Result(about, _versions(), {peer: Measured() for peer in PEERS})
        for peer, measured in result.loaders.items():
            if not PEERS[peer].installed():
                measured.skipped = f"not installed ({_HINT})"
        there = {peer: measured for peer, measured in result.loaders.items() if not measured.skipped}
        for number in range(options.rounds):
            for peer, measured in there.items():
                log(f"round {number + 1} of {options.rounds}: {peer}")
                _round(peer, setup, measured, options.images // 2)
        for peer, measured in there.items():
            log(f"memory and samples: {peer}")
            _properties(peer, setup, measured, options)
        return result


def _round(peer: str, setup: dict[str, Any], measured: Measured, half: int) -> None:
    for kind in ("raw", "decoded"):
        one = _probe({"mode": "throughput", "peer": peer, "setup": setup, "decoded": kind == "decoded"}, measured)
        if one is not None:
            getattr(measured, kind).append(one["samples"] / one["cpu"])
            if kind == "raw":
                measured.rank = max(measured.rank or 0.0, one["memory"])
    if (one := _probe({"mode": "start", "peer": peer, "setup": setup}, measured)) is not None:
        measured.start.append(one["cpu"])
    before = _probe({"mode": "keys", "peer": peer, "setup": setup, "count": half}, measured)
    if before is not None:
        one = _probe({"mode": "start", "peer": peer, "setup": setup, "state": before["state"]}, measured)
        if one is not None:
            measured.resume.append(one["cpu"])


def _properties(peer: str, setup: dict[str, Any], measured: Measured, options: Options) -> None:
    """Memory of a worker, and what the samples are; see :class:`Measured`."""
    if (one := _probe({"mode": "worker", "peer": peer, "setup": setup}, measured)) is not None:
        measured.worker = one["memory"]
    ask = {"mode": "keys", "peer": peer, "setup": setup}
    epoch, first = _probe(ask, measured), _probe({**ask, "count": options.images // 2}, measured)
    if epoch is None or first is None:
        return
    order, half = epoch["keys"], options.images // 2
    every = set(order)
    measured.once = "yes" if len(order) == options.images == len(every) else _account(Counter(order), options.images)
    rest = _probe({**ask, "state": first["state"]}, measured)
    if rest is not None:
        same = first["keys"] + rest["keys"] == order
        measured.resumed = "yes" if same else _account(Counter(first["keys"] + rest["keys"]), options.images, "other order")
    two = _two({**ask}, measured)
    if two is not None:
        share = options.batch // 2
        batches = [{*two[0][at : at + share], *two[1][at : at + share]} for at in range(0, len(two[0]), share)]
        expected = [set(order[at : at + options.batch]) for at in range(0, len(order), options.batch)]
        measured.ranks = "yes" if batches == expected else _account(Counter(two[0] + two[1]), options.images, "other batches")
    two = _two({**ask, "state": first["state"]}, measured)
    if two is not None:
        together = Counter(first["keys"] + two[0] + two[1])
        good = len(together) == options.images == together.total()
        measured.elastic = "yes" if good and set(first["keys"]) == set(order[:half]) else _account(together, options.images)


def _account(counts: Counter[str], images: int, fine: str = "other samples") -> str:
    """What is wrong with the samples of an epoch: how many are missing, and how many came more than once."""
    lost, twice = images - len(counts), sum(count > 1 for count in counts.values())
    return f"no: {lost} missing, {twice} twice" if lost or twice else f"no: {fine}"


def _two(request: dict[str, Any], measured: Measured) -> list[list[str]] | None:
    """The keys of two ranks that run at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        setup = {**request["setup"], "rank": rank, "world": 2}
        environment = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in ranks.items()}}
        processes.append(_process({**request, "setup": setup}, environment))
    answers = [_answer(process, {**request, "mode": "two ranks"}, measured) for process in processes]
    return None if None in answers else [answer["keys"] for answer in answers if answer is not None]


def _probe(request: dict[str, Any], measured: Measured) -> dict[str, Any] | None:
    return _answer(_process(request, {}), request, measured)


def _process(request: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(request["setup"]["folder"]) / "hf"), "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.bench.loader_probe", json.dumps(request)],
        env={**kept, **quiet, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str], request: dict[str, Any], measured: Measured) -> dict[str, Any] | None:
    try:
        output, errors = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        measured.errors[request["mode"]] = f"did not end within {_PATIENCE:.0f} s"
        return None
    try:
        answer: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        lines = errors.strip().splitlines() or ["no output"]
        measured.errors[request["mode"]] = lines[-1][:300]
        return None
    return answer


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("webdataset", "mosaicml-streaming", "datasets", "torchvision", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def markdown(result: Result, options: Options, machine: dict[str, str], command: str) -> str:
    """The page.

    Args:
        result: what was measured.
        options: how.
        machine: of :func:`pipeline.bench.machine.describe`.
        command: the command line.
    """
    there = {name: one for name, one in result.loaders.items() if not one.skipped}
    lines = [
        "# The loader as a library, beside its peers",
        "",
        f"`{command}`",
        "",
        f"{result.images}; steps of {options.batch}; best of {options.rounds} rounds; "
        + ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        "",
        ", ".join(f"{key}: {value}" for key, value in machine.items()),
        "",
        "## Cost",
        "",
        "One process without workers and one thread; images are decoded by Pillow in all. First batch: CPU seconds from an",
        "interpreter that has imported torch to the first decoded batch, with imports. Memory: what the loader adds to the",
        "process of a rank while it reads an epoch of bytes, and what one worker of a DataLoader has for itself.",
        "",
        "| | samples per CPU s, bytes | decoded | first batch, CPU s | mid-epoch, CPU s | rank, MB | worker, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {_best(one.raw, max, 0)} | {_best(one.decoded, max, 0)} | {_best(one.start, min, 2)} "
            f"| {_best(one.resume, min, 2)} | {_memory(one.rank)} | {_memory(one.worker)} |"
            for name, one in there.items()
        ),
        "",
        "## Samples",
        "",
        "Each sample once an epoch; after a resume in the middle of an epoch the samples of an undisturbed one, in order; the",
        "same global batches on two ranks as on one; an epoch begun on one rank and ended on two has each sample once. Where a",
        "loader has a shuffle buffer, it holds 1000 samples.",
        "",
        "| | resumes by | once | same after resume | same on two ranks | resumed on two ranks |",
        "|---|---|---|---|---|---|",
        *(
            f"| {name} | {PEERS[name].how} | {one.once or 'failed'} | {one.resumed or 'failed'} "
            f"| {one.ranks or 'failed'} | {one.elastic or 'failed'} |"
            for name, one in there.items()
        ),
        "",
        *(f"- {name} is left out: {one.skipped}" for name, one in result.loaders.items() if one.skipped),
        *(f"- {name}, {mode}: `{text}`" for name, one in there.items() for mode, text in one.errors.items()),
    ]
    return "\n".join([*lines, *_losses(there)]).rstrip() + "\n"


def _losses(there: dict[str, Measured]) -> list[str]:
    """Where another loader is better than ours."""
    ours, lines = there.get("fovea"), []
    if ours is None:
        return []
    columns: list[tuple[str, str, Callable[[Sequence[float]], float]]] = [
        ("raw", "samples as bytes per CPU second", max),
        ("decoded", "decoded samples per CPU second", max),
        ("start", "CPU seconds to the first batch", min),
        ("resume", "CPU seconds to the first batch after a resume", min),
    ]
    for key, text, best in columns:
        values = {name: best(getattr(one, key)) for name, one in there.items() if getattr(one, key)}
        if "fovea" in values:
            first = best(list(values.values()))
            ahead = [name for name, value in values.items() if best([value, values["fovea"]]) == value != values["fovea"]]
            if ahead:
                worse = max(first, values["fovea"]) / min(first, values["fovea"])
                lines.append(f"- {text}: {', '.join(ahead)}; the best is {worse:.2f} x better than ours")
    for key, text in (("rank", "memory of a rank"), ("worker", "memory of a worker")):
        value = getattr(ours, key)
        ahead = [name for name, one in there.items() if value and getattr(one, key) is not None and getattr(one, key) < value]
        if ahead:
            lines.append(f"- {text}: {', '.join(ahead)}")
    return ["", "## Where others are better", "", *lines] if lines else []


def _best(values: Sequence[float], best: Callable[[Sequence[float]], float], digits: int) -> str:
    return f"{best(values):,.{digits}f}" if values else "failed"


def _memory(value: float | None) -> str:
    return "failed" if value is None else f"{value:.0f}"
