"""Benchmarks the CPU time per image of the data pipeline against torchvision's DataLoader and DALI's own reader.

All paths make DINOv2's views of the same images in the same process, in turns over several rounds, and the best round of each
counts: unlike wall time, CPU time hardly depends on the load of the host.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image, ImageOps

from pipeline.bench import baselines
from pipeline.bench.machine import cpu_seconds
from pipeline.data import storage
from pipeline.data.augment.dali import Augmenter, Hue
from pipeline.data.augment.decode import Decoder
from pipeline.data.augment.plan import make_plan
from pipeline.data.index.build import build
from pipeline.data.index.manifest import Manifest
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset, portions
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from pipeline.data.pack.shard_writer import ShardWriter
from pipeline.data.pack.synthetic import render
from pipeline.errors import DataError

SIZE = (500, 375)
_PER_SHARD = 128
_SEED = 0
_FEEDING = ("read", "plan", "hand over")  # stages besides decoding and augmenting
_STAGES = ("read", "plan", "decode", "augment", "hand over")


@dataclass(frozen=True)
class Options:
    """Options of the benchmark.

    Attributes:
        shards: patterns of WebDataset shards; if empty, images are packed for the benchmark.
        photos: folder of photographs to pack; ``None`` for synthetic scenes.
        images: images that each path processes per round.
        rounds: number of rounds, of which the best counts.
        batch: images per micro-batch.
        threads: of the decoder and of DALI.
        workers: processes of torchvision's DataLoader; ours reads in the measured process.
        world: ranks that share a global batch of ``world * batch``; the first one is measured.
    """

    shards: tuple[str, ...] = ()
    photos: Path | None = None
    images: int = 512
    rounds: int = 3
    batch: int = 32
    threads: int = 1
    workers: int = 0
    world: int = 1


@dataclass
class Result:
    """Results.

    Attributes:
        options: as requested, with a description of the images.
        milliseconds: CPU milliseconds per image, by path, one for each round.
        stages: of our path without hue, by stage.
        rates: on a GPU, images per second and shares, by measurement.
    """

    options: dict[str, Any]
    milliseconds: dict[str, list[float]] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def best(self, path: str) -> float:
        """The fastest round of a path, ms per image."""
        return min(self.milliseconds[path])


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Run all paths on the CPU.

    Args:
        options: options of the benchmark.
        log: called with a description of each stage.

    Raises:
        DataError: there are no shards or images, or too few.
    """
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fovea-bench-")))
        manifest, about = prepare(options, folder)
        o, steps = options, max(options.images // options.batch, 1)
        result = Result(
            {**{k: str(v) for k, v in vars(options).items() if k not in ("shards", "photos")}, "images packed": about}
        )
        paths: dict[str, Callable[[], float]] = {}
        for label, hue in (("", False), (", hue", True)):
            for kind in ("classic", "v2"):
                paths[f"torchvision {kind}{label}"] = _pull(
                    baselines.torchvision_batches(manifest, batch=o.batch, hue=hue, kind=kind, workers=o.workers), steps
                )
            paths[f"DALI's reader{label}"] = _pull(
                baselines.dali_batches(manifest, folder, batch=o.batch, hue=hue, threads=o.threads), steps
            )
        for hue_kind in get_args(Hue):
            paths[f"fovea, hue {hue_kind}"] = partial(_ours, manifest, o, hue_kind, steps)
        for number in range(o.rounds):
            for name, run in paths.items():
                log(f"round {number + 1} of {o.rounds}: {name}")
                result.milliseconds.setdefault(name, []).append(run() / (steps * o.batch) * 1000)
        log("time by stage")
        result.stages = _stages(manifest, o, steps)
        return result


def prepare(options: Options, folder: Path) -> tuple[Manifest, str]:
    """The index of the shards to measure on, packed into ``folder`` if none are given, and a short description."""
    if options.shards:
        urls, about = storage.expand(list(options.shards)), "of the shards " + " ".join(options.shards)
    else:
        images, about = _images(options)
        with ShardWriter(folder / "shards", "bench", samples_per_shard=_PER_SHARD) as writer:
            for number, data in enumerate(images):
                sample = {"__key__": f"{number:06d}", "jpg": data, "txt": f"image {number}", "cls": number % 10}
                writer.write({**sample, "json": {"number": number}})
        urls = list(writer.shards)
    manifest = build(urls, folder / "index")
    if manifest.total < options.batch * options.world:
        raise DataError(
            f"{manifest.total} images are fewer than a batch of {options.batch * options.world}",
            where="fovea bench data",
            hint="Add shards, or reduce --batch",
        )
    return manifest, about


def _images(options: Options) -> tuple[Iterator[bytes], str]:
    about = f"{options.images} JPEGs of {SIZE[0]}x{SIZE[1]}, quality 90, "
    if options.photos is None:
        return (_jpeg(Image.fromarray(render(_SEED, n, SIZE[0]).image)) for n in range(options.images)), about + "drawn scenes"
    files = sorted(path for path in options.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise DataError("must contain .jpg, .jpeg or .png files", where=str(options.photos), hint="Choose another folder")

    def made() -> Iterator[bytes]:
        for number in range(options.images):
            with Image.open(files[number % len(files)]) as image:
                rgb = image.convert("RGB")
                yield _jpeg(ImageOps.mirror(rgb) if number // len(files) % 2 else rgb)

    return made(), about + f"from {len(files)} photographs"


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    ImageOps.fit(image, SIZE).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _pull(batches: Iterator[Any], steps: int) -> Callable[[], float]:
    """CPU seconds of the next ``steps`` batches; the first call runs one more before, as warm-up."""
    warm: list[bool] = []

    def run() -> float:
        if not warm:
            next(batches)
            warm.append(True)
        begin = cpu_seconds()
        for _ in islice(batches, steps):
            pass
        return cpu_seconds() - begin

    return run


def dataset(manifest: Manifest, options: Options) -> StepDataset:
    """The data set of our stream, with the order and views of training."""
    order = Order(manifest.sizes, _SEED, options.batch * options.world)
    reader = Reader(manifest, wants=("image", "label", "caption"))
    return StepDataset(reader, order, baselines.specs(), seed=_SEED, world=options.world, rank=0)


def _ours(manifest: Manifest, options: Options, hue: Hue, steps: int) -> float:
    """CPU seconds of ``steps`` batches of the stream used in training."""
    stream = BatchStream(
        dataset(manifest, options),
        device=torch.device("cpu"),
        options=StreamOptions(micro_batch=options.batch, workers=0, threads=options.threads, prefetch=1, hue=hue),
        bad_samples=BadSamples(None),
        first=0,
        last=steps,
    )
    begin = cpu_seconds()
    for _ in stream:
        pass
    return cpu_seconds() - begin


def _stages(manifest: Manifest, options: Options, steps: int) -> dict[str, float]:
    """CPU milliseconds per image by stage, the minimum over the rounds; the last one is read by a worker process."""
    best = dict.fromkeys(_STAGES, float("inf"))
    for _ in range(options.rounds):
        for stage, seconds in {**_serial(manifest, options, steps), "hand over": _loader(manifest, options, steps)}.items():
            best[stage] = min(best[stage], seconds / (steps * options.batch) * 1000)
    best["hand over"] = max(best["hand over"] - best["read"] - best["plan"], 0.0)
    return best


def _serial(manifest: Manifest, options: Options, steps: int) -> dict[str, float]:
    source = dataset(manifest, options)
    decoder = Decoder(threads=options.threads)
    augmenter = Augmenter(source.specs, batch_size=options.batch, threads=options.threads, hue="off")
    spent = dict.fromkeys(_STAGES[:-1], 0.0)
    for step in range(steps):
        marks = [time.process_time()]
        chosen = source.order.rank_batch(step, options.world, 0)
        records = source.reader.fetch(chosen.ids)
        marks.append(time.process_time())
        sizes = np.array([(record.height, record.width) for record in records], dtype=np.int64)
        plan = make_plan(source.specs, ids=chosen.ids, epochs=chosen.epochs, sizes=sizes, seed=_SEED)
        marks.append(time.process_time())
        images = decoder.decode([record.image or b"" for record in records])
        marks.append(time.process_time())
        augmenter.run(images, plan)
        marks.append(time.process_time())
        for stage, low, high in zip(spent, marks[:-1], marks[1:], strict=True):
            spent[stage] += high - low
    return spent


def _loader(manifest: Manifest, options: Options, steps: int) -> float:
    """CPU seconds in all processes to read and plan ``steps`` steps and hand them to the training process."""
    many = 8 * steps  # one step takes at most a clock tick
    source = portions(dataset(manifest, options), first=0, last=None, workers=1, prefetch=2)
    for _ in islice(source, 8):
        pass
    begin = cpu_seconds()
    for _ in islice(source, many):
        pass
    seconds = cpu_seconds() - begin
    source.close()  # type: ignore[attr-defined]
    return seconds / 8


def rows(result: Result) -> list[tuple[str, float, Sequence[str]]]:
    """The table: path, ms per image, and the cost of each baseline at the same task relative to it."""
    table: list[tuple[str, float, Sequence[str]]] = []
    for name in result.milliseconds:
        with_hue = "hue" in name and not name.endswith("off")
        suffix = ", hue" if with_hue else ""
        torchvision = min(result.best(f"torchvision {kind}{suffix}") for kind in ("classic", "v2"))
        ratios = [f"{other / result.best(name):.2f}" for other in (torchvision, result.best(f"DALI's reader{suffix}"))]
        table.append((name, result.best(name), ratios))
    return table


def markdown(result: Result, machine: dict[str, str], command: str) -> str:
    """Render the result page: description, host, the table, and the time by stage."""
    lines = ["# CPU time per image of the data path", ""]
    lines += [f"`{command}`", "", *(f"- {name}: {value}" for name, value in {**machine, **result.options}.items())]
    if result.milliseconds:
        lines += [
            "",
            "Views of DINOv2 (2 of 224 and 8 of 96 pixels). Ratios compare equal tasks: hue with hue, none with none.",
            "",
        ]
        lines += ["| path | CPU ms per image | torchvision takes | DALI's reader takes |", "|---|---:|---:|---:|"]
        lines += [f"| {name} | {cost:.2f} | {ratios[0]} times | {ratios[1]} times |" for name, cost, ratios in rows(result)]
    if result.stages:
        total = sum(result.stages.values())
        feeding = sum(result.stages.get(stage, 0.0) for stage in _FEEDING)
        lines += ["", "Ours without hue, by stage:", "", "| stage | CPU ms per image | share |", "|---|---:|---:|"]
        lines += [f"| {stage} | {cost:.3f} | {cost / total:.1%} |" for stage, cost in result.stages.items()]
        lines += ["", f"Reading and feeding ({', '.join(_FEEDING)}) take {feeding / total:.1%}."]
    if result.rates:
        lines += ["", "| on the GPU | |", "|---|---:|", *(f"| {name} | {rate:,.2f} |" for name, rate in result.rates.items())]
    return "\n".join(lines) + "\n"
