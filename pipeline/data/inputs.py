"""Finds, indexes and validates all data of a run before ranks start: shards, indexes, order, batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.schema import Config
from pipeline.data import storage
from pipeline.data.augment.plan import PLAN_VERSION
from pipeline.data.index.build import build
from pipeline.data.index.filters import narrow
from pipeline.data.index.manifest import Fields, Manifest
from pipeline.data.order.order import Order, Source
from pipeline.data.overlap import check_held_out
from pipeline.errors import ConfigError, DataError
from pipeline.runtime.locks import lock

DATA_STATE_VERSION = 1
_START_GRACE = 20.0  # seconds


@dataclass(frozen=True)
class Inputs:
    """Indexed data sets of a run.

    Attributes:
        train: training set.
        bank, queries: labelled samples that evaluations learn from, and samples they are evaluated on; ``None`` if no enabled
            evaluation uses them.
        order: the order of the training samples.
        sources: the data sets that ``train`` consists of, in the order of their shards; empty for a single unnamed one.
        dense: segmentation data sets, for training a probe and for evaluation.
    """

    train: Manifest
    bank: Manifest | None
    queries: Manifest | None
    order: Order
    sources: tuple[Source, ...] = ()
    dense: tuple[Manifest, Manifest] | None = None


def fields(config: Config) -> Fields:
    """Returns which members make a sample, according to the settings."""
    d = config.data
    return Fields(
        images=d.image_extensions,
        caption=d.caption_extension,
        caption_lines=d.caption_lines,
        label=d.label_extension,
        min_side=d.min_side,
        max_pixels=d.max_pixels,
    )


def open_storage(config: Config, *, at_start: bool = False) -> storage.Storage:
    """Returns access to a run's shards. At startup it times out sooner: no progress can be lost yet, and the user is waiting."""
    settings = config.data.storage
    return storage.Storage(
        settings.model_copy(update={"outage_timeout": min(settings.outage_timeout, _START_GRACE)}) if at_start else settings
    )


def indexed(
    config: Config,
    patterns: Sequence[str],
    progress: Callable[[int, int, Any], None] | None = None,
    *,
    require: tuple[str, ...] = (),
) -> Manifest:
    """Finds and indexes shards; an existing index is reused where the shards have not changed.

    Args:
        config: the settings.
        patterns: paths or URLs of shards.
        progress: called for each shard indexed.
        require: parts without which a sample is excluded, of ``caption``, ``label`` and ``segmentation``.

    Raises:
        DataError: no shard matches, or shards cannot be used.
    """
    return _index(config, storage.expand(patterns, open_storage(config, at_start=True)), progress, require)


def _index(
    config: Config, urls: Sequence[str], progress: Callable[[int, int, Any], None] | None, require: tuple[str, ...]
) -> Manifest:
    directory = config.data.index_folder(urls)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a")
    except OSError as error:
        raise DataError(
            f"the index of the shards cannot be stored here ({error.strerror})",
            where=str(directory),
            hint="Set data.index to a folder",
        ) from error
    with file:
        lock(file.fileno(), file.name)
        store = open_storage(config, at_start=True)
        manifest = build(
            urls, directory, fields=fields(config), on_truncated=config.data.on_truncated_shard, progress=progress, store=store
        )
        return narrow(manifest, directory / f"with-{'-'.join(require)}", require) if require else manifest


def prepare(config: Config, world: int, progress: Callable[[int, int, Any], None] | None = None) -> Inputs:
    """Validates and indexes everything a run reads.

    Args:
        config: the settings.
        world: number of ranks.
        progress: called for each shard indexed.

    Raises:
        DataError, ConfigError: the data or the settings cannot be used.
    """
    train, sources = _training_set(config, progress)
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    order = Order(train.sizes, config.run.seed, batch, config.data.canonical_streams, config.data.shuffle_block_size, sources)
    order.check_world(world)
    if micro is not None and batch % (world * micro):
        raise ConfigError(
            f"{batch} samples are not divisible by {world} ranks times {micro}",
            where="train.micro_batch_size",
            hint=f"Choose a divisor of {batch // world}",
        )
    check_warmups(config, order.samples_per_epoch)
    inputs = Inputs(train, None, None, order, sources)
    return replace(inputs, **evaluation_data(config, train, progress)) if config.evaluation.enabled else inputs


def _training_set(config: Config, progress: Callable[[int, int, Any], None] | None = None) -> tuple[Manifest, tuple[Source, ...]]:
    """Returns the indexed training set, and the data sets that it consists of."""
    require = ("caption",) if config.method.reads_text and config.data.missing_caption == "exclude" else ()
    urls, sources = _training_shards(config)
    return _index(config, urls, progress, require), sources


def evaluation_data(
    config: Config,
    train: Manifest | None = None,
    progress: Callable[[int, int, Any], None] | None = None,
    *,
    trained: bool = False,
) -> dict[str, Any]:
    """Returns the data of a run's evaluations: ``bank``, ``queries`` and ``dense`` of :class:`Inputs`, as far as they are used.

    Args:
        config: the settings.
        train: the training set, if it is indexed already; used as the feature bank unless another is set.
        progress: called for each shard indexed.
        trained: whether the network was trained on ``data.shards``; with ``train`` it was.

    Raises:
        DataError: no shard matches, shards cannot be used, or training and evaluation samples overlap.
    """
    manifests: dict[str, Any] = {}
    if config.evaluation.uses_knn_images:
        if config.evaluation.knn.train_shards or not (trained or train is not None):
            manifests["bank"] = indexed(config, config.voting_shards, progress)
        else:
            manifests["bank"] = train if train is not None else _training_set(config, progress)[0]
        try:
            manifests["queries"] = indexed(config, config.validation_shards, progress)
        except DataError as error:
            if config.evaluation.knn.val_shards is not None or "no shard matches" not in str(error):
                raise
            raise DataError(
                "there are no labeled validation shards beside the training shards",
                where=f"evaluation.knn.val_shards, by default {config.validation_shards[0]}",
                hint="Name some, or turn the evaluation off: evaluation.knn.enabled=false",
            ) from error
        _check_labelled(config, manifests["bank"], manifests["queries"], train, trained)
    s = config.evaluation.segmentation
    if s.enabled:
        pair = [indexed(config, p or (), progress, require=("segmentation",)) for p in (s.train_shards, s.val_shards)]
        hint = "Give evaluation.segmentation.train_shards and val_shards no shard in common"
        check_held_out(pair[0], pair[1], where="evaluation.segmentation.val_shards", hint=hint)
        manifests["dense"] = (pair[0], pair[1])
    return manifests


def _check_labelled(config: Config, bank: Manifest, queries: Manifest, train: Manifest | None, trained: bool) -> None:
    """Checks that no evaluated sample votes, trains a probe, or was seen by the network with its caption.

    Raises:
        DataError: with the shards.
    """
    knn, evaluation = config.evaluation.knn, config.evaluation
    where = "evaluation.knn.val_shards" + ("" if knn.val_shards else f", by default {config.validation_shards[0]}")
    apart = "such as data.shards='…/train-*.tar'"
    if evaluation.needing("bank"):
        other = "evaluation.knn.train_shards" if knn.train_shards else f"the training shards, {apart}"
        check_held_out(bank, queries, where=where, hint=f"Name others, or leave them out of {other}")
    if evaluation.needing("text_encoder") and (train is not None or trained):
        seen = train if train is not None else _trained_on(config, bank)
        hint = f"Name others, or leave them out of the training shards, {apart}"
        if seen is not None:
            check_held_out(seen, queries, where=where, hint=hint, learning="trained on")


def _trained_on(config: Config, bank: Manifest) -> Manifest | None:
    """Returns the training shards, which vote unless others are configured; ``None`` if they no longer exist."""
    if not config.evaluation.knn.train_shards:
        return bank
    try:
        return indexed(config, config.data.patterns)
    except DataError as error:
        if "no shard matches" not in str(error):
            raise
        return None


def _training_shards(config: Config) -> tuple[list[str], tuple[Source, ...]]:
    """Returns the training shards in order, and the data sets they belong to.

    Raises:
        DataError: no shard matches a pattern, or two data sets share a shard.
    """
    store = open_storage(config, at_start=True)
    if config.data.sources is None:
        return storage.expand(config.data.shards, store), ()
    urls: list[str] = []
    owner: dict[str, str] = {}
    sources = []
    for source in config.data.sources:
        own = storage.expand(source.shards, store)
        for url in own:
            if owner.setdefault(storage.absolute(url), source.name) != source.name:
                raise DataError(
                    f"the data sets {owner[storage.absolute(url)]!r} and {source.name!r} share a shard",
                    where=url,
                    hint="Give each shard to one set of data.sources; repeat or weight say how often it is seen",
                )
        sources.append(Source(source.name, len(urls), len(own), source.weight, source.repeat or 1.0))
        urls += own
    return urls, tuple(sources)


def check_warmups(config: Config, epoch_samples: int) -> None:
    """Rejects warmups longer than the run. For schedules that are constant after the warmup, a short run covers its beginning.

    Args:
        config: the settings.
        epoch_samples: samples of the training set.

    Raises:
        ConfigError: with the key and both lengths.
    """
    batch = config.train.global_batch_size
    steps = config.train.duration.steps(epoch_samples, batch)
    for name in type(config.schedule).model_fields:
        curve = getattr(config.schedule, name)
        if curve.shape != "constant" and curve.warmup.samples(epoch_samples, batch) > steps * batch:
            raise ConfigError(
                f"a warm-up of {curve.warmup.steps(epoch_samples, batch)} steps in a run of {steps}",
                where=f"schedule.{name}.warmup = {curve.warmup}",
                hint="Make it shorter, or train.duration longer",
            )


def data_identity(inputs: Inputs) -> dict[str, Any]:
    """Returns what determines the order and the augmentation of samples: part of every checkpoint, and equal in all attempts."""
    return {
        "version": DATA_STATE_VERSION,
        "plan": PLAN_VERSION,
        "fingerprint": inputs.train.fingerprint,
        "seed": inputs.order.seed,
        "global_batch": inputs.order.global_batch,
        "lanes": inputs.order.streams,
        "block": inputs.order.block_size,
        "sources": [[s.name, s.shards, s.weight, s.repeat] for s in inputs.sources] if len(inputs.sources) > 1 else None,
    }
