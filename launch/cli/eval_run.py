"""``fovea eval``: what the weights of a run's newest checkpoint are worth, judged by the very code that judges while training.

The trained network (the teacher, where the method has one) stands beside the same network as it was before the first step, and
beside the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launch.cli.eval_ranks import Telling, agreed, closing, world_here
from launch.rank_environment import RankEnvironment
from pipeline.checkpoint.files import Saved
from pipeline.config.load import Loaded
from pipeline.config.schema import Config
from pipeline.data.inputs import Inputs, open_storage, prepare
from pipeline.errors import DataError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.weights.from_checkpoint import fill_trained, named_or_newest, newest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.data.augment.views import Batch, Normalize
    from pipeline.data.index.manifest import Manifest
    from pipeline.methods.base import Recipe
    from pipeline.runtime.process_group import World

SOURCES = {"trained": "trained network", "untrained": "same network, untrained", "pixels": "raw pixels"}
"""What is judged, by the names of :func:`scores`, in words."""
_METRICS = {"knn": "trained", "untrained": "untrained", "pixels": "pixels"}


def load_trained(config: Config, saved: Saved, device: torch.device) -> Recipe:
    """The method with the networks of a checkpoint that are worth judging; a student whose teacher is judged stays as it began.

    Args:
        config: the run's settings.
        saved: the checkpoint.
        device: where the networks go.

    Raises:
        CheckpointError: the checkpoint holds another architecture.
    """
    from pipeline.training.build import make_recipe

    recipe = make_recipe(config, device)
    fill_trained(recipe, saved)
    return recipe


def labelled(config: Config) -> Inputs:
    """The indexed data sets of the evaluation, refused if they cannot answer.

    Raises:
        DataError: no shards to judge on, or shards without class numbers.
    """
    chosen = config.evaluation.knn.val_shards
    try:
        inputs = prepare(config, 1)
    except DataError as error:
        if chosen is None and any(pattern in str(error) for pattern in config.validation_shards):
            raise DataError(
                f"there are no validation shards {', '.join(config.validation_shards)}",
                where="evaluation.knn.val_shards",
                hint="Name labelled shards: evaluation.knn.val_shards='/data/val-*.tar'.",
            ) from error
        raise
    for key, role, manifest in (("val_shards", "judged", inputs.queries), ("train_shards", "vote", inputs.bank)):
        if manifest is None or not manifest.classes:
            raise DataError(
                f"the shards {'to be judged' if role == 'judged' else 'that vote'} have no class number",
                where=f"evaluation.knn.{key}",
                hint=f"Name shards whose samples have a .{config.data.label} member.",
            )
    return inputs


def judging(config: Config) -> Config:
    """The settings with k-NN switched on, baselines and all, whatever training did."""
    knn = config.evaluation.knn.model_copy(update={"baselines": True})
    chosen = config.evaluation.only("knn", knn=knn)
    return config.replace(evaluation=chosen.model_copy(update={"pictures": False}))


def scores(config: Config, run: Path) -> dict[str, dict[int, float]]:
    """k-NN accuracy of a run's newest checkpoint, of the same network untrained, and of raw pixels.

    Args:
        config: the run's settings; ``evaluation.knn`` says on what, with how many voters.
        run: the run's directory.

    Returns:
        By the names of :data:`SOURCES` the accuracy (0..1) for each number of voters.

    Raises:
        FoveaError: no checkpoint, no labelled data, or a checkpoint of another architecture.
    """
    config, saved = judging(config), newest(run)
    with world_here(config) as world:
        return _judge(config, saved, world)[0]


def _judge(config: Config, saved: Saved, world: World) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    inputs = labelled(config)
    from pipeline.evaluation.runner import Evaluations
    from pipeline.training.build import make_recipe

    found: dict[str, dict[int, float]] = {name: {} for name in SOURCES}
    recipe = make_recipe(config, world.device)
    evaluate = Evaluations(config, inputs, recipe, world, fresh=True)
    # The first call judges the fresh weights and the pixels, the second what was trained; pictures are decoded once.
    first = evaluate()
    fill_trained(recipe, saved)
    for name, value in {**first, **evaluate()}.items():
        source, _, k = name.partition("/k")
        found[_METRICS[source]][int(k)] = value
    return found, _sizes(config, inputs)


def _sizes(config: Config, inputs: Inputs) -> dict[str, int]:
    knn = config.evaluation.knn
    voters, judged = (manifest.total if manifest is not None else 0 for manifest in (inputs.bank, inputs.queries))
    classes = max(manifest.classes for manifest in (inputs.bank, inputs.queries) if manifest is not None)
    return {"voters": min(voters, knn.max_train or voters), "judged": min(judged, knn.max_val or judged), "classes": classes}


def run(
    run_directory: Path, loaded: Loaded, *, output: Path | None = None, track: str | None = None, checkpoint: Path | None = None
) -> int:
    """Judge a run, print the table, write ``<run>/evaluation.json``, tell MLflow; returns the exit code.

    All ranks that this was started on share the work.

    Args:
        run_directory: the run.
        loaded: its settings, with what the user changed.
        output: JSON file to write besides.
        track: another MLflow server than the run's own.
        checkpoint: directory of the one to judge, instead of the newest.

    Raises:
        FoveaError: no checkpoint, no labelled data, or a checkpoint of another architecture.
    """
    config = judging(loaded.config)
    first = [named_or_newest(run_directory, checkpoint)] if RankEnvironment.read().rank == 0 else []
    with world_here(config) as world:
        for saved in agreed(iter(first), world):
            found, sizes = _judge(config, saved, world)
            if world.rank == 0:
                _tell(run_directory, config, saved, found, sizes, output, track)
    return 0


def _tell(
    directory: Path,
    config: Config,
    saved: Saved,
    found: dict[str, dict[int, float]],
    sizes: dict[str, int],
    output: Path | None,
    track: str | None,
) -> None:
    samples = int(saved.manifest.get("samples_seen", 0))
    document: dict[str, Any] = {
        "checkpoint": saved.path.name,
        "step": saved.step,
        "samples_seen": samples,
        "size": _side(config),
        **sizes,
        "temperature": config.evaluation.knn.temperature,
        "knn": {source: {str(k): value for k, value in row.items()} for source, row in found.items()},
    }
    RunDirectory(directory).write("evaluation.json", document)
    if output is not None:
        RunDirectory(output.parent).write(output.name, document)
    _print(found, document)
    with closing(Telling.of_run(directory, config, track)) as telling:
        if telling is not None:
            rows = {source: {f"knn/k{k}": value for k, value in row.items()} for source, row in found.items()}
            telling(saved.step, rows, directory / "evaluation.json")


def _side(config: Config) -> int | None:
    views = getattr(config.recipe, "views", None)
    return config.evaluation.knn.size or getattr(views, "global_size", None) or getattr(config.recipe, "image_size", None)


def _print(found: dict[str, dict[int, float]], about: dict[str, Any]) -> None:
    from rich.table import Table

    from launch.terminal import Terminal

    ks = sorted(found["trained"])
    table = Table(title=f"k-NN accuracy of {about['checkpoint']}", title_justify="left")
    table.add_column("features")
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for source, words in SOURCES.items():
        best = source == "trained"
        table.add_row(words, *(f"{100 * found[source][k]:.1f} %" for k in ks), style="bold" if best else None)
    console = Terminal()
    console.print(table)
    console.print(
        f"after {about['samples_seen']:,} samples; {about['judged']:,} pictures judged by {about['voters']:,} voters, "
        f"{about['classes']} classes: guessing is right in {100 / max(about['classes'], 1):.1f} %",
        highlight=False,
    )


# ---- pictures to look at -------------------------------------------------------------------------------------------------


def varied(manifest: Manifest, count: int, among: int = 20_000) -> NDArray[np.uint64]:
    """The first samples of a data set that differ in class, then the first again: no choice by eye or by score.

    Args:
        manifest: the data set.
        count: how many samples.
        among: how many of the first samples to choose from.

    Returns:
        uint64 ``[count]`` sample numbers, fewer if the set is smaller.
    """
    ids = manifest.ids()[:among]
    labels = [int(manifest.column(int(number) >> 32, "label")[int(number) & 0xFFFFFFFF]) for number in ids]
    turns: dict[int, int] = {}
    keys = []
    for place, label in enumerate(labels):
        turns[label] = turns.get(label, -1) + 1
        keys.append((turns[label], place))
    return ids[[place for _, place in sorted(keys)[:count]]]


def shown(
    config: Config,
    manifest: Manifest,
    ids: NDArray[np.uint64],
    size: int,
    device: torch.device,
    normalize: Normalize | None = None,
) -> Iterator[Batch]:
    """Evaluation views (a centred square) of some samples, decoded and cut as in every evaluation.

    Args:
        config: the settings.
        manifest: the data set.
        ids: sample numbers.
        size: side of the square, pixels.
        device: where the views go.
        normalize: with which numbers; ImageNet's if not given.
    """
    from pipeline.data.augment.views import Normalize, ViewSpec
    from pipeline.data.loader.bad_samples import Ledger
    from pipeline.data.loader.batch_stream import BatchStream, StreamOptions
    from pipeline.data.loader.encoded_batches import Portions
    from pipeline.data.loader.reader import Reader
    from pipeline.evaluation.online import FixedList

    order = FixedList(ids, config.evaluation.knn.batch)
    reader = Reader(manifest, wants=("image", "label", "caption"), checksum=config.data.crc, store=open_storage(config))
    spec = ViewSpec("image", 1, size, None, normalize=normalize or Normalize())
    dataset = Portions(reader, order, (spec,), seed=0, world=1, rank=0)
    options = StreamOptions(micro_batch=order.global_batch, workers=0, threads=config.data.decode_threads, hue="off")
    for _, batches in BatchStream(dataset, device=device, options=options, ledger=Ledger(None, budget=1.0), last=len(order)):
        yield from batches


class Gallery:
    """Evaluation views of chosen samples, and the towers to show them to.

    Args:
        config: the run's settings.
        inputs: its indexed data sets; without any for evaluation, the training data serve.
        towers: the networks, ``trained`` among them.
        size: side of the views, pixels.
        device: where the towers are.

    Attributes:
        bank, queries: where neighbours are looked for, and what they are looked for to.
        judged: what the queries are, in a word.
    """

    def __init__(self, config: Config, inputs: Inputs, towers: dict[str, Any], size: int, device: torch.device) -> None:
        self._config, self._device = config, device
        self.towers, self.size = towers, size
        self.bank, self.queries = inputs.bank or inputs.train, inputs.queries or inputs.train
        self.judged = "validation" if self.queries is not self.bank else "training"

    def pictures(self, manifest: Manifest, ids: NDArray[np.uint64], size: int) -> tuple[Tensor, list[str]]:
        """Views ``[n, 3, size, size]`` of some samples, and their captions."""
        import torch

        batches = list(shown(self._config, manifest, ids, size, self._device))
        captions = [caption for batch in batches for caption in batch.captions or [""] * len(batch.keys)]
        return torch.cat([batch.views["image"][0] for batch in batches]), captions

    def classes(self, manifest: Manifest, ids: NDArray[np.uint64]) -> tuple[Tensor, list[int]]:
        """Normalised class tokens ``[n, width]`` of the trained tower, float64, and class numbers."""
        import torch
        from torch.nn import functional as F

        found, labels = [], []
        with torch.inference_mode():
            for batch in shown(self._config, manifest, ids, self.size, self._device):
                # In double precision: early in training all class tokens are alike to seven digits.
                found.append(F.normalize(self.towers["trained"](batch.views["image"][0]).cls.double().cpu(), dim=1))
                labels += batch.labels.tolist()
        return torch.cat(found), labels
