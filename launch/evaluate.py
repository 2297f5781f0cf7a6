"""``fovea eval``: what the weights of a run's newest checkpoint are worth, judged by the very code that judges while training.

The trained network (the teacher, where the method has one) stands beside the same network as it was before the first step, and
beside the pixels themselves.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launch.local import free_port
from pipeline.config import Loaded
from pipeline.errors import CheckpointError, DataError
from pipeline.settings import Config
from pipeline.training import saved as files
from pipeline.training.inputs import Inputs, open_storage, prepare
from pipeline.training.run import RunDirectory
from pipeline.training.saved import Saved

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.data.manifest import Manifest
    from pipeline.data.views import Batch, Normalize
    from pipeline.recipes.base import Recipe
    from pipeline.training.distributed import World

SOURCES = {"trained": "trained network", "untrained": "same network, untrained", "pixels": "raw pixels"}
"""What is judged, by the names of :func:`scores`, in words."""
_METRICS = {"knn": "trained", "untrained": "untrained", "pixels": "pixels"}


def newest(run: Path) -> Saved:
    """The newest whole checkpoint of a run; damaged newer ones are told of on stderr.

    Raises:
        CheckpointError: there is none.
    """
    found, complaints = files.newest(RunDirectory(run).checkpoints)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    if found is None:
        raise CheckpointError(
            "the run has no checkpoint yet",
            where=str(RunDirectory(run).checkpoints),
            mend="Let it train until its first checkpoint (checkpoint.every), or name another run.",
        )
    return found


def load_trained(config: Config, saved: Saved, device: torch.device) -> Recipe:
    """The method with the networks of a checkpoint that are worth judging; a student whose teacher is judged stays as it began.

    Args:
        config: the run's settings.
        saved: the checkpoint.
        device: where the networks go.

    Raises:
        CheckpointError: the checkpoint holds another architecture.
    """
    from pipeline.training.assemble import make_recipe

    recipe = make_recipe(config, device)
    fill_trained(recipe, saved)
    return recipe


def fill_trained(recipe: Recipe, saved: Saved) -> None:
    """Put the weights of a checkpoint into a method, strictly: its teacher's, and the student's where it exports those.

    Raises:
        CheckpointError: names or shapes differ.
    """
    import torch

    from pipeline.training.checkpoint import read_student, read_teacher

    exported = {id(p) for module in recipe.export().values() for p in module.parameters()}
    student = dict(recipe.named_parameters())
    trainable = {name for name, p in student.items() if p.requires_grad}
    if recipe.teacher is not None:
        _fitting(dict(recipe.teacher.named_parameters()), trainable, saved, "teacher's")
        recipe.teacher.load_state_dict(dict(read_teacher(saved)))
    if any(id(p) in exported for p in student.values()):
        _fitting(student, trainable, saved, "student's")
        whole = {**student, **dict(recipe.named_buffers())}  # batch norms keep their means there
        with torch.no_grad():
            for name, tensor in read_student(saved):
                whole[name].copy_(tensor)


def _fitting(own: Mapping[str, Tensor], trainable: set[str], saved: Saved, whose: str) -> None:
    """Shapes come first, so that a checkpoint of a larger network is refused before its gigabytes are read."""
    ours = {name: list(tensor.shape) for name, tensor in own.items() if name in trainable}
    theirs = {name: shape for name, shape in saved.manifest["shapes"].items() if name in ours}
    wrong = [name for name in ours if name in theirs and theirs[name] != ours[name]] or sorted(ours.keys() - theirs.keys())
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} of the {whose} weights do not fit, the first is {first}: "
            f"{theirs.get(first, 'absent')} in the checkpoint, {ours[first]} by the settings",
            where=str(saved.path),
            mend="Evaluate with the settings it was trained with: leave model.* and recipe.* as they are.",
        )


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
                mend="Name labelled shards: evaluation.knn.val_shards='/data/val-*.tar'.",
            ) from error
        raise
    for key, role, manifest in (("val_shards", "judged", inputs.queries), ("train_shards", "vote", inputs.bank)):
        if manifest is None or not manifest.classes:
            raise DataError(
                f"the shards {'to be judged' if role == 'judged' else 'that vote'} have no class number",
                where=f"evaluation.knn.{key}",
                mend=f"Name shards whose samples have a .{config.data.label} member.",
            )
    return inputs


def judging(config: Config) -> Config:
    """The settings with k-NN switched on, baselines and all, whatever training did."""
    knn = config.evaluation.knn.model_copy(update={"enabled": True, "baselines": True})
    return config.replace(evaluation=config.evaluation.model_copy(update={"knn": knn}))


@contextlib.contextmanager
def world_of_one(config: Config) -> Iterator[World]:
    """A process group with this process alone: on the GPU if there is one, unless the settings say gloo."""
    from pipeline.training.distributed import join, leave

    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
    backend = "gloo" if config.launch.backend == "gloo" else "auto"
    key = secrets.token_hex(8)
    world = join(rank=0, size=1, local_rank=0, address="127.0.0.1", port=free_port(), key=key, backend=backend)
    try:
        yield world
    finally:
        leave()


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
    return _judge(judging(config), newest(run))[0]


def _judge(config: Config, saved: Saved) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    inputs = labelled(config)
    from pipeline.training.assemble import Evaluations, make_recipe

    found: dict[str, dict[int, float]] = {name: {} for name in SOURCES}
    with world_of_one(config) as world:
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


def run(run_directory: Path, loaded: Loaded) -> int:
    """Judge a run, print the table, write ``<run>/evaluation.json``; returns the exit code.

    Args:
        run_directory: the run.
        loaded: its settings, with what the user changed.

    Raises:
        FoveaError: no checkpoint, no labelled data, or a checkpoint of another architecture.
    """
    config, saved = judging(loaded.config), newest(run_directory)
    found, sizes = _judge(config, saved)
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
    RunDirectory(run_directory).write("evaluation.json", document)
    _print(found, document)
    return 0


def _side(config: Config) -> int | None:
    views = getattr(config.recipe, "views", None)
    return config.evaluation.knn.size or getattr(views, "global_size", None) or getattr(config.recipe, "image_size", None)


def _print(found: dict[str, dict[int, float]], about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    ks = sorted(found["trained"])
    table = Table(title=f"k-NN accuracy of {about['checkpoint']}", title_justify="left")
    table.add_column("features")
    for k in ks:
        table.add_column(f"k = {k}", justify="right")
    for source, words in SOURCES.items():
        best = source == "trained"
        table.add_row(words, *(f"{100 * found[source][k]:.1f} %" for k in ks), style="bold" if best else None)
    console = Console()
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
    from pipeline.data.feeder import Portions
    from pipeline.data.ledger import Ledger
    from pipeline.data.reader import Reader
    from pipeline.data.stream import BatchStream, StreamOptions
    from pipeline.data.views import Normalize, ViewSpec
    from pipeline.evaluation.online import FixedList

    order = FixedList(ids, config.evaluation.knn.batch)
    reader = Reader(manifest, wants=("image", "label", "caption"), checksum=config.data.crc, store=open_storage(config))
    spec = ViewSpec("image", 1, size, None, normalize=normalize or Normalize())
    dataset = Portions(reader, order, (spec,), seed=0, world=1, rank=0)
    options = StreamOptions(micro_batch=order.global_batch, workers=0, threads=config.data.decode_threads, hue="off")
    for _, batches in BatchStream(dataset, device=device, options=options, ledger=Ledger(None, budget=1.0), last=len(order)):
        yield from batches


def principal(tokens: Tensor) -> tuple[NDArray[np.float32], float]:
    """The three directions in which tokens differ most, as colours.

    Args:
        tokens: ``[pictures, patches, width]``; the directions are fitted over all pictures together.

    Returns:
        float32 ``[pictures, patches, 3]`` in 0..1 (1st to 99th percentile of each direction), and the share of the variance
        that the three explain.
    """
    import torch

    flat = tokens.detach().double().cpu().flatten(0, 1)
    flat = flat - flat.mean(0)
    values, vectors = torch.linalg.eigh(flat.T @ flat / max(len(flat) - 1, 1))
    three = flat @ vectors[:, -3:].flip(1)
    three = three * torch.where((three**3).sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    low, high = torch.quantile(three, 0.01, dim=0), torch.quantile(three, 0.99, dim=0)
    colours = ((three - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    share = float(values[-3:].sum() / values.sum().clamp_min(1e-300))
    return colours.view(*tokens.shape[:2], -1).float().numpy(), share


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
