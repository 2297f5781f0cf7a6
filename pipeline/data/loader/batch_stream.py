"""Streams batches to the device: decodes, substitutes bad samples, augments; prepares several steps in advance.

All random choices are functions of sample and step numbers (``order``, ``plan``, ``masks``), so the only state is the number of
the next step, which the trainer owns. Batches that were prepared but not consumed have no effect, and their bad samples are not
counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.augment.dali import Augmenter, Hue
from pipeline.data.augment.decode import decoder_of
from pipeline.data.augment.masks import mask_capacity
from pipeline.data.augment.plan import ViewPlan, make_plan
from pipeline.data.augment.views import Batch, Boxes, Masks, MaskSpec, ViewSpec
from pipeline.data.loader.bad_samples import BadSamples, Event
from pipeline.data.loader.device_copies import DeviceCopies
from pipeline.data.loader.encoded_batches import RankBatch, StepDataset, portions
from pipeline.data.loader.prefetch import Prefetcher
from pipeline.data.loader.reader import Record
from pipeline.data.loader.text import last_positions, tokenizer, trimmed

_SUBSTITUTES = 8
_BLANK = 64


@dataclass(frozen=True)
class StreamOptions:
    """Options of the stream that do not change what it yields.

    Attributes:
        micro_batch: samples of one forward pass on this rank; divides the rank's part of the global batch.
        workers: reader processes, 0 for none.
        threads: decode and augmentation threads.
        prefetch: steps prepared in advance.
        hue: color space of the hue shift (the exception: it does change pixels).
    """

    micro_batch: int
    workers: int = 1
    threads: int = 1
    prefetch: int = 2
    hue: Hue = "hsv"


@dataclass(frozen=True)
class _Ready:
    """A prepared step: its micro-batches, its samples, its substitutions, and on a GPU the event behind its copies."""

    step: int
    batches: list[Batch]
    samples: int
    bad: list[Event]
    usage: dict[str, float]
    counts: dict[str, int]
    copied: torch.cuda.Event | None


class BatchStream:
    """Iterates over ``(step, micro-batches)`` from a given step on.

    Args:
        dataset: maps steps to samples.
        device: where batches go; decoding and augmentation run there too.
        options: how to run.
        bad_samples: records bad samples.
        first: the first step to yield.
        last: one past the last step, ``None`` for no end.
        prefetcher: fills the node's cache ahead of the readers; started and stopped with the stream.
    """

    def __init__(
        self,
        dataset: StepDataset,
        *,
        device: torch.device,
        options: StreamOptions,
        bad_samples: BadSamples,
        first: int = 0,
        last: int | None = None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self._dataset, self._options, self._bad_samples = dataset, options, bad_samples
        self._first, self._last = first, last
        device_id = device.index or 0 if device.type == "cuda" else None
        self._copies = DeviceCopies(device)
        self._decoder = decoder_of(dataset.reader.manifest.fields, threads=options.threads, device_id=device_id)
        self._sets = dataset.sets_at(first)
        self._augmenter = Augmenter(
            *(one.views for one in self._sets),
            batch_size=options.micro_batch,
            threads=options.threads,
            device_id=device_id,
            hue=options.hue,
        )
        self._queue: queue.Queue[_Ready | BaseException | None] = queue.Queue(maxsize=options.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="fovea-data", daemon=True)
        self._prefetcher = prefetcher
        self.seconds_waited = 0.0
        self.usage: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        """Yields steps in order, once.

        Raises:
            TrainingError: too many samples could not be used.
            DataError: a shard is missing or was changed. This and any other error of the producing thread is raised here.
        """
        if self._prefetcher is not None:
            self._prefetcher.start(self._first)
        self._thread.start()
        try:
            while True:
                begin = time.perf_counter()
                item = self._queue.get()
                self.seconds_waited += time.perf_counter() - begin
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                self._bad_samples.saw(item.samples, item.bad, item.counts)
                self.usage.update(item.usage)
                if self._prefetcher is not None:
                    self._prefetcher.advance(item.step)
                self._copies.receive(item.batches, item.copied)
                yield item.step, item.batches
        finally:
            self.close()

    def close(self) -> None:
        """Stops preparing batches."""
        self._stop.set()
        while not self._queue.empty():
            self._queue.get_nowait()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _put(self, item: _Ready | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _produce(self) -> None:
        try:
            o = self._options
            source = portions(self._dataset, first=self._first, last=self._last, workers=o.workers, prefetch=o.prefetch)
            with self._copies.preparing():
                for portion in source:
                    if self._stop.is_set():
                        return
                    self._put(self._ready(portion))
            self._put(None)
        except BaseException as error:  # raised in the consumer
            self._put(error)

    def _ready(self, portion: RankBatch) -> _Ready:
        images, records = self._decode(portion.records), list(portion.records)
        bad: list[Event] = []
        for row, image in enumerate(images):
            if image is None:
                images[row], records[row], event = self._substitute(portion, row)
                bad.append(event)
                if portion.tokens is not None and self._dataset.text is not None:
                    portion.tokens[row] = tokenizer(self._dataset.text)([records[row].caption or ""])[0]
        counts = dict(portion.counts)
        if portion.tokens is not None and (uncaptioned := sum(not record.caption for record in records)):
            counts["blank_caption"] = uncaptioned
        size = self._options.micro_batch
        batches = [self._micro(portion, records, images, slice(low, low + size)) for low in range(0, len(records), size)]
        return _Ready(portion.step, batches, len(records), bad, portion.usage, counts, self._copies.ready())

    def _decode(self, records: list[Record]) -> list[Any]:
        """Decodes images; ``None`` for those that fail or differ in size from the index, for which the plan was made."""
        known = self._bad_samples.quarantine
        images = self._decoder.decode([b"" if r.image is None or r.id in known else r.image for r in records])
        return [
            image if image is not None and tuple(image.shape[:2]) == (record.height, record.width) else None
            for image, record in zip(images, records, strict=True)
        ]

    def _substitute(self, portion: RankBatch, row: int) -> tuple[Any, Record, Event]:
        """Uses another sample of the same shard at the same position, so that the stream does not shift."""
        bad, epoch = portion.records[row], int(portion.epochs[row])
        data = self._dataset
        reason = bad.status if bad.status != "ok" else self._bad_samples.quarantine.get(bad.id, "undecodable")
        for attempt in range(_SUBSTITUTES):
            other = data.reader.substitute(bad.id, epoch, data.seed, attempt)
            (record,) = data.reader.fetch(np.array([other], dtype=np.uint64))
            record = data.with_caption(record, epoch)
            (image,) = self._decode([record])
            if image is not None:
                break
        else:
            image = self._decoder.blank(_BLANK)
            record, other = replace(bad, height=_BLANK, width=_BLANK, caption=None, captions=(), label=-1, values={}), -1
        sizes = np.array([(record.height, record.width)], dtype=np.int64)
        ids = np.array([bad.id], dtype=np.uint64)
        fresh = make_plan(data.specs_at(portion.step), ids=ids, epochs=portion.epochs[row : row + 1], sizes=sizes, seed=data.seed)
        for sample_plan, one in zip(portion.plan, fresh, strict=True):
            sample_plan.replace_row(row, one)
        return image, record, Event(portion.step, bad.id, bad.key, bad.shard_name, reason, other)

    def _micro(self, portion: RankBatch, records: list[Record], images: list[Any], rows: slice) -> Batch:
        plan: list[ViewPlan] = [view.take(rows) for view in portion.plan]
        specs, sets = self._dataset.specs_at(portion.step), self._dataset.sets_at(portion.step)
        if sets is not self._sets:  # a stage begins
            self._sets = sets
            self._augmenter.use(*(one.views for one in sets))
        views = self._augmenter.run(images[rows], plan, specs)
        chosen, to_device = records[rows], self._copies.to_device
        return Batch(
            views={name: [to_device(view) for view in group] for name, group in views.items()},
            labels=to_device(np.array([r.label for r in chosen], dtype=np.int64)),
            keys=[r.key for r in chosen],
            ids=[int(r.id) for r in chosen],
            position=portion.step * self._dataset.order.global_batch,
            masks={
                spec.name: self._masks(portion.masks[spec.name][:, rows], spec.mask) for spec in specs if spec.mask is not None
            },
            kept={name: to_device(kept[:, rows].reshape(-1, kept.shape[-1])) for name, kept in portion.kept.items()},
            tokens=self._tokens(portion, rows),
            captions=[r.caption or "" for r in chosen],
            boxes=self._boxes(specs, plan),
            id_tensor=to_device(np.array([r.id for r in chosen], dtype=np.int64)),
            text_ends=last_positions(portion.tokens[rows]) if portion.tokens is not None else None,
            columns={
                name: to_device(np.array([r.values.get(name, -1) for r in chosen], dtype=np.int64))
                for name in self._dataset.reader.columns
            },
        )

    def _tokens(self, portion: RankBatch, rows: slice) -> torch.Tensor | None:
        if portion.tokens is None:
            return None
        tokens, text = portion.tokens[rows], self._dataset.text
        if text is not None and text.trim:  # done here, where lengths are known without a device synchronization
            tokens = np.ascontiguousarray(trimmed(tokens))
        return self._copies.to_device(tokens)

    def _boxes(self, specs: tuple[ViewSpec, ...], plan: list[ViewPlan]) -> dict[str, Boxes]:
        views, boxes = iter(plan), {}
        for spec in specs:
            own = [next(views) for _ in range(spec.count)]
            if spec.boxes:
                corners = [self._copies.to_device(np.concatenate([view.start, view.end], axis=1)) for view in own]
                boxes[spec.name] = Boxes(corners, [self._copies.to_device(view.flip > 0) for view in own])
        return boxes

    def _masks(self, grid: NDArray[np.bool_], spec: MaskSpec) -> Masks:
        flat = np.ascontiguousarray(grid).reshape(-1, grid.shape[-1])
        counts = flat.sum(axis=1)
        weight = np.repeat(1.0 / np.maximum(counts, 1), counts).astype(np.float32)
        capacity = mask_capacity(len(flat), len(grid) * self._dataset.order.global_batch, flat.shape[1], spec)
        to_device = self._copies.to_device
        return Masks(to_device(flat), to_device(np.flatnonzero(flat)), to_device(weight), capacity)
