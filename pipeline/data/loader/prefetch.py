"""Prefetches shards: a thread follows the sample order and fills the node's cache ahead of the readers."""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from pipeline.data.index.manifest import Manifest
from pipeline.data.storage import ObjectStat, Storage, is_remote
from pipeline.errors import DataError

_log = logging.getLogger(__name__)
_RETRY = 5.0  # seconds


class Route(Protocol):
    """The part of a sample order that a prefetcher uses."""

    streams: int

    def streams_of(self, world: int, rank: int) -> range:
        """Returns the streams that a rank reads."""
        ...

    def shards(self, first: int, last: int, streams: range) -> list[int]:
        """Returns the numbers of the shards that some streams read in steps ``[first, last)``, in order of first use."""
        ...


class Prefetcher:
    """Keeps the shards of the next steps in the cache.

    Args:
        manifest: the shards.
        route: the order of the run.
        storage: access to the shards; its cache is filled.
        world: number of ranks.
        rank: this rank; it fetches for its own streams, and shards shared by ranks of a node are downloaded once. Ranks of one
            stream begin with different shards of it.
        last: one past the last step of the run.
        horizon: steps to look ahead.
        share: fraction of the cache that this rank may fill.
    """

    def __init__(
        self,
        manifest: Manifest,
        route: Route,
        storage: Storage,
        *,
        world: int,
        rank: int,
        last: int | None,
        horizon: int,
        share: float = 1.0,
    ) -> None:
        self._manifest, self._route, self._storage = manifest, route, storage
        self._streams = route.streams_of(world, rank)
        self._turn, self._turns = rank, max(world // route.streams, 1)
        self._last, self._horizon, self._share = last, max(horizon, 1), share
        self._step = 0
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fovea-prefetch", daemon=True)

    @staticmethod
    def useful(manifest: Manifest, storage: Storage) -> bool:
        """Whether there is anything to prefetch."""
        return storage.settings.access == "cache" and manifest.shards.may_be_remote

    def start(self, step: int) -> None:
        """Starts at a step."""
        self._step = step
        self._thread.start()

    def advance(self, step: int) -> None:
        """Reports the current step of the readers."""
        self._step = step
        self._changed.set()

    def close(self) -> None:
        """Stops; a download in progress completes, or ends with the process."""
        self._stop.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)
        cache = self._storage.cache
        if cache is not None:
            cache.close()

    def needed(self, step: int) -> list[ObjectStat]:
        """Returns the shards of the next steps in order of use, as many as the cache may hold for this rank."""
        last = step + self._horizon if self._last is None else min(step + self._horizon, self._last)
        cache = self._storage.cache
        room = int(cache.limit * self._share) if cache is not None else 0
        objects: list[ObjectStat] = []
        for number in self._route.shards(step, last, self._streams):
            about = self._manifest.shards[number].about
            if is_remote(about.url):
                room -= about.size
                if room < 0 and objects:
                    break
                objects.append(about)
        return objects

    def _work(self) -> None:
        while not self._stop.is_set():
            self._changed.clear()
            step = self._step
            try:
                self._fetch(step)
            except DataError as error:  # the reader that needs the shard will wait, or report the error
                _log.warning("prefetching: %s", error)
                self._stop.wait(_RETRY)
                continue
            begun = time.monotonic()
            # Checking after each step would cost more than it gains: an eighth of the horizon is often enough.
            while not self._stop.is_set() and self._step < step + max(self._horizon // 8, 1):
                self._changed.wait(timeout=1.0)
                self._changed.clear()
                if time.monotonic() - begun > 60.0:
                    break

    def _fetch(self, step: int) -> None:
        cache = self._storage.cache
        objects = self.needed(step)
        if cache is None:
            return
        cache.need(objects)
        for about in self._in_turn(objects):
            if self._stop.is_set():
                return
            if not cache.has(about) and not self._storage.fetch(about):
                return  # no room: prefetched shards must be read first

    def _in_turn(self, objects: list[ObjectStat]) -> list[ObjectStat]:
        """Own shards first: several ranks that read the same ones, each waiting for the others, would download one at a time."""
        own = self._turn % self._turns
        return [*objects[own :: self._turns], *(about for n, about in enumerate(objects) if n % self._turns != own)]
