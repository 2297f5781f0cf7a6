"""One measurement of how the cost of an index grows, in a process of its own: ``python scale_probe.py NAME JSON``.

Runs with this version of fovea or, for a comparison in the same run, with an earlier one (``PYTHONPATH``), so it uses only what
both have, or asks which it is. Shards are sparse files; sidecars are written by the version that is measured.
"""

from __future__ import annotations

import importlib
import json
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_BYTES = 100_000  # of each sample in its shard


def main() -> None:
    """Run the named measurement and print its result as JSON."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(PROBES[name](**options)))


def _measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    io, cpu, wall = _read_bytes(), time.process_time(), time.perf_counter()
    result = work()
    return result, {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "read": _read_bytes() - io,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _manifest_module() -> Any:
    return importlib.import_module("pipeline.data.index.manifest")


def _is_old() -> bool:
    return hasattr(_manifest_module(), "sidecar_name")


def _index(url: str, rows: int) -> Any:
    """Index of a shard with made-up samples."""
    keys: Any = tuple(f"{n:09d}" for n in range(rows))
    module = _manifest_module()
    if _is_old():
        types, rules = module._COLUMNS, module.Fields
    else:
        module = importlib.import_module("pipeline.data.index.sidecar")
        types, rules, keys = module.COLUMNS, module.Fields, module.Keys.of(keys)
    from pipeline.data import storage

    about = storage.stat(url)
    columns = {name: np.zeros(rows, dtype) for name, dtype in types.items()}
    columns |= {"image_offset": np.arange(rows) * _BYTES, "image_size": np.full(rows, 2000)}
    columns |= {"width": np.full(rows, 224, np.int32), "height": np.full(rows, 224, np.int32), "format": np.ones(rows, np.uint8)}
    return module.ShardIndex(about.url, about.size, about.tag, rules(), "", {}, keys, columns)


def _make(folder: str, shards: int, rows: int) -> list[str]:
    """Sparse shards and their sidecars; those that are there are kept."""
    urls = []
    for number in range(shards):
        path = Path(folder) / f"{number:06d}.tar"
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(rows * _BYTES)
        urls.append(str(path))
    for url in urls:
        done = _directory(folder) / "made" / Path(url).name
        if not done.exists():
            index = _index(url, rows)
            index.save(_directory(folder) / (_manifest_module().sidecar_name(url) if _is_old() else f"sidecars/{index.sidecar}"))
            done.parent.mkdir(exist_ok=True)
            done.touch()
    return urls


def make(folder: str, shards: int, rows: int) -> dict[str, float]:
    """Write the files of the next measurement."""
    from pipeline.data.index.build import build

    return _measured(lambda: build(_make(folder, shards, rows), _directory(folder)))[1]


def _directory(folder: str) -> Path:
    return Path(folder) / ("old-index" if _is_old() else "index")


def start(folder: str, shards: int, rows: int, first: bool) -> dict[str, float]:
    """A finished index → the first batch of a rank of 8; ``first`` is the process that asks storage for the shards."""
    from pipeline.data.index.build import build
    from pipeline.data.index.manifest import Manifest
    from pipeline.data.order.order import Order

    urls = [str(Path(folder) / f"{number:06d}.tar") for number in range(shards)]
    directory = _directory(folder)

    batch = min(4096, shards * rows)

    def work() -> int:
        manifest = build(urls, directory) if first or _is_old() else Manifest.load(directory)
        return int(Order(manifest.sizes, 0, batch).rank_batch(0, 8, 0).ids[0])

    return _measured(work)[1]


def manifest(folder: str, shards: int) -> dict[str, float]:
    """Save and load a manifest of made-up shards, its fingerprint, what a data worker is sent, and memory."""
    module = _manifest_module()
    directory = Path(folder) / f"manifest-{shards}"
    directory.mkdir(exist_ok=True)
    if _is_old():
        made = [module.Manifest(str(directory), tuple(_shard(n, module.Shard) for n in range(shards)))]
    else:
        table = module.ShardTable.of((_shard(n, module.Shard) for n in range(shards)), module.Fields())
        made = [module.Manifest(str(directory), table)]
        del table
    _, saving = _measured(lambda: made[0].save(directory))
    made.clear()
    loaded, loading = _measured(lambda: module.Manifest.load(directory))
    _, again = _measured(lambda: loaded.fingerprint)
    sent, sending = _measured(lambda: pickle.dumps(loaded))
    return {
        "save": saving["cpu"],
        "load": loading["cpu"],
        "fingerprint": again["cpu"],
        "sent": len(sent),
        "send": sending["cpu"],
        "file": sum(file.stat().st_size for file in directory.iterdir()),
    }


def loaded(folder: str, shards: int) -> dict[str, float]:
    """Memory of a process that has a manifest of made-up shards, and draws a batch."""
    from pipeline.data.index.manifest import Manifest
    from pipeline.data.order.order import Order

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    manifest = Manifest.load(Path(folder) / f"manifest-{shards}")
    held = resident() - before
    _, cost = _measured(lambda: Order(manifest.sizes, 0, 4096).rank_batch(0, 8, 0))
    return {"held": held, "batch": cost["cpu"], "peak": cost["peak"]}


def _shard(number: int, kind: Callable[..., Any]) -> Any:
    return kind(
        url=f"s3://bucket/data/part-{number // 1000:04d}/{number:08d}.tar",
        size=800_000_000 + number,
        tag=f'"{number:032x}"',
        samples=10_000,
        classes=0,
        digest=f"{number:032x}",
        sidecar=f"{number:08d}.tar-0123456789ab.npz",
        counts={"ok": 10_000},
    )


def choose(samples: int, drawn: int) -> dict[str, float]:
    """Choose the samples of an evaluation."""
    from pipeline.data.order import random

    if hasattr(random, "choose"):
        return _measured(lambda: random.choose(samples, drawn, 0, 1))[1]
    return _measured(lambda: np.sort(random.permutation(samples, 0, 1)[:drawn]))[1]


def reader(folder: str, live: int, rows: int, fetched: int) -> dict[str, float]:
    """Read samples of shards that are all in use, in random order; the bytes are zeros."""
    from pipeline.data.index.manifest import Manifest
    from pipeline.data.loader.reader import Reader

    source = Reader(Manifest.load(_directory(folder)), wants=("image",), checksum=False)
    random = np.random.default_rng(0)

    def batch(count: int) -> Any:
        return random.integers(0, live, count).astype(np.uint64) << np.uint64(32) | random.integers(0, rows, count).astype(
            np.uint64
        )

    source.fetch(np.arange(live, dtype=np.uint64) << np.uint64(32))
    ids = batch(fetched)
    return _measured(lambda: source.fetch(ids))[1]


def checkpoints(folder: str, count: int) -> dict[str, float]:
    """List checkpoints of eight ranks, whose manifests have 33 kB."""
    parent = Path(folder) / f"checkpoints-{count}"
    names = [*(f"rank_{rank:05d}.safetensors" for rank in range(8)), "whole.safetensors"]
    document = {
        "format": 1,
        "files": [{"name": name, "size": 0, "xxh3": "0" * 32} for name in names],
        "world": 8,
        "fragments": [{f"backbone.blocks.{block}.attn.qkv.weight": [block, 9999] for block in range(60)}] * 8,
        "shapes": {f"backbone.blocks.{block}.attn.qkv.weight": [384, 1152] for block in range(150)},
    }
    for step in range(count):
        path = parent / f"step_{step:09d}"
        if not path.exists():
            path.mkdir(parents=True)
            (path / "manifest.json").write_text(json.dumps({**document, "step": step, "serial": step}))
            for name in names:
                (path / name).touch()
    try:
        catalog: Any = importlib.import_module("pipeline.checkpoint.catalog")
    except ImportError:
        pass
    else:  # as the run itself writes it
        last, *others = catalog.rows(parent)[::-1]
        catalog.Catalog(parent).add(last, others)
    listing: Any = importlib.import_module("launch.cli.checkpoint")
    return _measured(lambda: listing._rows(parent))[1]


def history(folder: str, steps: int, attempts: int) -> dict[str, float]:
    """Read the curves of a run of many attempts that logged 51 values every ten steps."""
    reports: Any = importlib.import_module("pipeline.reports.history")
    from pipeline.runtime.run_directory import RunDirectory

    run = RunDirectory(Path(folder) / f"run-{steps}")
    each = steps // attempts
    if not run.tracking.exists():
        run.path.mkdir()
        run.tracking.mkdir()
        names = ["train/lr", *(f"train/metric_{number}" for number in range(50))]
        for attempt in range(attempts):
            run.note("start", attempt=attempt, resumed_from=attempt * each)
            with run.journal(attempt).open("w") as file:
                for step in range(attempt * each + 10, (attempt + 1) * each + 20, 10):
                    values = dict.fromkeys(names, step / 7)
                    file.write(json.dumps({"t": 1.0, "kind": "metrics", "step": step, "values": values}) + "\n")
    return _measured(lambda: reports.read_history(run))[1]


PROBES: dict[str, Callable[..., dict[str, float]]] = {
    "make": make,
    "start": start,
    "manifest": manifest,
    "loaded": loaded,
    "choose": choose,
    "reader": reader,
    "checkpoints": checkpoints,
    "history": history,
}

if __name__ == "__main__":
    main()
