"""``fovea eval``: what the weights of a run's newest checkpoint are worth, judged by the very code that judges while training.

The trained teacher stands beside the same network as it was before the first step, and beside the pixels themselves.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.local import free_port
from pipeline.config import Loaded
from pipeline.errors import CheckpointError, DataError
from pipeline.settings import Config
from pipeline.training import saved as files
from pipeline.training.inputs import Inputs, prepare
from pipeline.training.run import RunDirectory
from pipeline.training.saved import Saved

if TYPE_CHECKING:
    import torch

    from pipeline.recipes.base import Recipe
    from pipeline.training.distributed import World

SOURCES = {"trained": "trained teacher", "untrained": "same network, untrained", "pixels": "raw pixels"}
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


def load_teacher(config: Config, saved: Saved, device: torch.device) -> Recipe:
    """The method with the teacher of a checkpoint; its student keeps the initial weights.

    Args:
        config: the run's settings.
        saved: the checkpoint.
        device: where the networks go.

    Raises:
        CheckpointError: the checkpoint holds another architecture, or the method keeps no teacher.
    """
    from pipeline.training.assemble import make_recipe

    recipe = make_recipe(config, device)
    fill_teacher(recipe, saved)
    return recipe


def fill_teacher(recipe: Recipe, saved: Saved) -> None:
    """Put the teacher of a checkpoint into a method, strictly.

    Raises:
        CheckpointError: names or shapes differ, or the method keeps no teacher.
    """
    from pipeline.training.checkpoint import read_teacher

    if recipe.teacher is None:
        raise CheckpointError("the method keeps no teacher to judge", where="recipe.name", mend="Evaluate a method that has one.")
    # Shapes come first, so that a checkpoint of a larger network is refused before its gigabytes are read.
    own = {name: list(tensor.shape) for name, tensor in recipe.teacher.named_parameters()}
    theirs = {name: shape for name, shape in saved.manifest["shapes"].items() if name in own}
    wrong = [name for name in own if name in theirs and theirs[name] != own[name]] or sorted(own.keys() - theirs.keys())
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} of the teacher's weights do not fit, the first is {first}: "
            f"{theirs.get(first, 'absent')} in the checkpoint, {own[first]} by the settings",
            where=str(saved.path),
            mend="Evaluate with the settings it was trained with: leave model.* and recipe.* as they are.",
        )
    recipe.teacher.load_state_dict(dict(read_teacher(saved)))


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
        fill_teacher(recipe, saved)
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
    return config.evaluation.knn.size or getattr(views, "global_size", None)


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
