"""Iterable data set of samples in the order of a run, for any training loop; see README.md in this folder for the contract."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from pipeline.data.library import Position, Ranks, State, Units, check_state, integer
from pipeline.data.loader.bad_samples import BadSamples
from pipeline.data.loader.prefetch import Prefetcher
from pipeline.data.loops import Loops, Origin
from pipeline.data.sample_source import Decode, Sample, SampleSource, bad_samples_file, data_settings
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pipeline.data.shard_loader import ShardLoader


class ShardDataset(IterableDataset[Any]):
    """Samples of WebDataset shards in exactly the order of a run, seekable and resumable at any sample.

    Each sample is a dictionary as webdataset makes it: ``__key__``, ``__url__``, and its members by extension, ``bytes`` unless
    ``decode`` is set. In addition ``__caption__`` (the one chosen for this epoch), ``__label__`` (-1 without), ``__epoch__``,
    ``__position__`` (its index in the order, over all ranks), and ``__bad__`` (empty, or why the sample that belongs here was
    substituted).

    One ``for`` loop yields the rest of the current epoch, and the next loop the next epoch; ``endless=True`` never ends.

    Args:
        shards: a path or URL with ``{000..123}`` or ``*``, or a list of them.
        global_batch_size: samples of a step over all ranks. The order depends on it, so it stays the same for a run.
        seed: seed of the order, of substitutes and of captions.
        batch_size: samples of a batch on one rank; ``None`` for its whole part of a step. A DataLoader with several workers must
            be given the same, which :attr:`batch_size` returns.
        decode: ``None``: members are bytes. ``pil``, ``rgb8`` (uint8 array ``[height, width, 3]``) or ``torchrgb8`` (uint8 tensor
            ``[3, height, width]``): images are decoded by Pillow, ``cls`` is an int, ``txt`` a string and ``json`` an object;
            other members stay bytes. Images of declared ``channels``: ``array`` (``[height, width, channels]``) or ``tensor``
            (``[channels, height, width]``), with their values as stored.
        transform: called with each sample; what it returns is yielded.
        sources: data sets of a mixture instead of ``shards``: dictionaries with ``name``, ``shards``, ``weight`` or ``repeat``.
        require: of ``caption``, ``label`` and ``segmentation`` the parts without which a sample is left out.
        members: extensions of the members to read besides the image; ``None`` for all.
        rank: this rank, with ``world_size``. By default those of ``torch.distributed`` if it is initialized when the first sample
            is read, else of the variables ``RANK`` and ``WORLD_SIZE``, else a single rank. A copy that another process unpickles
            finds its rank there; a worker of a DataLoader has that of its parent.
        world_size: number of ranks.
        endless: whether epochs follow each other in one loop.
        bad_samples: folder in which samples that could not be used are recorded.
        options: any other setting of the section ``data`` of a run, such as ``index``, ``canonical_streams``, ``caption_lines``,
            ``storage={"cache": "/local/nvme"}``.

    Raises:
        ConfigError: sizes that do not divide, or settings that are not valid.
        DataError: no shard matches, or shards cannot be used.

    Example:
        >>> from pipeline.data import ShardDataset
        >>> dataset = ShardDataset(SHARDS, global_batch_size=4, seed=1)
        >>> first = next(iter(dataset))
        >>> sorted(name for name in first if not name.startswith("__"))
        ['cls', 'jpg', 'json', 'seg.png', 'txt']
        >>> dataset.state_dict()["samples"]
        1
        >>> [sample["__position__"] for sample in dataset.batch(2)]
        [8, 9, 10, 11]
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str] = (),
        *,
        global_batch_size: int,
        seed: int = 0,
        batch_size: int | None = None,
        decode: Decode | None = None,
        transform: Callable[[Sample], Any] | None = None,
        sources: Sequence[Any] | None = None,
        require: Iterable[str] = (),
        members: Iterable[str] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        endless: bool = False,
        bad_samples: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        settings = data_settings(shards, sources, options)
        self.source = SampleSource.open(
            settings, global_batch_size=global_batch_size, seed=seed, require=require, decode=decode, members=members
        )
        self.transform, self.endless = transform, endless
        self._batch_size, self._folder = batch_size, bad_samples
        self._rank, self._world_size = rank, world_size
        self._inherited: Ranks | None = None  # of the process that pickled this copy, if it knew its rank
        self._position = self._moves = 0  # and how often it was set from outside
        self._shared_by: int | None = None  # the ranks that share the step which the position lies within
        self._origin: Origin | None = None  # in a worker process: all three, as it received them
        self._loops = Loops()
        self._pid = os.getpid()
        self._worker: tuple[int, int] | None = None  # in a worker process: start and end of its loop
        self._restored = False  # in a worker process: whether its position was restored
        self.bad_samples: BadSamples | None = None
        if rank is not None or world_size is not None:
            self.units(self.ranks)

    @property
    def ranks(self) -> Ranks:
        """The rank of this process; see ``rank`` above."""
        ranks = self._known_ranks() or Ranks()
        self.source.check_world(ranks.world, ranks.rank)
        return ranks

    @property
    def batch_size(self) -> int:
        """Samples of a batch on one rank: the ``batch_size`` for a DataLoader."""
        return self.units(self.ranks).batch

    @property
    def steps_per_epoch(self) -> int:
        """Complete steps in an epoch. Epochs follow each other without a gap, so some have one step more."""
        return self.source.order.steps_per_epoch

    @property
    def samples_per_epoch(self) -> int:
        """Samples of an epoch over all ranks: all but a remainder smaller than the number of streams."""
        return self.source.order.samples_per_epoch

    @property
    def position(self) -> int:
        """Samples of the order that lie before the next loop, over all ranks."""
        self._catch_up()
        return self._position

    @property
    def epoch(self) -> int:
        """The epoch at the current position."""
        return self.source.order.epoch_of(self.position // self.source.order.global_batch)

    def batch(self, step: int, *, rank: int | None = None, world_size: int | None = None) -> list[Any]:
        """Returns this rank's samples of any step, without moving the position: ``[global_batch_size / world_size]``.

        Args:
            step: from 0; steps have no end.
            rank: of another rank, with ``world_size``; ``rank=0, world_size=1`` returns the samples of all ranks.
            world_size: number of ranks.

        Raises:
            ConfigError: a negative step, or ranks that cannot share the global batch.
            DataError: a shard is missing or has changed.
        """
        ranks = self.ranks if rank is None and world_size is None else Ranks.find(rank, world_size)
        samples, _ = self.source.samples(step, ranks.world, ranks.rank)
        return [self.transformed(sample) for sample in samples]

    def loader(self, **options: Any) -> ShardLoader:
        """Returns a loader that knows how many batches it has handed out; see :class:`pipeline.data.shard_loader.ShardLoader`."""
        from pipeline.data.shard_loader import ShardLoader

        return ShardLoader(self, **options)

    def seek(self, step: int) -> None:
        """Lets the next loop start at a step.

        Raises:
            ConfigError: a step that is negative or no integer.
        """
        step = integer("step", step)
        self._set(Position(step * self.source.order.global_batch))

    def state_dict(self) -> State:
        """Returns the position: ``samples`` is the number of samples that all ranks have been given, ``order`` names the order.

        ``world_size`` is the number of ranks, which matters if the position lies within a step.

        Raises:
            DataError: worker processes of a plain DataLoader read the samples, so this process does not know.
        """
        # Always with all keys: torch.distributed.checkpoint loads those that the state of a new data set has.
        world = self._shared_by or self.ranks.world
        state: State = {"order": self.source.identity, "samples": self._position, "world_size": world}
        if self._worker is not None:  # what a StatefulDataLoader keeps for this worker
            start, end = self._worker
            return {**state, "batch_size": self.batch_size, "start": start, "end": end}
        if get_worker_info() is None and self._loops.next(self._here()) is not None:
            raise DataError(
                "worker processes read the samples, and this process does not know how many of them were used",
                where="state_dict",
                hint="Use dataset.loader(num_workers=…) or a StatefulDataLoader and save its state, or count steps and seek()",
            )
        return state

    def load_state_dict(self, state: State) -> None:
        """Lets the next loop continue where a data set, a :class:`ShardLoader` or a StatefulDataLoader was saved.

        Args:
            state: what ``state_dict()`` returned there, on any number of ranks and workers.

        Raises:
            DataError: it belongs to other data or another order, or lies within a step and the number of ranks has changed (which
                the next loop raises if the ranks are not known yet).
        """
        position, info = check_state(state, self.source.identity), get_worker_info()
        if self._known_ranks() is not None:
            self.units(self.ranks).at(position.samples, position.world)
        if info is not None and "start" in state:
            units = self.units(self.ranks)
            if state.get("batch_size", 0) * (position.world or 0) != units.position(1):
                raise DataError(
                    f"its workers took turns by other batches than those of {units.batch} samples on {units.world} ranks",
                    where="load_state_dict",
                    hint="Use the batch_size and the ranks as before, or pass the state to load_state_dict() of the data set",
                )
            self._origin = self._origin or self._here()
            self._worker, self._restored = (int(state["start"]), int(state["end"])), True
            self._position, self._shared_by = position.samples, position.world
            return
        self._set(position)

    def __iter__(self) -> Iterator[Any]:
        """Yields the samples of this rank (in a worker process of a DataLoader: those of the worker) to the end of the epoch.

        Raises:
            DataError: a shard is missing or has changed.
            TrainingError: more than ``max_bad_fraction`` of the samples could not be used.
        """
        info, ranks = get_worker_info(), self.ranks
        units = self.units(ranks)
        if info is None:
            self._catch_up()
            units.at(self._position, self._shared_by)
            return self._run(ranks, units, self._position, self.end_of_loop(self._position), worker=0, workers=1)
        self._check_fork()
        workers, worker = info.num_workers, info.id
        loop = info.seed - worker
        self._origin = self._origin or self._here()
        if self._restored and self._worker is not None:  # by a StatefulDataLoader
            self._restored = False
            start, end = self._worker
            units.at(self._position, self._shared_by)
            self._loops.restored(self._origin, loop, worker, start, end)
            return self._run(ranks, units, self._position, end, worker=worker, workers=workers)
        last = None if self._worker is None else self._worker[1]
        self._origin, start = self._loops.start(self._origin, loop, worker, self.end_of_loop, last)
        self._worker = (start, self.end_of_loop(start))
        first, taken = units.at(start, self._origin[2])
        if taken and workers > 1:
            raise DataError(
                f"position {start} lies within a batch, which {workers} workers cannot continue",
                where="ShardDataset",
                hint="Save after complete batches, or use one worker",
            )
        self._position, self._shared_by = units.position(first + worker, taken), ranks.world
        return self._run(ranks, units, self._position, self._worker[1], worker=worker, workers=workers)

    def _run(self, ranks: Ranks, units: Units, start: int, end: int, *, worker: int, workers: int) -> Iterator[Any]:
        """Yields samples from a position on: every ``workers``-th batch."""
        self._position, self._shared_by = start, ranks.world
        bad = self.account(ranks.rank, worker)
        prefetcher = self.prefetcher(ranks) if worker == 0 else None
        unit, taken = units.at(start, ranks.world)
        if prefetcher is not None:
            prefetcher.start(unit // units.per_step)
        try:
            while units.position(unit) < end:
                step, part = divmod(unit, units.per_step)
                rows = slice(part * units.batch, (part + 1) * units.batch)
                samples, events = self.source.samples(step, ranks.world, ranks.rank, rows)
                bad.saw(len(samples), events)
                if prefetcher is not None:
                    prefetcher.advance(step)
                for number in range(taken, len(samples)):
                    last = number + 1 == len(samples)
                    self._position = units.position(unit + workers) if last else units.position(unit, number + 1)
                    yield self.transformed(samples[number])
                unit, taken = unit + workers, 0
        finally:
            if prefetcher is not None:
                prefetcher.close()

    def end_of_loop(self, position: int) -> int:
        """Returns the position at which a loop that starts at a position ends: the next epoch, or never."""
        order = self.source.order
        return 1 << 62 if self.endless else order.next_epoch(position // order.global_batch) * order.global_batch

    def _here(self) -> Origin:
        within = self._position % self.source.order.global_batch
        return self._moves, self._position, (self._shared_by or 0) if within else 0

    def _set(self, position: Position) -> None:
        self._position, self._shared_by, self._moves = position.samples, position.world, self._moves + 1
        self._loops.move(self._here())

    def _catch_up(self) -> None:
        """Takes over where the loops of worker processes have ended."""
        samples = self._loops.next(self._here()) if get_worker_info() is None else None
        if samples is not None:
            self._set(Position(samples))

    def _known_ranks(self) -> Ranks | None:
        if self._rank is not None or self._world_size is not None:
            return Ranks.find(self._rank, self._world_size)
        if self._inherited is not None and get_worker_info() is not None:
            return self._inherited  # a worker has the rank of its parent, which its own environment need not name
        return Ranks.of_process() or self._inherited

    def units(self, ranks: Ranks) -> Units:
        """Returns how a step is cut into batches."""
        return Units.of(self.source.order.global_batch, ranks.world, self._batch_size)

    def next_unit(self, units: Units, position: Position | None = None) -> int:
        """Returns the batch that begins at a position, by default the current one.

        Raises:
            DataError: the position lies within a batch, or within a step that another number of ranks has begun.
        """
        if position is None:
            position = Position(self.position, self._shared_by)
        unit, taken = units.at(position.samples, position.world)
        if taken:
            raise DataError(
                f"position {position.samples} lies within a batch of {units.batch} samples a rank",
                where="samples",
                hint="Use the batch_size as before, or save after complete steps",
            )
        return unit

    def advance(self, units: Units, unit: int) -> None:
        """Records that a loader has handed out all batches before a unit."""
        self._position, self._shared_by = units.position(unit), units.world

    def transformed(self, sample: Sample) -> Any:
        """Returns what is yielded for a sample."""
        return sample if self.transform is None else self.transform(sample)

    def account(self, rank: int, worker: int) -> BadSamples:
        """Returns the account of bad samples of this process."""
        if self.bad_samples is None:
            settings = self.source.settings
            self.bad_samples = BadSamples(
                bad_samples_file(self._folder, rank, worker),
                budget=settings.max_bad_fraction,
                window=settings.bad_fraction_window,
            )
        return self.bad_samples

    def prefetcher(self, ranks: Ranks) -> Prefetcher | None:
        """Returns what fills the cache of this node with the shards that come next; ``None`` if they are on disks."""
        source = self.source
        store = source.reader.store
        store.prefetched = Prefetcher.useful(source.manifest, store)
        if not store.prefetched:
            return None
        order = source.order
        return Prefetcher(
            source.manifest,
            order,
            store,
            world=ranks.world,
            rank=ranks.rank,
            last=None,
            horizon=min(2 * order.block_size * order.streams // order.global_batch, 2 * order.steps_per_epoch + 2),
            share=1 / ranks.local_world,
        )

    def _check_fork(self) -> None:
        """Rejects forked workers for object storage: the threads of its client, which the parent has used, are missing."""
        if self._pid != os.getpid() and self.source.manifest.shards.may_be_remote:
            raise ConfigError(
                "forked workers cannot read object storage",
                where="DataLoader",
                hint="Pass multiprocessing_context='forkserver', or use dataset.loader(num_workers=…)",
            )

    def __getstate__(self) -> dict[str, Any]:
        # The copy may go to a worker of this rank, which cannot find the rank, or to a process that is to become another rank.
        inherited = self._inherited
        with contextlib.suppress(ConfigError):  # the process that reads samples raises it
            inherited = self._known_ranks() or inherited
        return {**self.__dict__, "bad_samples": None, "_inherited": inherited}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pid = os.getpid()
