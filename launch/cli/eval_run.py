"""``fovea eval``: k-NN accuracy of a run's newest checkpoint, computed by the evaluator used during training.

Compares the trained network (the teacher, where the method has one) with the same network before the first step, and with raw
pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli.eval_ranks import EvalReporter, agreed, closing, world_here
from launch.rank_environment import RankEnvironment
from pipeline.checkpoint.files import Saved
from pipeline.config.load import Loaded
from pipeline.config.schema import Config
from pipeline.data.inputs import Inputs, prepare
from pipeline.errors import DataError
from pipeline.evaluation.gallery import SOURCES
from pipeline.runtime.run_directory import RunDirectory
from pipeline.weights.from_checkpoint import fill_trained, named_or_newest, newest

if TYPE_CHECKING:
    from pipeline.runtime.process_group import World

_METRICS = {"knn": "trained", "untrained": "untrained", "pixels": "pixels"}


def labelled(config: Config) -> Inputs:
    """Index the data sets of the evaluation and check that they can be evaluated.

    Raises:
        DataError: no shards to evaluate on, or shards without class numbers.
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
                hint=f"Name shards whose samples have a .{config.data.label_extension} member.",
            )
    return inputs


def judging(config: Config) -> Config:
    """The settings with k-NN and its baselines enabled, whatever the run's own settings."""
    knn = config.evaluation.knn.model_copy(update={"baselines": True})
    chosen = config.evaluation.only("knn", knn=knn)
    return config.replace(evaluation=chosen.model_copy(update={"log_images": False}))


def scores(config: Config, run: Path) -> dict[str, dict[int, float]]:
    """k-NN accuracy of a run's newest checkpoint, of the same network untrained, and of raw pixels.

    Args:
        config: the run's settings; ``evaluation.knn`` selects the data and the numbers of neighbours.
        run: the run directory.

    Returns:
        For each name in :data:`SOURCES`, the accuracy (0..1) by number of neighbours.

    Raises:
        FoveaError: no checkpoint, no labelled data, or a checkpoint of another architecture.
    """
    config, saved = judging(config), newest(run)
    with world_here(config) as world:
        return _judge(config, saved, world)[0]


def _judge(config: Config, saved: Saved, world: World) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    inputs = labelled(config)
    from pipeline.evaluation.runner import Evaluations
    from pipeline.methods.registry import build_seeded_method

    found: dict[str, dict[int, float]] = {name: {} for name in SOURCES}
    method = build_seeded_method(config, world.device)
    evaluate = Evaluations(config, inputs, method, world, fresh=True)
    # The first call evaluates the random weights and the pixels, the second the trained weights; images are decoded once.
    first = evaluate()
    fill_trained(method, saved)
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
    """Evaluate a run, print the table, write ``<run>/evaluation.json``, log to MLflow; returns the exit code.

    All ranks on which the command was started share the work.

    Args:
        run_directory: the run.
        loaded: its settings, with the user's overrides.
        output: additional JSON file to write.
        track: an MLflow server other than the run's own.
        checkpoint: directory of the checkpoint to evaluate, instead of the newest.

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
    with closing(EvalReporter.of_run(directory, config, track)) as telling:
        if telling is not None:
            rows = {source: {f"knn/k{k}": value for k, value in row.items()} for source, row in found.items()}
            telling(saved.step, rows, directory / "evaluation.json")


def _side(config: Config) -> int | None:
    return config.evaluation.knn.image_size or config.method.views.global_size


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
