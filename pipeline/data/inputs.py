"""Finds, indexes and validates all data of a run before ranks start: shards, indexes, order, batch sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config
from pipeline.data.augment.curriculum import stage_ends
from pipeline.data.augment.plan import PLAN_VERSION
from pipeline.data.formats.channels import channels_identity
from pipeline.data.index.manifest import Manifest
from pipeline.data.indexing import Indexer, Progress, indexed, open_storage
from pipeline.data.inspect.columns import columns_of, shortened
from pipeline.data.order.default_streams import default_streams, extents_of
from pipeline.data.order.order import Order, Source
from pipeline.data.overlap import check_held_out
from pipeline.data.selections.apply import selection_identity, weights_of
from pipeline.errors import ConfigError, DataError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_json

DATA_STATE_VERSION = 1
_INSPECTED = 512  # samples whose metadata is looked at before a run


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


def prepare(config: Config, world: int, progress: Progress | None = None, *, reuse: bool = False) -> Inputs:
    """Validates and indexes everything a run reads.

    Args:
        config: the settings.
        world: number of ranks.
        progress: called for each shard indexed.
        reuse: whether another process of the run has done so already: see :class:`pipeline.data.indexing.Indexer`.

    Raises:
        DataError, ConfigError: the data or the settings cannot be used.
    """
    indexer = Indexer(config, progress, reuse)
    train, sources = _training_set(config, indexer)
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    streams = config.data.canonical_streams or _streams_of_checkpoints(config)
    if streams is None:
        extents = extents_of(train.sizes, train.shards.sizes, sources)
        streams = default_streams(batch, extents, config.data.shuffle_block_size)
    weights = weights_of(train, sources)
    order = Order(train.sizes, config.run.seed, batch, streams, config.data.shuffle_block_size, sources, weights)
    order.check_world(world)
    if micro is not None and batch % (world * micro):
        raise ConfigError(
            f"{batch} samples are not divisible by {world} ranks times {micro}",
            where="train.micro_batch_size",
            hint=f"Choose a divisor of {batch // world}",
        )
    check_warmups(config, order.samples_per_epoch)
    check_curriculum(config, order.samples_per_epoch)
    if not reuse:
        check_columns(config, train)
    inputs = Inputs(train, None, None, order, sources)
    return replace(inputs, **_evaluation_data(config, indexer, train, trained=False)) if config.evaluation.enabled else inputs


def _streams_of_checkpoints(config: Config) -> int | None:
    """Number of streams of the checkpoint that the run resumes from; ``None`` if there is none, or it has another batch size."""
    checkpoints = RunDirectory(config.run.folder).checkpoints
    folders = sorted(checkpoints.glob("step_*"), reverse=True)
    if config.checkpoint.resume not in ("auto", "never"):
        folders.append(Path(config.checkpoint.resume))
    for folder in folders:
        try:
            data = read_json(folder / "manifest.json")["data"]
            streams, batch = data["lanes"], data["global_batch"]
        except (OSError, ValueError, KeyError, TypeError, DataError):
            continue
        same = type(streams) is int and streams > 0 and batch == config.train.global_batch_size and batch % streams == 0
        return streams if same else None
    return None


def _training_set(config: Config, indexer: Indexer) -> tuple[Manifest, tuple[Source, ...]]:
    """Returns the indexed training set, and the data sets that it consists of."""
    require = ("caption",) if config.method.reads_text and config.data.missing_caption == "exclude" else ()
    return indexer.training_set(require)


def evaluation_data(config: Config, *, trained: bool = False) -> dict[str, Any]:
    """Returns the data of evaluations: ``bank``, ``queries`` and ``dense`` of :class:`Inputs`, as far as they are used.

    Args:
        config: the settings.
        trained: whether the network was trained on ``data.shards``.

    Raises:
        DataError: no shard matches, shards cannot be used, or training and evaluation samples overlap.
    """
    return _evaluation_data(config, Indexer(config), None, trained=trained)


def _evaluation_data(config: Config, indexer: Indexer, train: Manifest | None, *, trained: bool) -> dict[str, Any]:
    """``train`` is the training set, if it is indexed already: the feature bank unless another is set."""
    manifests: dict[str, Any] = {}
    if config.evaluation.uses_knn_images:
        if config.evaluation.knn.train_shards or not (trained or train is not None):
            manifests["bank"] = indexer.one(config.voting_shards)
        else:
            manifests["bank"] = train if train is not None else _training_set(config, indexer)[0]
        try:
            manifests["queries"] = indexer.one(config.validation_shards)
        except DataError as error:
            if config.evaluation.knn.val_shards is not None or "no shard matches" not in str(error):
                raise
            raise DataError(
                "there are no labeled validation shards beside the training shards",
                where=f"evaluation.knn.val_shards, by default {config.validation_shards[0]}",
                hint="Name some, or turn the evaluation off: evaluation.knn.enabled=false",
            ) from error
        if not indexer.reuse:
            _check_labelled(config, manifests["bank"], manifests["queries"], train, trained)
    s = config.evaluation.segmentation
    if s.enabled:
        pair = [indexer.one(p or (), ("segmentation",)) for p in (s.train_shards, s.val_shards)]
        hint = "Give evaluation.segmentation.train_shards and val_shards no shard in common"
        if not indexer.reuse:
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


def check_columns(config: Config, train: Manifest | None = None) -> None:
    """Checks on some samples that the columns that guide training are in their JSON, with values that are declared.

    Args:
        config: the settings.
        train: index of the training set; by default it is indexed.

    Raises:
        DataError: a column is absent, or none of its values is declared.
    """
    if not config.guidance.columns:
        return
    seen = columns_of(train or _training_set(config, Indexer(config))[0], open_storage(config, at_start=True), most=_INSPECTED)
    for column in config.guidance.columns:
        seen.require(column.name)
        if not (values := seen.values[column.name]).keys() & set(column.values):
            raise DataError(
                f"none of the values of {column.name!r} in {seen.samples} samples is declared",
                where="guidance.columns",
                hint=f"Declare its values, such as {shortened(values)}",
            )


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


def check_curriculum(config: Config, epoch_samples: int) -> None:
    """Rejects a curriculum with a stage that has no steps, or in whose run no step has views of the full size.

    Args:
        config: the settings.
        epoch_samples: samples of the training set.

    Raises:
        ConfigError: with the steps.
    """
    batch, lengths = config.train.global_batch_size, [stage.until for stage in config.method.views.curriculum]
    steps = config.train.duration.steps(epoch_samples, batch)
    ends = stage_ends(lengths, epoch_samples=epoch_samples, global_batch=batch)
    if ends and ends[-1] >= steps:
        raise ConfigError(
            f"the last stage ends at step {ends[-1]} in a run of {steps}, so that no step has views of the full size",
            where="method.views.curriculum",
            hint="End it earlier, or make train.duration longer",
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
        "selection": selection_identity(inputs.train),
        "channels": channels_identity(inputs.train.fields.channels),
    }
