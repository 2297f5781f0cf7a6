"""``fovea eval``: evaluates checkpoints of a run or pretrained weights, prints a table, writes the results, and logs them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.eval_ranks import ranks_for, spread, world_here
from launch.rank_environment import RankEnvironment
from pipeline.config.schema import Config
from pipeline.config.sizes import Size
from pipeline.errors import ConfigError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import printable

if TYPE_CHECKING:
    from pipeline.evaluation.results import EvalResult
    from pipeline.evaluation.standalone import EvalRequest


@dataclass(frozen=True)
class EvalOptions:
    """The command line of ``fovea eval``.

    Attributes:
        evaluators: names; empty for the default.
        baselines: also evaluate the baselines, whatever the evaluators.
        watch: continue with each new checkpoint.
        model: timm architecture name of a weights file.
        size: side, or height and width, of the images in pixels, for pretrained weights.
        output: additional JSON file to write.
        ranks: number of processes.
        between: shares of the way from the run's initial weights to evaluate at.
        track: an MLflow server other than the run's own.
    """

    evaluators: tuple[str, ...] = ()
    baselines: bool = False
    watch: bool = False
    model: str | None = None
    size: Size | None = None
    output: Path | None = None
    ranks: int | None = None
    track: str | None = None
    between: tuple[float, ...] = ()


def run(target: str, overrides: Sequence[str], options: EvalOptions, command: Sequence[str]) -> int:
    """Evaluate; returns the exit code.

    Args:
        target: a run, one of its checkpoints, or pretrained weights.
        overrides: ``KEY=VALUE`` settings.
        options: the rest of the command line.
        command: the whole command line after ``fovea``, for the ranks.

    Raises:
        FoveaError: nothing to evaluate, or data or settings that the evaluators cannot use.
    """
    from pipeline.config.load import load
    from pipeline.evaluation import standalone

    path = Path(target).absolute()
    checkpoint = path if path.name.startswith("step_") and (path.parent.parent / "config.yaml").is_file() else None
    if checkpoint is not None and options.watch:
        raise ConfigError("one checkpoint cannot be watched", where="--watch", hint="Name the run")
    directory = checkpoint.parent.parent if checkpoint is not None else Path(target)
    of_run = (directory / "config.yaml").is_file()
    exists = directory.exists() or ":" in target
    if not of_run and not (exists and options.evaluators):
        hint = "Name an evaluator such as --knn for weights" if exists else "Name a directory with a config.yaml"
        raise ConfigError("must be a run directory", where=target, hint=hint)
    config = load(str(directory / "config.yaml"), overrides).config if of_run else standalone.settings_for_weights(overrides)
    request = _request(config, options, checkpoint, of_run=of_run)
    if (count := ranks_for(config, options.ranks)) > 1:
        standalone.check_request(config, request, directory if of_run else None)
        return spread(command, count, directory / "logs" / "eval" if of_run else None)
    if of_run:
        return _evaluate_run(directory, config, request, options)
    return _evaluate_weights(target, config, request, options)


def _request(config: Config, options: EvalOptions, checkpoint: Path | None, *, of_run: bool) -> EvalRequest:
    """By default k-NN with its baselines; with ``--watch`` what the run itself evaluates. Zero-shot classification and retrieval
    have nothing else to be compared with, so that they come with baselines too.
    """
    from pipeline.evaluation.standalone import EvalRequest

    evaluators = options.evaluators or (tuple(config.evaluation.enabled) if options.watch else ()) or ("knn",)
    known = [name for name in options.evaluators if name in config.evaluation.evaluators()]
    only_texts = all("text_encoder" in config.evaluation.section(name).needs for name in known)
    baselines = options.baselines or (of_run and not options.watch and only_texts)
    if options.between and not of_run:
        raise ConfigError("only a run has a start and an end", where="--between", hint="Name a run")
    return EvalRequest(evaluators, baselines, options.watch, checkpoint, options.between)


def _evaluate_run(directory: Path, config: Config, request: EvalRequest, options: EvalOptions) -> int:
    from pipeline.evaluation import results
    from pipeline.evaluation.reporter import EvalReporter
    from pipeline.evaluation.standalone import evaluate_run

    first = RankEnvironment.read().rank == 0
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(world_here(config))
        reporter = EvalReporter.of_run(directory, config, options.track, log=_log) if first else None
        if reporter is not None:
            stack.callback(reporter.close)
        for result in evaluate_run(directory, config, request, world, log=_log):
            if first:
                file = results.write(RunDirectory(directory), result)
                if reporter is not None:
                    reporter(result.step, result.scores, file)
                _print(f"{result.checkpoint} of {directory}", result, config)
                _write(options.output, result)
    return 0


def _evaluate_weights(source: str, config: Config, request: EvalRequest, options: EvalOptions) -> int:
    from pipeline.evaluation.reporter import EvalReporter
    from pipeline.evaluation.standalone import evaluate_weights

    with world_here(config) as world:
        result = evaluate_weights(source, config, request, world, timm_name=options.model, size=options.size)
        if world.rank == 0:
            _print(result.checkpoint, result, config)
            _write(options.output, result)
            reporter = EvalReporter.of_weights(result.checkpoint, config, options.track, log=_log)
            if reporter is not None:
                with contextlib.closing(reporter):
                    reporter(0, result.scores, options.output)
    return 0


def _write(output: Path | None, result: EvalResult) -> None:
    if output is not None:
        RunDirectory(output.parent).write(output.name, result.document())


def _log(text: str) -> None:
    print(f"fovea: {printable(text)}", file=sys.stderr)


def _print(title: str, result: EvalResult, config: Config) -> None:
    """A table with a row for each metric, and a column for the network and each baseline."""
    from rich.table import Table

    from launch.terminal import Terminal
    from pipeline.evaluation.results import BASELINES, by_network

    networks = by_network(result.scores)
    table = Table()
    table.add_column("metric")
    for name in networks:
        table.add_column(BASELINES.get(name, "trained"), justify="right", style=None if name else "bold")
    metrics = config.evaluation.only(*config.evaluation.evaluators()).metrics
    for name in dict.fromkeys(metric for row in networks.values() for metric in row):
        plain = name.split("/", 2)[2] if name.startswith("between/") else name
        fraction = plain in metrics and metrics[plain].fraction
        table.add_row(name, *(_format(row.get(name), fraction=fraction) for row in networks.values()))
    console = Terminal()
    console.print(f"Scores of {title}", highlight=False, soft_wrap=True)
    console.print(table)
    if summary := summarize(result):
        console.print(summary, highlight=False, soft_wrap=True)


def _format(value: float | None, *, fraction: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if fraction else f"{value:.4g}"


def summarize(result: EvalResult) -> str:
    """One line: what was evaluated on what, and the accuracy of a random guess."""
    bank = f", feature bank of {result.bank:,} images" if result.bank else ""
    chance = f", {result.classes} classes; chance is {100 / result.classes:.1f} %" if result.classes else ""
    data = f"{result.queries:,} queries{bank}{chance}" if result.queries else ""
    seen = f"after {result.samples_seen:,} samples" if result.step else ""
    return ": ".join(part for part in (seen, data) if part)


def shares_of(text: str | None) -> tuple[float, ...]:
    """Shares of the way, from text such as ``0,0.25,0.5``.

    Raises:
        ConfigError: not numbers from 0 to 1.
    """
    if text is None:
        return ()
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = (-1.0,)
    if not all(0 <= share <= 1 for share in shares) or len(shares) > 100:
        raise ConfigError(f"{text!r} must be numbers from 0 to 1", where="--between", hint="Write such as 0,0.25,0.5,0.75,1")
    return shares
