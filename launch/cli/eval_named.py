"""``fovea eval`` with selected evaluators, for checkpoints of a run or pretrained weights; uses the evaluators of training."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cli.eval_ranks import EvalReporter, agreed, closing, world_here
from launch.rank_environment import RankEnvironment
from pipeline.checkpoint import files
from pipeline.checkpoint.files import Saved
from pipeline.config.schema import Config
from pipeline.errors import CheckpointError, ConfigError, DataError, FoveaError
from pipeline.runtime.locks import lock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_json
from pipeline.weights.from_checkpoint import fill_trained, named_or_newest

if TYPE_CHECKING:
    from pipeline.data.augment.views import Normalize
    from pipeline.models.eval_model import EvalModel
    from pipeline.runtime.process_group import World

POLL = 10.0  # seconds between two checks for new checkpoints


@dataclass(frozen=True)
class EvalRequest:
    """Options of an evaluation from the command line.

    Attributes:
        evaluators: names, as in the section ``evaluation`` of the settings.
        untrained: also evaluate the same network with random weights.
        output: additional JSON file to write.
        watch: continue with each new checkpoint.
        track: an MLflow server other than the run's own.
        checkpoint: directory of the checkpoint to evaluate, instead of the newest.
    """

    evaluators: tuple[str, ...]
    untrained: bool = False
    output: Path | None = None
    watch: bool = False
    track: str | None = None
    checkpoint: Path | None = None


def asking(config: Config, asked: EvalRequest) -> Config:
    """The settings with only the requested evaluators enabled, validated.

    Raises:
        ConfigError: a setting that an evaluator needs is missing.
    """
    from pipeline.config.validate import check

    chosen = config.replace(evaluation=config.evaluation.only(*asked.evaluators))
    # Nothing is cropped here, and whether pretrained weights have a text encoder is known only once they are loaded.
    problems = [text for key, text in check(chosen) if key.startswith("evaluation.") and not key.endswith(".enabled")]
    if problems:
        raise ConfigError("; ".join(problems), where="evaluation", hint="Give it as KEY=VALUE behind the run.")
    return chosen


def refuse(config: Config, asked: EvalRequest, directory: Path | None = None) -> None:
    """Detect what cannot be evaluated before any rank is started; indexes the data on the way.

    Args:
        config: the settings.
        asked: the requested evaluation.
        directory: the run, if its checkpoints are to be evaluated.

    Raises:
        FoveaError: no checkpoint, or data that the evaluators cannot use.
    """
    from pipeline.data.inputs import evaluation_data

    chosen = asking(config, asked)
    if directory is not None and not asked.watch:
        named_or_newest(directory, asked.checkpoint)
    _data(chosen, evaluation_data, trained=directory is not None)


def of_run(directory: Path, config: Config, asked: EvalRequest) -> int:
    """Evaluate a run's newest or selected checkpoint, or with ``watch`` every checkpoint until the last; returns the exit code.

    All ranks on which the command was started share the work. Each result is printed as a table, merged into
    ``<run>/evaluations/<checkpoint>.json`` with the scores of other evaluators, and logged as ``eval/...`` to the run's MLflow
    run.

    Raises:
        FoveaError: no checkpoint, another architecture, or data that the evaluators cannot use.
    """
    from pipeline.data.inputs import evaluation_data
    from pipeline.evaluation.runner import EvalData, build_evaluators, eval_model_of
    from pipeline.methods.registry import build_method

    config = asking(config, asked)
    first = RankEnvironment.read().rank == 0
    coming: Iterator[Saved | None] = (
        iter(()) if not first else _coming(directory) if asked.watch else iter([named_or_newest(directory, asked.checkpoint)])
    )
    with world_here(config) as world:
        data = _data(config, evaluation_data, trained=True)
        sizes = _sizes(config, data)
        method = _fresh(config, world, build_method)
        view = method.views[0]
        evaluators, _ = build_evaluators(config, EvalData(**data), world, size=view.size, normalize=_normalize(view.normalize))
        subject = eval_model_of(method, config, world.device)
        columns = {"untrained": _scores(evaluators, subject)} if asked.untrained else {}
        with closing(EvalReporter.of_run(directory, config, asked.track) if first else None) as telling:
            for saved in agreed(coming, world):
                fill_trained(method, saved)
                method.eval()
                scores = {**columns, "trained": _scores(evaluators, subject)}
                if first:
                    file = _kept(RunDirectory(directory), saved, sizes, scores)
                    if telling is not None:
                        telling(saved.step, scores, file)
                    _told(f"{saved.path.name} of {directory}", _about(saved) | sizes | {"scores": scores}, asked.output)
    return 0


def _about(saved: Saved) -> dict[str, Any]:
    seen = int(saved.manifest.get("samples_seen", 0))
    return {"checkpoint": saved.path.name, "step": saved.step, "samples_seen": seen}


def _sizes(config: Config, data: dict[str, Any]) -> dict[str, int]:
    """Number of evaluated images, and of classes if the images have labels."""
    if "queries" not in data:
        return {}
    total = data["queries"].total
    return {"judged": min(total, config.evaluation.knn.max_val or total), "classes": data["queries"].classes}


def _kept(run: RunDirectory, saved: Saved, sizes: dict[str, int], scores: dict[str, dict[str, float]]) -> Path:
    """Write a checkpoint's scores to its file, keeping those of other evaluators."""
    name = f"evaluations/{saved.path.name}.json"
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    with (run.path / "evaluations" / ".lock").open("a") as file:  # several evaluations of one checkpoint may end at the same time
        lock(file.fileno(), file.name)
        try:
            document = read_json(run.path / name)
        except (OSError, FoveaError):
            document = None
        known = document.get("scores") if isinstance(document, dict) else None
        before = {whose: row for whose, row in known.items() if isinstance(row, dict)} if isinstance(known, dict) else {}
        merged = before | {whose: before.get(whose, {}) | row for whose, row in scores.items()}
        run.write(name, _about(saved) | sizes | {"scores": merged})
    return run.path / name


def settings_for_weights(overrides: Sequence[str]) -> Config:
    """Settings for pretrained weights without a run; only data and evaluations are used.

    Raises:
        ConfigError: invalid settings.
    """
    from pipeline.config.load import load

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.yaml"
        file.write_text("model: {timm_name: vit_tiny_patch16_224}\nmethod: {name: clip}\n")
        return load(file, overrides).config


def of_weights(source: str, config: Config, asked: EvalRequest, *, model: str | None, size: int | None) -> int:
    """Evaluate pretrained weights; returns the exit code.

    Args:
        source: see :func:`pipeline.weights.pretrained.load`.
        config: settings of the data and the evaluators.
        asked: the requested evaluation.
        model: timm architecture name of a weights file.
        size: side of the images in pixels; by default the weights' own input size.

    Raises:
        FoveaError: the weights cannot be loaded strictly, or the evaluators cannot use the data.
    """
    from pipeline.data.augment.views import Normalize
    from pipeline.data.inputs import evaluation_data
    from pipeline.evaluation.runner import EvalData, build_evaluators
    from pipeline.weights.pretrained import load

    config = asking(config, asked)
    with world_here(config) as world:
        peer = load(source, model=model, device=world.device)
        side = size or peer.size
        if side % peer.subject.tower.patch:
            raise ConfigError(
                f"pictures of {side} pixels do not divide into patches of {peer.subject.tower.patch}",
                where="--size",
                hint=f"choose a multiple of {peer.subject.tower.patch}",
            )
        data = EvalData(**_data(config, evaluation_data))
        normalize = Normalize(peer.subject.mean, peer.subject.std)
        evaluators, _ = build_evaluators(config, data, world, size=side, normalize=normalize)
        scores = {"weights": _scores(evaluators, peer.subject)}
        if world.rank == 0:
            _told(peer.name, {"weights": source, "size": side, "scores": scores}, asked.output)
            with closing(EvalReporter.of_weights(peer.name, config, asked.track)) as telling:
                if telling is not None:
                    telling(0, scores, asked.output)
    return 0


def _data(config: Config, find: Any, *, trained: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = find(config, trained=trained)
    needs = config.evaluation.enabled.keys() & {"knn", "linear", "logistic", "robustness", "zeroshot"}
    for name in ("bank", "queries") if needs else ():
        if name in found and not found[name].classes and (name == "queries" or needs - {"zeroshot"}):
            raise DataError(
                "the shards have no class number",
                where=f"evaluation.knn.{'train_shards' if name == 'bank' else 'val_shards'}",
                hint=f"Name shards whose samples have a .{config.data.label_extension} member.",
            )
    return found


def _fresh(config: Config, world: World, build: Any) -> Any:
    import torch

    torch.manual_seed(config.run.seed)
    return build(config).to(world.device).place_state(world.device).eval()


def _normalize(given: Normalize | None) -> Normalize:
    from pipeline.data.augment.views import Normalize

    return given or Normalize()


def _scores(evaluators: dict[str, Any], subject: EvalModel) -> dict[str, float]:
    scores: dict[str, float] = {}
    for evaluator in evaluators.values():
        scores |= evaluator(subject)
    return scores


def _coming(directory: Path) -> Iterator[Saved | None]:
    """Yield checkpoints as they are written, oldest first, until the run's last step; skips those already evaluated.

    Yields ``None`` before each wait, as a heartbeat for the other ranks.
    """
    run = RunDirectory(directory)
    while True:
        total = _steps(run)
        last = -1
        for saved in files.listed(run.checkpoints):
            last = max(last, saved.step)
            if (run.path / "evaluations" / f"{saved.path.name}.json").exists() or not _whole(saved):
                continue
            yield saved
        if total is not None and last >= total:
            return
        yield None
        time.sleep(POLL)


def _whole(saved: Saved) -> bool:
    """Whether the checkpoint is complete; it may be deleted meanwhile, when newer ones replace it."""
    try:
        files.verify(saved)
    except CheckpointError:
        return False
    return True


def _steps(run: RunDirectory) -> int | None:
    """The run's last step, or ``None`` until the run has written it."""
    try:
        return int(read_json(run.path / "plan.json")["steps"])
    except (OSError, FoveaError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _told(title: str, document: dict[str, Any], output: Path | None) -> None:
    from rich.table import Table

    from launch.terminal import Terminal

    table = Table(title=f"Scores of {title}", title_justify="left")
    table.add_column("score")
    columns: dict[str, dict[str, float]] = document["scores"]
    for name in columns:
        table.add_column(name, justify="right")
    for key in _rows(list(columns.values())):
        table.add_row(key, *(_shown(key, row.get(key)) for row in columns.values()))
    console = Terminal()
    console.print(table)
    if document.get("judged"):
        classes = document["classes"]
        chance = f", {classes} classes: guessing is right in {1 / classes:.1%}" if classes else ""
        seen = f"after {document['samples_seen']:,} samples; {document['judged']:,} pictures judged"
        console.print(seen + chance, highlight=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(document, indent=1) + "\n")


def _rows(columns: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for column in columns for key in column))


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return ""
    plain = key.endswith(("_rank", "/rate", "/layers", "/patches", "/cost")) or "cosine" in key
    return f"{value:.4g}" if plain else f"{value:.1%}"
