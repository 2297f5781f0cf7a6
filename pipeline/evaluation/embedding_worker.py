"""One rank's share of embedding a data set: reads, decodes and embeds parts of shards, and puts shards together."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.data.augment.views import Normalize, ViewSpec, channel_spec
from pipeline.data.embeddings.work import BadSample, EmbeddingFolder, Unit, digest_of
from pipeline.data.indexing import open_storage
from pipeline.data.loader.bad_samples import BadSamples, Event
from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
from pipeline.data.loader.encoded_batches import RankBatch, StepDataset
from pipeline.data.loader.reader import Reader
from pipeline.data.order.order import GlobalBatch
from pipeline.data.order.random import uniforms
from pipeline.models.eval_model import EvalModel
from pipeline.runtime.process_group import World

_PATCH_DRAW = 0xE3BED  # identifies the random draw
_POLL = 0.2  # seconds between two looks at the other ranks
_UNITS, _DONE, _BAD, _STOPS, _LEFT = "units", "samples", "bad", "stops", "left"  # shared counters


@dataclass(frozen=True)
class EmbedProgress:
    """How far all ranks are.

    Attributes:
        done, total: samples, of this start and of earlier ones.
        bad: samples of this start that could not be embedded.
        rate: images per second of this start.
    """

    done: int
    total: int
    bad: int
    rate: float


Report = Callable[[EmbedProgress], None]


def chosen_patches(ids: NDArray[np.uint64], count: int, total: int) -> NDArray[np.int32]:
    """Which patch tokens of each sample are kept, a pure function of the sample's number: ``[n, count]``, ascending.

    Args:
        ids: the samples' numbers, ``[n]``.
        count: patches of each.
        total: patch tokens of an image.
    """
    if count >= total:
        return np.broadcast_to(np.arange(total, dtype=np.int32), (len(ids), total)).copy()
    draws = uniforms(ids, total, 0, _PATCH_DRAW)
    return np.sort(np.argsort(draws, axis=1, kind="stable")[:, :count], axis=1).astype(np.int32)


def _finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether all numbers of each sample are finite."""
    result: NDArray[np.bool_] = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    return result


class _NoUnits(Exception):
    """No part is left for this rank."""


@dataclass(frozen=True)
class _Step:
    """A batch: rows ``first`` to ``last`` of a part, which it completes or not."""

    unit: Unit
    first: int
    last: int

    @property
    def ids(self) -> NDArray[np.uint64]:
        rows = np.arange(self.first, self.last, dtype=np.uint64)
        return np.uint64(self.unit.shard << 32) | rows


class _Claims:
    """The order of this rank's batches: the parts that it takes from the shared counter, when its stream needs another one."""

    def __init__(self, units: list[Unit], claim: Callable[[], int], batch_size: int) -> None:
        self.global_batch = batch_size
        self.steps: dict[int, _Step] = {}
        self._units, self._claim = units, claim
        self._left: list[_Step] = []

    def rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        """The next batch; called once for each step, in order."""
        if not self._left:
            number = self._claim()
            if number >= len(self._units):
                raise _NoUnits
            unit, size = self._units[number], self.global_batch
            self._left = [_Step(unit, first, min(first + size, unit.last)) for first in range(unit.first, unit.last, size)]
        self.steps[step] = self._left.pop(0)
        ids = self.steps[step].ids
        return GlobalBatch(ids, np.zeros(len(ids), dtype=np.int64))


class _Hashed(StepDataset):
    """Batches of encoded images, whose digests are kept until they are asked for."""

    digests: dict[int, NDArray[np.uint8]]

    def __getitem__(self, step: int) -> RankBatch:
        batch = super().__getitem__(step)
        data = b"".join(digest_of(record.image or b"") for record in batch.records)
        self.digests[step] = np.frombuffer(data, dtype=np.uint8).reshape(len(batch.records), -1)
        return batch


class EmbedWorker:
    """Embeds this rank's parts, and puts together the shards that it completes.

    Args:
        folder: the folder of embeddings.
        model: the network.
        config: settings of the data.
        world: this rank's position in the process group.
        units: the parts that are missing, the same on all ranks.
        report: receives the progress, on the first rank.
        stopping: asked after every batch whether to stop; all ranks then stop.
    """

    def __init__(
        self,
        folder: EmbeddingFolder,
        model: EvalModel,
        config: Config,
        world: World,
        units: list[Unit],
        *,
        report: Report,
        stopping: Callable[[], bool],
    ) -> None:
        self._world, self._model, self._folder = world, model, folder
        self._report, self._stopping, self._begin = report, stopping, time.monotonic()
        self._spec, self._manifest = folder.spec, folder.manifest
        self._expected = Counter(unit.shard for unit in units)
        self._before = self._manifest.total - sum(unit.last - unit.first for unit in units)
        self._stopped = False
        spec, data = folder.spec, config.data
        self._claims = _Claims(units, lambda: self._add(_UNITS, 1) - 1, spec.batch_size)
        image = spec.image
        view = ViewSpec(
            "image",
            1,
            image.size,
            None,
            centre=image.crop_fraction,
            position=image.crop_position,
            interpolation=image.interpolation,
            normalize=Normalize(image.mean, image.std),
            channels=channel_spec(data.channels),
        )
        reader = Reader(self._manifest, wants=("image",), checksum=data.verify_checksums, store=open_storage(config))
        self._dataset = _Hashed(reader, self._claims, (view,), seed=0, world=1, rank=0)
        self._dataset.digests = {}
        self._bad = BadSamples(
            folder.scratch / f"bad_samples-rank-{world.rank}.jsonl",
            budget=data.max_bad_fraction,
            window=data.bad_fraction_window,
            known=sys.maxsize,  # each has its reason in the result
        )
        self._options = StreamOptions(
            micro_batch=spec.batch_size, workers=0, threads=data.decode_threads, prefetch=data.prefetch, hue="off"
        )

    def run(self, waiting: list[int]) -> bool:
        """Work until no part is left, and wait for the other ranks; whether it was stopped before."""
        for shard in waiting[self._world.rank :: self._world.size]:
            self._folder.assemble(shard)
        self._embed()
        self._add(_LEFT, 1)
        while self._count(_LEFT) < self._world.size:  # not a collective: the last part may take longer than its timeout
            self._look()
            time.sleep(_POLL)
        self._look()
        dist.barrier(group=self._world.control)
        return self._count(_STOPS) > 0

    @property
    def embedded(self) -> int:
        """Images of all ranks."""
        return self._count(_DONE)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._begin

    def _count(self, name: str) -> int:
        return self._add(name, 0)

    def _add(self, name: str, number: int) -> int:
        if self._world.store is None:
            raise RuntimeError("the process group has no store")
        return self._world.store.add(f"embed/{name}", number)

    def _look(self) -> bool:
        """Report the progress, and find out whether all ranks stop."""
        if not self._stopped and self._stopping():
            self._stopped = True
            self._add(_STOPS, 1)
        if self._world.rank == 0:
            done = self._count(_DONE)
            rate = done / max(self.seconds, 1e-9)
            self._report(EmbedProgress(self._before + done, self._manifest.total, self._count(_BAD), rate))
        return self._count(_STOPS) > 0

    def _embed(self) -> None:
        stream = BatchStream(
            self._dataset, device=self._world.device, options=self._options, bad_samples=self._bad, first=0, last=None
        )
        columns: list[dict[str, Any]] = []
        bad: list[BadSample] = []
        try:
            for number, (batch,) in stream:
                step = self._claims.steps.pop(number)
                rows, lost = self._columns(step, batch.views["image"][0], self._dataset.digests.pop(number))
                columns.append(rows)
                bad += lost
                self._add(_DONE, step.last - step.first)
                if lost:
                    self._add(_BAD, len(lost))
                if step.last == step.unit.last:
                    self._folder.write_unit(step.unit, columns, bad)
                    columns, bad = [], []
                    self._complete(step.unit.shard)
                if self._look():
                    return
        except _NoUnits:
            return

    def _complete(self, shard: int) -> None:
        """Put the shard together if this was the last of its parts that were missing."""
        if self._add(f"shard-{shard}", 1) == self._expected[shard]:
            self._folder.assemble(shard)

    def _columns(self, step: _Step, images: Tensor, digests: NDArray[np.uint8]) -> tuple[dict[str, Any], list[BadSample]]:
        """The rows of a batch, and its bad samples. Rows of bad images hold another image and are left out."""
        shard, ids = step.unit.shard, step.ids
        values, patches = self._features(images, ids)
        rows = self._manifest.rows(shard)
        reasons = [self._bad.quarantine.get(int(number), "") for number in ids]
        usable = np.array([not reason for reason in reasons], dtype=bool)
        with np.errstate(over="ignore"):
            stored = values.astype(self._spec.dtype)
        finite, fits = _finite(values), _finite(stored)
        names = rows.keys[step.first : step.last]
        for index in np.flatnonzero(usable & ~fits):
            reasons[index] = "not_finite" if not finite[index] else "beyond_float16"
            event = Event(0, int(ids[index]), names[index], self._manifest.shards[shard].name, reasons[index], -1)
            self._bad.saw(0, [event])
        kept = np.flatnonzero(usable & fits)
        lost = [BadSample(step.first + int(index), names[index], reasons[index]) for index in np.flatnonzero(~(usable & fits))]
        return self._table(step, kept, names, stored, patches, digests), lost

    def _table(
        self,
        step: _Step,
        kept: NDArray[np.int64],
        names: tuple[str, ...],
        values: NDArray[Any],
        patches: NDArray[np.int32] | None,
        digests: NDArray[np.uint8],
    ) -> dict[str, Any]:
        """The columns of the kept samples; ``values`` is ``[n, rows of a sample, dim]``."""
        source, each = self._manifest.rows(step.unit.shard).columns, values.shape[1]
        held = step.first + kept
        captions = np.where(source["caption_source"][held] > 0, source["caption_size"][held], 0)

        def repeated(column: NDArray[Any]) -> NDArray[Any]:
            return np.repeat(column, each, axis=0)

        columns: dict[str, Any] = {
            "key": [names[index] for index in kept for _ in range(each)],
            "shard": np.full(len(kept) * each, step.unit.shard, dtype=np.int32),
            "row": repeated(held.astype(np.int32)),
            "embedding": values[kept].reshape(len(kept) * each, values.shape[-1]),
            "width": repeated(source["width"][held]),
            "height": repeated(source["height"][held]),
            "label": repeated(source["label"][held]),
            "caption_bytes": repeated(np.minimum(captions, np.iinfo(np.int32).max).astype(np.int32)),
            "image_bytes": repeated(np.minimum(source["image_size"][held], np.iinfo(np.int32).max).astype(np.int32)),
            "digest": repeated(digests[kept]),
        }
        if patches is not None:
            columns["patch"] = patches[kept].reshape(-1)
        return columns

    def _features(self, images: Tensor, ids: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.int32] | None]:
        """Features ``[n, rows of a sample, dim]``, and the numbers of the patches ``[n, rows]`` that they are of."""
        tokens = self._model.tokens(images)
        patches = None
        if self._spec.pooling == "cls":
            values = tokens.cls[:, None]
        elif self._spec.pooling == "mean":
            values = tokens.patches.float().mean(dim=1, keepdim=True)
        else:
            patches = chosen_patches(ids, self._spec.patches, tokens.patches.shape[1])
            index = torch.from_numpy(patches.astype(np.int64)).to(images.device)
            values = tokens.patches.gather(1, index[:, :, None].expand(-1, -1, tokens.patches.shape[-1]))
        result: NDArray[np.float32] = values.float().cpu().numpy()
        return result, patches
