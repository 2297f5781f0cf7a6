"""Samples of a step as dictionaries: indexed, ordered, read, decoded, bad ones substituted. Without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from pipeline.data import storage
from pipeline.data.formats.channels import Channels, channels_identity
from pipeline.data.index.captions import decode_text, read_json_member
from pipeline.data.index.fields import Fields
from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import Indexer, open_storage
from pipeline.data.library import integer
from pipeline.data.loader.bad_samples import Event
from pipeline.data.loader.members import MemberReader
from pipeline.data.loader.reader import Record
from pipeline.data.loader.text import choose
from pipeline.data.order.default_streams import default_streams, extents_of
from pipeline.data.order.order import GlobalBatch, Order, Source, rank_slice
from pipeline.data.selections.apply import selection_identity, weights_of
from pipeline.data.settings import DataSettings
from pipeline.errors import ConfigError

Decode = Literal["pil", "rgb8", "torchrgb8", "array", "tensor"]
Sample = dict[str, Any]
_DECODERS = ("pil", "rgb8", "torchrgb8", "array", "tensor")
_SUBSTITUTES = 8
_BLANK = 64
_VERSION = 1


@dataclass(frozen=True)
class _Settings:
    data: DataSettings


def data_settings(
    shards: str | os.PathLike[str] | Sequence[str], sources: Sequence[Any] | None, options: dict[str, Any]
) -> DataSettings:
    """Returns the section ``data`` of a run for the arguments of the library.

    Raises:
        ConfigError: an unknown option, or a value that is not valid.
    """
    named = {"shards": [os.fspath(shards)] if isinstance(shards, str | os.PathLike) else list(shards)} if shards else {}
    mixture = {"sources": tuple(sources)} if sources is not None else {}
    try:
        return DataSettings.model_validate({**named, **mixture, **options})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{key} {first['msg']}" if key else first["msg"],
            where="ShardDataset",
            hint="See the settings of `data` in configs/README.md",
        ) from None


@dataclass(frozen=True)
class SampleSource:
    """The samples of a run's data, by step.

    Attributes:
        manifest: index of the shards.
        order: which samples a step has.
        reader: reads them.
        settings: the section ``data``.
        decode: how images are decoded: not at all (``None``), as a PIL image (``pil``), as uint8 ``[height, width, 3]``
            (``rgb8``), or as a uint8 tensor ``[3, height, width]`` (``torchrgb8``). Of declared channels: as an array
            ``[height, width, channels]`` of the declared type (``array``) or a tensor ``[channels, height, width]`` (``tensor``).
        sources: the data sets of a mixture; empty for a single one.
    """

    manifest: Manifest
    order: Order
    reader: MemberReader
    settings: DataSettings
    decode: Decode | None = None
    sources: tuple[Source, ...] = ()
    _last: dict[tuple[int, int, int], GlobalBatch] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        settings: DataSettings,
        *,
        global_batch_size: int,
        seed: int,
        require: Iterable[str] = (),
        decode: Decode | None = None,
        members: Iterable[str] | None = None,
    ) -> SampleSource:
        """Indexes the shards, or reuses their index.

        Args:
            settings: the section ``data``.
            global_batch_size: samples of a step over all ranks.
            seed: seed of the order, of substitutes and of captions.
            require: of ``caption``, ``label`` and ``segmentation`` the parts without which a sample is left out.
            decode: see the class.
            members: extensions of the members to read besides the image; ``None`` for all.

        Raises:
            DataError: no shard matches, shards cannot be used, or there are fewer samples than in a global batch.
            ConfigError: sizes that do not divide, or are no integers.
        """
        if decode is not None and settings.channels is not None and decode not in ("array", "tensor"):
            raise ConfigError(
                f"images of declared channels are not decoded as {decode!r}",
                where="decode",
                hint="Choose array or tensor, or None for bytes",
            )
        if decode is not None and decode not in _DECODERS:
            raise ConfigError(
                f"{decode!r} is not a way to decode",
                where="decode",
                hint=f"Choose one of {', '.join(_DECODERS)}, or None for bytes",
            )
        global_batch_size, seed = integer("global_batch_size", global_batch_size, 1), integer("seed", seed)
        config = _Settings(settings)
        manifest, sources = Indexer(config).training_set(tuple(require))
        block_size, extents = settings.shuffle_block_size, extents_of(manifest.sizes, manifest.shards.sizes, sources)
        streams = settings.canonical_streams or default_streams(global_batch_size, extents, block_size)
        order = Order(manifest.sizes, seed, global_batch_size, streams, block_size, sources, weights_of(manifest, sources))
        only = None if members is None else {*members, *settings.images}
        reader = MemberReader(manifest, checksum=settings.verify_checksums, store=open_storage(config), only=only)
        return cls(manifest, order, reader, settings, decode, sources)

    @cached_property
    def identity(self) -> str:
        """Hash of everything that determines the order of samples: data, seed, batch size, streams, mixture."""
        order = self.order
        sources = [[s.name, s.shards, s.weight, s.repeat] for s in self.sources] if len(self.sources) > 1 else None
        parts = [_VERSION, self.manifest.fingerprint, order.seed, order.global_batch, order.streams, order.block_size, sources]
        if (selection := selection_identity(self.manifest)) is not None:
            parts.append(selection)
        if (channels := channels_identity(self.manifest.fields.channels)) is not None:
            parts.append(channels)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def check_world(self, world: int, rank: int) -> None:
        """Rejects ranks that cannot share the global batch.

        Raises:
            ConfigError: with the possible numbers of ranks.
        """
        rank_slice(self.order.global_batch, world, rank)

    def samples(self, step: int, world: int, rank: int, rows: slice = slice(None)) -> tuple[list[Sample], list[Event]]:
        """Returns one rank's samples of a step, and which of them are substitutes.

        Args:
            step: the step.
            world: number of ranks.
            rank: this rank.
            rows: part of the rank's samples.

        Raises:
            DataError: a shard is missing or has changed.
            StorageUnavailable: object storage did not answer within ``outage_timeout``.
        """
        batch = self._rank_batch(step, world, rank)
        share = len(batch.ids)
        ids, epochs = batch.ids[rows], batch.epochs[rows].tolist()
        positions = range(step * self.order.global_batch + rank * share, step * self.order.global_batch + (rank + 1) * share)[
            rows
        ]
        samples: list[Sample] = []
        events: list[Event] = []
        for record, epoch, position in zip(self.reader.fetch(ids), epochs, positions, strict=True):
            sample, reason = self._sample(record, epoch)
            if sample is None:
                sample, event = self._substitute(record, epoch, step, reason)
                events.append(event)
            sample.update(__epoch__=epoch, __position__=position, __bad__=reason)
            samples.append(sample)
        storage.forget_deleted()  # the cache may have evicted shards since the last step
        return samples, events

    def _rank_batch(self, step: int, world: int, rank: int) -> GlobalBatch:
        key = (step, world, rank)
        if key not in self._last:
            batch = self.order.rank_batch(step, world, rank)
            self._last.clear()
            self._last[key] = batch
        return self._last[key]

    def _sample(self, record: Record, epoch: int, fields: Fields | None = None) -> tuple[Sample | None, str]:
        """The sample as a dictionary, or why it cannot be used; ``fields`` are the manifest's unless others are given."""
        if record.image is None:
            return None, record.status
        if len(record.captions) > 1:
            record = replace(record, caption=choose(record.captions, record.id, epoch, self.order.seed))
        sample: Sample = dict(record.members)
        if self.decode is not None:
            image = _decoded(record, self.decode, fields or self.manifest.fields)
            if image is None:
                return None, "undecodable"
            sample.update(self._decoded_members(record))
            sample[self._image_extension(record)] = image
        shard = self.manifest.shards[record.id >> 32]
        return {
            "__key__": record.key,
            "__url__": shard.url,
            **sample,
            "__caption__": record.caption or "",
            "__label__": record.label,
        }, ""

    def _image_extension(self, record: Record) -> str:
        return next((name for name in self.settings.images if name in record.members), self.settings.images[0])

    def _decoded_members(self, record: Record) -> Sample:
        decoded: Sample = {}
        for name, data in record.members.items():
            if name == self.settings.caption_extension:
                decoded[name] = record.caption or ""
            elif name == self.settings.label_extension:
                decoded[name] = record.label
            elif name == "json":
                try:
                    decoded[name] = read_json_member(data)
                except (ValueError, RecursionError):
                    decoded[name] = None
            elif name in ("txt", "text"):
                decoded[name] = decode_text(data)[0]
        return decoded

    def _substitute(self, bad: Record, epoch: int, step: int, reason: str) -> tuple[Sample, Event]:
        """Another sample of the same shard, the one that a run uses; a gray image if none of eight can be used."""
        for attempt in range(_SUBSTITUTES):
            other = self.reader.substitute(bad.id, epoch, self.order.seed, attempt)
            (record,) = self.reader.fetch(np.array([other], dtype=np.uint64))
            sample, _ = self._sample(record, epoch)
            if sample is not None:
                return sample, Event(step, bad.id, bad.key, bad.shard_name, reason, other)
        fields = self.manifest.fields
        image = _gray() if fields.channels is None else _uniform(fields.channels)
        record = replace(bad, image=image, width=_BLANK, height=_BLANK, caption=None, captions=(), label=-1, status="ok")
        record = replace(record, members={"jpg" if fields.channels is None else "npy": image})
        single = fields if fields.channels is None else replace(fields, channels=replace(fields.channels, members=()))
        blank, _ = self._sample(record, epoch, single)
        return blank or {}, Event(step, bad.id, bad.key, bad.shard_name, reason, -1)


def _decoded(record: Record, kind: Decode, fields: Fields) -> Any:
    """The decoded image; ``None`` if that fails, or if its size is another than that in the index."""
    pixels: Any
    if fields.channels is None:
        from pipeline.data.augment.pillow import decode

        pixels = decode(record.image or b"")
    else:
        from pipeline.data.formats import read

        pixels = read.decode(record.image or b"", fields.channels, max_pixels=fields.max_pixels)
    if pixels is None or pixels.shape[:2] != (record.height, record.width):
        return None
    if kind in ("rgb8", "array"):
        return pixels
    if kind == "pil":
        from PIL import Image

        return Image.fromarray(pixels)
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _uniform(channels: Channels) -> bytes:
    """The image of :meth:`pipeline.data.augment.decode.ChannelDecoder.blank` as a file."""
    import io

    value = 0 if channels.dtype == "float32" else int(channels.full_range) // 2 + 1
    buffer = io.BytesIO()
    np.save(buffer, np.full((_BLANK, _BLANK, channels.count), value, dtype=channels.dtype), allow_pickle=False)
    return buffer.getvalue()


def _gray() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (_BLANK, _BLANK), (128, 128, 128)).save(buffer, "JPEG")
    return buffer.getvalue()


def bad_samples_file(folder: str | Path | None, rank: int, worker: int) -> Path | None:
    """Returns the file in which a process records its bad samples."""
    return None if folder is None else Path(folder) / f"rank-{rank}-worker-{worker}.jsonl"
