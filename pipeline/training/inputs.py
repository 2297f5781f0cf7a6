"""All about the data that can be known, and refused, before a rank is started: shards, indexes, order, batch arithmetic."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data import storage
from pipeline.data.index import build
from pipeline.data.manifest import Fields, Manifest
from pipeline.data.order import Order
from pipeline.data.plan import PLAN_VERSION
from pipeline.errors import CheckpointError, ConfigError, DataError
from pipeline.settings import Config
from pipeline.training.saved import Saved

DATA_STATE_VERSION = 1
_START_GRACE = 20.0  # seconds


@dataclass(frozen=True)
class Inputs:
    """Indexed data sets of a run.

    Attributes:
        train: what is trained on.
        bank, queries: labelled data of the k-NN evaluation, ``None`` if it is off.
        order: which sample comes when.
    """

    train: Manifest
    bank: Manifest | None
    queries: Manifest | None
    order: Order


def fields(config: Config) -> Fields:
    """What makes a sample, as the settings say."""
    d = config.data
    return Fields(images=d.image, caption=d.caption, label=d.label, min_side=d.min_side, max_pixels=d.max_pixels)


def open_storage(config: Config, *, at_start: bool = False) -> storage.Storage:
    """The door to a run's shards. At the start there is little patience: nothing is lost yet, and somebody waits."""
    settings = config.data.storage
    return storage.Storage(settings.model_copy(update={"grace": min(settings.grace, _START_GRACE)}) if at_start else settings)


def indexed(config: Config, patterns: Sequence[str], progress: Callable[[int, int, Any], None] | None = None) -> Manifest:
    """Find and index shards; what was indexed before and has not changed is reused.

    Raises:
        DataError: no shard matches, or shards cannot be used.
    """
    store = open_storage(config, at_start=True)
    urls = storage.expand(patterns, store)
    directory = config.data.index_folder(urls)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"the index of the shards cannot be kept here ({error.strerror})",
            where=str(directory),
            mend="set data.index to a folder",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(urls, directory, fields=fields(config), damaged=config.data.damaged, progress=progress, store=store)


def prepare(config: Config, world: int, progress: Callable[[int, int, Any], None] | None = None) -> Inputs:
    """Check and index everything a run reads.

    Args:
        config: the settings.
        world: number of ranks.
        progress: told of each shard indexed.

    Raises:
        DataError, ConfigError: with what is wrong and how to mend it.
    """
    train = indexed(config, config.data.shards, progress)
    batch, micro = config.train.global_batch, config.train.micro_batch
    order = Order(train.sizes, config.run.seed, batch, config.data.lanes, config.data.block)
    order.check_world(world)
    if micro is not None and batch % (world * micro):
        raise ConfigError(
            f"{batch} samples do not divide by {world} ranks times {micro}",
            where="train.micro_batch",
            mend=f"choose a divisor of {batch // world}",
        )
    knn = config.evaluation.knn
    if not knn.enabled:
        return Inputs(train, None, None, order)
    bank = indexed(config, config.voting_shards, progress) if knn.train_shards else train
    return Inputs(train, bank, indexed(config, config.validation_shards, progress), order)


def data_identity(inputs: Inputs) -> dict[str, Any]:
    """What decides which samples come when and how they look: part of every checkpoint, and the same in all attempts."""
    return {
        "version": DATA_STATE_VERSION,
        "plan": PLAN_VERSION,
        "fingerprint": inputs.train.fingerprint,
        "seed": inputs.order.seed,
        "global_batch": inputs.order.global_batch,
        "lanes": inputs.order.lanes,
        "block": inputs.order.block,
    }


def check_data(saved: Saved, inputs: Inputs) -> None:
    """Refuse to resume over other data or in another order.

    Raises:
        CheckpointError: what the checkpoint was trained on, and what the shards hold now.
    """
    data = saved.manifest["data"]
    now = data_identity(inputs)
    changed = [f"{name} was {data.get(name)!r} and is {value!r}" for name, value in now.items() if data.get(name) != value]
    if changed:
        raise CheckpointError(
            f"the data of this run have changed ({'; '.join(changed)})",
            where=str(saved.path),
            mend=f"resume over the {data['samples']} samples it was trained on, or start a new run in another run.directory",
        )
