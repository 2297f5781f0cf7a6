"""Benchmarks decoding and augmentation on a GPU: throughput, load of the JPEG engine, and the slowdown of training.

Measures wall time, since there is no other measure of a GPU's work; run it on an otherwise idle host.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from nvidia import nvimgcodec

from pipeline.bench import baselines
from pipeline.bench.data import Options, Result, dataset, prepare
from pipeline.data.augment.dali import Augmenter, Hue
from pipeline.data.augment.decode import Decoder
from pipeline.data.augment.plan import make_plan
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.errors import ConfigError

_HARDWARE_LOADS = (0.0, 0.65, 1.0)
_DEVICE = torch.device("cuda", 0)
_SIDE = 8192  # of the matrices whose product stands for training


def measure(options: Options, *, log: Callable[[str], None] = lambda _: None) -> Result:
    """Measure every stage alone and the whole pipeline, on the first CUDA device.

    Raises:
        ConfigError: there is no CUDA device.
        DataError: there are no shards or images, or too few.
    """
    if not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available", where="--device", hint="Choose cpu")
    with tempfile.TemporaryDirectory(prefix="fovea-bench-") as folder:
        manifest, about = prepare(options, Path(folder))
        steps = max(options.images // options.batch, 1)
        result = Result({"device": torch.cuda.get_device_name(0), "batch": str(options.batch), "images packed": about})
        rates = result.rates

        def note(name: str, run: Callable[[], Any]) -> None:
            log(name)
            run()
            times = [_seconds(run) for _ in range(options.rounds)]
            rates[f"{name}, images per second"] = steps * options.batch / min(times)

        ours = dataset(manifest, options)
        records = [ours.reader.fetch(ours.order.rank_batch(step, options.world, 0).ids) for step in range(steps)]
        encoded = [[record.image or b"" for record in batch] for batch in records]
        for load in _HARDWARE_LOADS:
            decoder = _decoder(load, options.threads)
            note(f"nvImageCodec, JPEG engine {load:.0%}", partial(_each, decoder.decode, encoded))
            inside = baselines.dali_batches(
                manifest, Path(folder), batch=options.batch, hue=True, threads=options.threads, device_id=0, hw_load=load
            )
            note(f"DALI's reader, decoder and views, JPEG engine {load:.0%}", partial(_pull, inside, steps))
        own = Decoder(threads=options.threads, device_id=0)
        note("our decoder", partial(_each, own.decode, encoded))
        images = own.decode(encoded[0])
        sizes = np.array([(record.height, record.width) for record in records[0]], dtype=np.int64)
        ids = np.array([record.id for record in records[0]], dtype=np.uint64)
        plan = make_plan(ours.specs, ids=ids, epochs=np.zeros(len(ids), dtype=np.int64), sizes=sizes, seed=0)
        for hue in get_args(Hue):
            augmenter = Augmenter(ours.specs, batch_size=options.batch, threads=options.threads, device_id=0, hue=hue)
            note(f"our views, hue {hue}", partial(_each, partial(augmenter.run, images), [plan] * steps))
            note(f"our stream, hue {hue}", partial(_drain, ours, options, steps, hue))
        log("slowdown of training by the data stream")
        alone = _products(3.0)
        stop = threading.Event()
        feeder = threading.Thread(target=_feed_until, args=(ours, options, stop), daemon=True)
        feeder.start()
        beside = _products(3.0)
        stop.set()
        feeder.join(timeout=60)
        rates["share of the GPU that the stream takes at full speed"] = 1 - beside / alone
        return result


def _each(do: Callable[[Any], Any], items: list[Any]) -> None:
    for item in items:
        do(item)


def _pull(batches: Iterator[Any], steps: int) -> None:
    for _ in islice(batches, steps):
        pass


def _seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _decoder(load: float, threads: int) -> Any:
    kinds = nvimgcodec.BackendKind
    engine = [nvimgcodec.Backend(kinds.HW_GPU_ONLY, load_hint=load)] if load > 0 else []
    others = [nvimgcodec.Backend(kind) for kind in (kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU, kinds.CPU_ONLY)]
    return nvimgcodec.Decoder(
        device_id=0, max_num_cpu_threads=threads, backends=[*engine, *others], options=":fancy_upsampling=1"
    )


def _stream(ours: Any, options: Options, last: int | None, hue: Any) -> BatchStream:
    return BatchStream(
        ours,
        device=_DEVICE,
        options=StreamOptions(micro_batch=options.batch, workers=max(options.workers, 1), threads=options.threads, hue=hue),
        bad_samples=BadSamples(None),
        first=0,
        last=last,
    )


def _drain(ours: Any, options: Options, steps: int, hue: Any) -> None:
    for _ in _stream(ours, options, steps, hue):
        pass


def _feed_until(ours: Any, options: Options, stop: threading.Event) -> None:
    torch.cuda.set_device(_DEVICE)
    for _ in _stream(ours, options, None, "yiq"):
        if stop.is_set():
            return


def _products(seconds: float) -> float:
    """Matrix products per second, as a load similar to training."""
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    begin, done = time.perf_counter(), 0
    for done in count(1):
        torch.mm(a, b)
        if done % 8 == 0:
            torch.cuda.synchronize()
            if time.perf_counter() - begin > seconds:
                break
    return done / (time.perf_counter() - begin)
