"""Evaluates checkpoints of runs and pretrained weights outside training: the library side of ``fovea eval``."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint import catalog, files
from pipeline.checkpoint.files import Saved
from pipeline.config.load import load
from pipeline.config.schema import Config
from pipeline.config.sizes import Size, is_divisible, size_text
from pipeline.config.validate import check
from pipeline.data.augment.views import Normalize
from pipeline.data.inputs import evaluation_data
from pipeline.errors import CheckpointError, ConfigError, DataError, FoveaError
from pipeline.evaluation.base import evaluate_all
from pipeline.evaluation.results import EvalResult, baseline_metric, is_evaluated
from pipeline.evaluation.runner import Evaluators, build_evaluators, check_channels, eval_model_of, evaluated_modules, placement
from pipeline.evaluation.settings import Need
from pipeline.evaluation.start import compare_with_start
from pipeline.methods.base import Method
from pipeline.methods.registry import build_seeded_method
from pipeline.models.eval_model import EvalModel, preserve_rng_and_mode
from pipeline.runtime.process_group import World
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_json
from pipeline.weights import init_from, pretrained
from pipeline.weights.from_checkpoint import fill_trained, named_or_newest

POLL = 10.0  # seconds between two checks for new checkpoints
Log = Callable[[str], None]


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        evaluators: names, as in the section ``evaluation`` of the settings.
        baselines: also evaluate the run's network before its first step, and raw pixels.
        watch: continue with each new checkpoint.
        checkpoint: directory of the checkpoint to evaluate, instead of the newest.
        between: also evaluate weights at these shares of the way from the run's initial weights (0) to the checkpoint (1), and
            how much each block has changed.
    """

    evaluators: tuple[str, ...] = ("knn",)
    baselines: bool = True
    watch: bool = False
    checkpoint: Path | None = None
    between: tuple[float, ...] = ()


def select(config: Config, evaluators: Sequence[str]) -> Config:
    """The settings with only some evaluators enabled, validated.

    Raises:
        ConfigError: there is no such evaluator, or a setting that it needs is missing.
    """
    names = config.evaluation.evaluators()
    if unknown := [name for name in evaluators if name not in names]:
        raise ConfigError(f"there is no evaluator {unknown[0]!r}", where="--only", hint=f"Choose one of {', '.join(names)}")
    chosen = config.replace(evaluation=config.evaluation.only(*evaluators))
    # Nothing is trained here, and whether pretrained weights have a text encoder is known only once they are loaded.
    problems = [text for key, text in check(chosen) if key.startswith("evaluation.") and not key.endswith(".enabled")]
    if problems:
        raise ConfigError("; ".join(problems), where="evaluation", hint="Give it as KEY=VALUE behind the run")
    return chosen


def settings_for_weights(overrides: Sequence[str]) -> Config:
    """Settings for pretrained weights without a run; only data and evaluations are used.

    Raises:
        ConfigError: invalid settings.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.yaml"
        file.write_text("model: {timm_name: vit_tiny_patch16_224}\nmethod: {name: clip}\n")
        return load(file, overrides).config


def check_request(config: Config, request: EvalRequest, run: Path | None = None) -> None:
    """Detect what cannot be evaluated before any rank is started; indexes the data on the way.

    Args:
        config: the settings.
        request: what to evaluate.
        run: the run, if its checkpoints are to be evaluated.

    Raises:
        FoveaError: no checkpoint, or data that the evaluators cannot use.
    """
    config = select(config, request.evaluators)
    if run is not None and not request.watch:
        named_or_newest(run, request.checkpoint)
    labelled_data(config, trained=run is not None)


def labelled_data(config: Config, *, trained: bool) -> dict[str, Any]:
    """The data sets that the enabled evaluators need, see :func:`pipeline.data.inputs.evaluation_data`.

    Args:
        config: the settings.
        trained: whether the network was trained on ``data.shards``.

    Raises:
        DataError: no shards to evaluate on, or shards without the class numbers that an evaluator needs.
    """
    data = evaluation_data(config, trained=trained)
    needs: tuple[tuple[Need, str], ...] = (("bank", "train_shards"), ("queries", "val_shards"))
    for name, key in needs:
        if config.evaluation.needing(name) and not data[name].classes:
            raise DataError(
                f"the shards of the {'feature bank' if name == 'bank' else 'queries'} have no class numbers",
                where=f"evaluation.knn.{key}",
                hint=f"Name shards whose samples have a .{config.data.label_extension} member",
            )
    return data


def evaluate_run(directory: Path, config: Config, request: EvalRequest, world: World, *, log: Log) -> Iterator[EvalResult]:
    """Evaluate a run's newest or selected checkpoint, or with ``watch`` every checkpoint until the last.

    All ranks iterate together, and get the same results.

    Args:
        directory: the run.
        config: its settings.
        request: what to evaluate.
        world: this rank's position in the process group.
        log: receives messages, on rank 0.

    Raises:
        FoveaError: no checkpoint, another architecture, or data that the evaluators cannot use.
    """
    config = select(config, request.evaluators)
    checkpoints: Iterator[Saved | None] = iter(())
    if world.rank == 0 and request.watch:
        checkpoints = wait_for_checkpoints(RunDirectory(directory))
    elif world.rank == 0:
        checkpoints = iter([named_or_newest(directory, request.checkpoint)])
    data = labelled_data(config, trained=True)
    method = build_seeded_method(config, world.device)
    view = method.views[0]
    evaluators = build_evaluators(config, placement(config, world, size=view.size, normalize=view.normalize), **data)
    model = eval_model_of(method, config, world.device)
    with preserve_rng_and_mode(evaluated_modules(method)):
        baselines = _baselines(method, config, evaluators, model, world, log) if request.baselines else {}
        about = _about(config, data, image_size=view.size)
        for saved in broadcast_each(checkpoints, world):
            fill_trained(method, saved)
            scores = {**evaluate_all(evaluators, model), **baselines}
            if request.between:
                scores |= compare_with_start(saved, config, evaluators, world, request.between)
            seen = int(saved.manifest.get("samples_seen", 0))
            yield replace(about, checkpoint=saved.path.name, step=saved.step, samples_seen=seen, scores=scores)


def evaluate_weights(
    source: str, config: Config, request: EvalRequest, world: World, *, timm_name: str | None, size: Size | None
) -> EvalResult:
    """Evaluate pretrained weights, on all ranks together.

    Args:
        source: see :func:`pipeline.weights.pretrained.load`.
        config: settings of the data and the evaluators.
        request: the evaluators.
        world: this rank's position in the process group.
        timm_name: timm architecture name of a weights file.
        size: side of the images in pixels; by default the weights' own input size.

    Raises:
        FoveaError: the weights cannot be loaded strictly, or the evaluators cannot use the data.
    """
    config = select(config, request.evaluators)
    loaded = pretrained.load(source, model=timm_name, device=world.device)
    model, side = loaded.subject, size or loaded.size
    if not is_divisible(side, model.tower.patch):
        raise ConfigError(
            f"{size_text(side)} must be a multiple of the patch size {model.tower.patch}",
            where="--size",
            hint="Choose another size",
        )
    check_channels(model, config)
    data = labelled_data(config, trained=False)
    where = placement(config, world, size=side, normalize=Normalize(model.mean, model.std))
    evaluators = build_evaluators(config, where, **data)
    about = _about(config, data, image_size=side)
    return replace(about, checkpoint=loaded.name, scores=evaluate_all(evaluators, model))


def _baselines(
    method: Method, config: Config, evaluators: Evaluators, model: EvalModel, world: World, log: Log
) -> dict[str, float]:
    """Scores of the method's network as a run begins with it, and of raw pixels. The method's weights are changed."""
    scores = {baseline_metric("random_init", name): value for name, value in evaluate_all(evaluators, model).items()}
    if config.init_from.source is not None:
        problem = _load_initial_weights(method, config, world)
        if problem is None:
            scores |= {baseline_metric("init_from", name): value for name, value in evaluate_all(evaluators, model).items()}
        elif world.rank == 0:
            log(f"the baseline init_from is left out: {problem}")
    for name, evaluator in evaluators.items():
        pixels = evaluator.raw_pixel_scores()
        scores |= {baseline_metric("pixels", f"{name}/{metric}"): value for metric, value in pixels.items()}
    return scores


def _load_initial_weights(method: Method, config: Config, world: World) -> str | None:
    """Load the weights that ``init_from`` names; why not, if any rank cannot."""
    problems: list[str | None] = [None] * world.size
    try:
        init_from.begin(method, config, record=False)
        problem = None
    except FoveaError as error:
        problem = str(error)
    dist.all_gather_object(problems, problem, group=world.control)
    return next((text for text in problems if text is not None), None)


def _about(config: Config, data: dict[str, Any], *, image_size: Size) -> EvalResult:
    """A result without scores: numbers of images and of classes of the ``knn`` shards, as far as an evaluator uses them."""
    if "queries" not in data:
        return EvalResult("", image_size=image_size)
    knn, queries, bank = config.evaluation.knn, data["queries"], data["bank"]
    evaluated = min(queries.total, knn.max_val or queries.total)
    if not config.evaluation.needing("bank"):
        return EvalResult("", image_size=image_size, queries=evaluated, classes=queries.classes)
    learned = min(bank.total, knn.max_train or bank.total)
    return EvalResult("", image_size=image_size, queries=evaluated, bank=learned, classes=max(queries.classes, bank.classes))


def wait_for_checkpoints(run: RunDirectory) -> Iterator[Saved | None]:
    """Yield checkpoints as they are written, oldest first, until the run's last step; skips those already evaluated.

    Yields ``None`` before each wait, as a heartbeat for the other ranks.
    """
    while True:
        total = planned_steps(run)
        last = -1
        for row in sorted(catalog.rows(run.checkpoints), key=lambda row: row.name):
            last = max(last, row.step)
            if not is_evaluated(run, row.name) and (saved := _complete(run.checkpoints / row.name)) is not None:
                yield saved
        if total is not None and last >= total:
            return
        yield None
        time.sleep(POLL)


def _complete(path: Path) -> Saved | None:
    """The checkpoint, if it is complete; it may be deleted meanwhile, when newer ones replace it."""
    try:
        saved = files.read(path)
        files.verify(saved)
    except CheckpointError:
        return None
    return saved


def planned_steps(run: RunDirectory) -> int | None:
    """The run's last step, or ``None`` until the run has written it."""
    try:
        return int(read_json(run.path / "plan.json")["steps"])
    except (OSError, FoveaError, ValueError, KeyError, TypeError, OverflowError):
        return None


def broadcast_each(items: Iterator[Any], world: World) -> Iterator[Any]:
    """Broadcast the items of rank 0 to all ranks. ``None`` items are heartbeats and are skipped.

    Args:
        items: iterated on rank 0 only.
        world: this rank's position in the process group.
    """
    while True:
        message: list[Any] = [False, None]
        if world.rank == 0:
            with contextlib.suppress(StopIteration):
                message = [True, next(items)]
        dist.broadcast_object_list(message, src=0, group=world.control)
        if not message[0]:
            return
        if message[1] is not None:
            yield message[1]
