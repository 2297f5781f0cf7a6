"""A run over a shard of hostile files completes, and records every substituted sample."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import storage
from pipeline.data.augment.operators import Augment
from pipeline.data.augment.views import ViewSpec
from pipeline.data.index.build import build
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import Order
from tests.helpers.hostile_images import decompression_bombs, read_hostile_files, unusual_images


@pytest.fixture(scope="module")
def hostile_files(shared_data: Path) -> dict[str, bytes]:
    return read_hostile_files(shared_data)


def pack(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as writer:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            writer.addfile(entry, io.BytesIO(data))


def test_a_run_over_a_hostile_shard_goes_on_to_its_end_and_tells_what_was_lost(
    tmp_path: Path, hostile_files: dict[str, bytes]
) -> None:
    everything = {f"zoo-{n:03d}.jpg": data for n, data in enumerate(hostile_files.values()) if len(data) < 60_000}
    everything |= {f"odd-{n:03d}.jpg": data for n, data in enumerate(unusual_images().values())}
    everything |= {f"bomb-{n:03d}.jpg": data for n, data in enumerate(decompression_bombs().values())}
    url = tmp_path / "hostile.tar"
    pack(url, everything)
    manifest = build([str(url)], tmp_path / "index")
    assert sum(manifest.counts.values()) == len(everything)
    assert manifest.counts["too_large"] >= len(decompression_bombs())
    offsets, sizes = (manifest.column(0, f"image_{part}") for part in ("offset", "size"))
    rotten = list(range(3, manifest.total, 17))
    with url.open("r+b") as file:  # after the index was made, in place
        for number, row in enumerate(rotten):
            length = int(sizes[row])
            file.seek(int(offsets[row]))
            file.write(bytes(length) if number % 2 else np.random.default_rng(number).bytes(length))
    storage.forget()
    spec = (ViewSpec("view", 1, 32, (0.3, 1.0), augment=(Augment(),)),)
    order = Order(manifest.sizes, 0, 8, streams=1, block_size=1024)
    bad_samples = BadSamples(tmp_path / "bad_samples.jsonl", budget=1.0)
    dataset = StepDataset(Reader(manifest, wants=("image",)), order, spec, seed=0, world=1, rank=0)
    steps = manifest.total // 8
    options = StreamOptions(micro_batch=8, workers=0, hue="off")
    stream = BatchStream(dataset, device=torch.device("cpu"), options=options, bad_samples=bad_samples, first=0, last=steps)
    met: list[int] = []
    for _, (batch,) in stream:
        assert all(torch.isfinite(view).all() for view in batch.views["view"])
        met += batch.ids
    events = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert len(met) == steps * 8
    reasons = {event["id"]: event["reason"] for event in events}
    planned = [int(number) for step in range(steps) for number in order.rank_batch(step, 1, 0).ids]
    assert {row for row in rotten if row in planned} == {row for row in reasons if row in rotten}
    assert {reasons[row] for row in rotten if row in planned} == {"corrupt"}
    assert set(reasons.values()) == {"corrupt", "undecodable"}
    for given_id, planned_id in zip(met, planned, strict=True):  # in place: nothing shifts, and only what was told is another
        assert (given_id == planned_id) == (planned_id not in reasons)
    for event in events:
        assert event["shard"] == "hostile.tar"
        assert event["key"]
