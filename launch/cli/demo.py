"""``fovea demo``: a complete small training run with an interruption, a resume and an evaluation.

Generates a data set, trains a small network on it with the same command as a large one, stops the run halfway with SIGTERM,
resumes it, and prints a table, the path of an HTML page and the address of the MLflow run. For distillation it trains the teacher
first.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.config.load import available, load
from pipeline.data.pack import synthetic as scenes
from pipeline.errors import ConfigError, LaunchError
from pipeline.runtime.clock import clock
from pipeline.runtime.gpus import gpus
from pipeline.runtime.interpreter import alone_environment, module_command
from pipeline.tracking.mlflow_database import uri_of

TRAIN, VALIDATION, SIZE = 8000, 1000, 64
_CONFIGS = {"dinov2": "dinov2/scenes_vit_tiny", "distill": "dinov2/distill_scenes"}  # all others are named METHOD/scenes
_START_SECONDS = 25.0  # imports, first evaluation and the HTML page, per run
_PROBE_STEPS = 12
_LEAST_SECONDS = 20.0  # minimum training time


def announce(text: str) -> None:
    """Print a heading between the run's own log lines."""
    print(f"\n\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def shards_of(data: str | None, val: str | None, directory: Path) -> list[str]:
    """Overrides that select the data: the user's shards, or newly generated scenes."""
    if data is not None:
        named = [f"evaluation.knn.val_shards={json.dumps(val)}"] if val else []
        return [f"data.shards={json.dumps(data)}", *named]
    begin = time.monotonic()
    folder = directory / "scenes"
    written = scenes.write(folder, train=TRAIN, val=VALIDATION, size=SIZE, seed=0, samples_per_shard=1000)
    seconds = time.monotonic() - begin
    announce(f"1. The data: {TRAIN + VALIDATION} scenes of {SIZE} x {SIZE} pixels in {len(written)} tar shards ({seconds:.0f} s)")
    train = next(Path(path) for path in written if "train" in Path(path).name)
    return [
        f"data.shards={json.dumps(str(train.parent / '*train-*.tar'))}",
        f"evaluation.knn.val_shards={json.dumps(str(train.parent / '*val-*.tar'))}",
    ]


def config_of(method: str) -> str:
    """Name of the config that the demo of a method trains.

    Raises:
        ConfigError: the method has none.
    """
    name = _CONFIGS.get(method, f"{method}/scenes")
    if name not in available():
        raise ConfigError(
            f"there is no demo of {method}: configs/{name}.yaml is missing", where="--method", hint="Choose another method"
        )
    return name


def images_per_second(name: str, arguments: list[str], directory: Path) -> float:
    """Measure the training throughput on this machine with a few steps of the same run, without evaluations.

    Args:
        name: config name.
        arguments: overrides of the config; the run directory is replaced.
        directory: where the short run is written; it is removed afterwards.

    Raises:
        LaunchError: the short run failed; contains its output.
    """
    from pipeline.evaluation.settings import EvaluationSettings
    from pipeline.tracking.journal import read

    folder = directory / ".probe"
    shutil.rmtree(folder, ignore_errors=True)
    off = [f"evaluation.{evaluation}.enabled=false" for evaluation in EvaluationSettings.evaluators()]
    short = [f"train.duration={_PROBE_STEPS} steps", "schedule.lr.warmup=0", "train.log_every=1", "tracking.enabled=false"]
    short += [f"run.directory={json.dumps(str(folder))}", f"checkpoint.every={_PROBE_STEPS} steps", "checkpoint.keep_best=null"]
    done = subprocess.run(
        module_command("launch.cli.main", "train", name, *arguments, *off, *short),
        env=alone_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    rates = [
        float(record["values"]["perf/images_per_second"])
        for path in sorted((folder / "tracking").glob("journal-*.jsonl"))
        for _, record in read(path)
        if "perf/images_per_second" in record.get("values", {})
    ]
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode or not rates:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise LaunchError(
            f"a first run of {_PROBE_STEPS} steps failed: {last}", where=name, hint=f"See the output of: fovea train {name}"
        )
    return statistics.median(rates[len(rates) // 2 :])


def _start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(module_command("launch.cli.main", "train", *arguments), env=alone_environment())


def _steps_done(run: Path) -> int:
    """Last step recorded in the run's journals."""
    from pipeline.tracking.journal import read

    done = 0
    for path in sorted((run / "tracking").glob("journal-*.jsonl")):
        for _, record in read(path):
            done = max(done, record.get("step", 0))
    return done


def _train(arguments: list[str], run: Path, stop_at: int | None) -> None:
    """Run one attempt; send SIGTERM once it reaches step ``stop_at``.

    Raises:
        LaunchError: the attempt failed; its output is above.
    """
    process = _start(arguments)
    try:
        while process.poll() is None:
            time.sleep(0.3)
            if stop_at is not None and _steps_done(run) >= stop_at:
                print("\n[demo] kill -TERM", process.pid, flush=True)
                process.send_signal(signal.SIGTERM)
                break
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if code:
        raise LaunchError(
            f"the run ended with code {code}", where=str(run), hint="See its last lines above; the same command resumes it"
        )


def _outcome(run: Path) -> dict[str, Any]:
    outcome: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    return outcome


def _table(run: Path, wall: float) -> dict[str, str]:
    """Print and return the summary of the run."""
    from rich.table import Table

    from launch.terminal import Terminal
    from pipeline.evaluation.results import baseline_metric

    outcome = _outcome(run)
    scores: dict[str, float] = outcome["scores"]
    attempts = json.loads("[" + ",".join((run / "attempts.jsonl").read_text().splitlines()) + "]")
    largest = max((int(name.split("/k")[1]) for name in scores if name.startswith("knn/")), default=0)
    metric = f"knn/k{largest}"
    labels = {
        metric: "k-NN, trained teacher",
        baseline_metric("random_init", metric): "k-NN, same network, random init",
        baseline_metric("init_from", metric): "k-NN, same network, as it began",
        baseline_metric("pixels", metric): "k-NN, raw pixels",
    }
    facts = {label: f"{100 * scores[name]:.1f} %" for name, label in labels.items() if name in scores}
    facts |= {
        "images per second, training alone": f"{outcome['samples_seen'] / max(outcome['seconds'], 1e-9):.0f}",
        "samples seen": f"{outcome['samples_seen']:,}".replace(",", " "),
        "attempts": str(sum(row["event"] == "start" for row in attempts)),
        "steps skipped as not finite": str(outcome["skipped"]),
        "samples substituted": str(sum(outcome["data"]["substituted"].values())),
        "wall time": clock(wall),
    }
    table = Table(title="Results", show_header=False, title_justify="left")
    for label, value in facts.items():
        table.add_row(label, value)
    Terminal().print(table)
    return facts


def run(*, minutes: float, method: str, data: str | None, directory: Path, val: str | None, steps: int | None = None) -> None:
    """Run the demo.

    Args:
        minutes: wall time limit, without installation.
        method: a registered method.
        data: pattern of the user's shards, or ``None`` to generate some.
        directory: output directory.
        val: labelled shards for k-NN, if ``data`` is given.
        steps: steps to train, instead of as many as fit into the time.

    Raises:
        FoveaError: any failure, as a readable message.
    """
    name = config_of(method)
    if steps is None and 60 * minutes / (2 if method == "distill" else 1) < 2 * _START_SECONDS + _LEAST_SECONDS:
        raise _too_few(minutes)
    begin = time.monotonic()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    ranks = gpus() or 2
    shards = shards_of(data, val, directory)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    store = uri_of((directory / "mlflow.db").resolve())
    run_directory = directory / f"{method}-{stamp}"
    arguments = [
        *shards,
        f"launch.num_processes={ranks}",
        f"tracking.uri={json.dumps(store)}",
        "tracking.experiment=fovea demo",
    ]
    if method == "distill":
        arguments.append(
            f"method.teacher_weights={json.dumps(str(_teacher(arguments, directory / f'teacher-{stamp}', minutes, steps)))}"
        )
    arguments.append(f"run.directory={json.dumps(str(run_directory))}")
    arguments += _length(name, arguments, directory, minutes - (time.monotonic() - begin) / 60, steps)
    config = load(name, arguments).config
    total = int(config.train.duration.amount)
    typed = f"fovea train {name} {' '.join(map(_quoted, arguments))}"
    announce(f"2. The run: {method} with {ranks} ranks, {total} steps; the same as\n\n   {typed}\n")
    _train([name, *arguments], run_directory, stop_at=total // 2)
    announce("3. Stopped in the middle, as a preemption would. Now the same command again:")
    _train([name, *arguments], run_directory, stop_at=None)
    if _outcome(run_directory)["stop"] != "FINISHED":
        raise LaunchError("the run was stopped before its end", where=str(run_directory), hint="Start the demo again")
    announce("4. The result")
    facts = _table(run_directory, time.monotonic() - begin)
    from pipeline.reports.run_page import write

    page = write(run_directory, config, run_directory / "page.html", facts=facts)
    print(f"\nimages, curves, neighbors     {page.resolve()}")
    print(f"MLflow                         {sys.executable} -m mlflow ui --backend-store-uri {shlex.quote(store)}")
    print("                               then open http://127.0.0.1:5000, experiment “fovea demo”")
    print(f"the run                        {run_directory.resolve()}")
    print("your own data                  fovea train dinov2/cifar10_vit_tiny data.shards='/data/train-{000..099}.tar'")


def _teacher(arguments: list[str], folder: Path, minutes: float, steps: int | None) -> Path:
    """Train the teacher of a distillation for half of the time; returns its run directory."""
    name = config_of("dinov2")
    arguments = [*arguments, f"run.directory={json.dumps(str(folder))}"]
    arguments += _length(name, arguments, folder.parent, minutes / 2, steps)
    announce("The teacher that is going to be distilled: dinov2")
    _train([name, *arguments], folder, stop_at=None)
    return folder


def _too_few(minutes: float) -> ConfigError:
    return ConfigError(f"{minutes:.1f} minutes are too short", where="--minutes", hint="Give at least 3, or 6 for distill")


def _length(name: str, arguments: list[str], directory: Path, minutes: float, steps: int | None) -> list[str]:
    """Choose the number of steps that fit, and when to evaluate and save."""
    config = load(name, arguments).config
    if steps is None:
        begin = time.monotonic()
        rate = 0.8 * images_per_second(name, arguments, directory)  # the rest is for evaluations and checkpoints
        seconds = 60 * minutes - 2 * _START_SECONDS - (time.monotonic() - begin)
        if seconds < _LEAST_SECONDS:
            raise _too_few(minutes)
        steps = max(20, int(seconds * rate / config.train.global_batch_size))
    tenth = max(steps // 10, 1)
    chosen = [
        f"train.duration={steps} steps",
        f"checkpoint.every={max(steps // 4, 1)} steps",
        f"train.log_every={max(steps // 100, 1)}",
        f"schedule.lr.warmup={tenth} steps",
        *(f"evaluation.{evaluation}.every={tenth} steps" for evaluation in config.evaluation.enabled),
    ]
    if "freeze_last_layer" in type(config.method).model_fields:
        chosen.append(f"method.freeze_last_layer={max(steps // 50, 1)} steps")
    return chosen


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " *{}'\"") else word
