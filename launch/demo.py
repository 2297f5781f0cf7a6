"""``fovea demo``: the main job, small and whole, before the reader's eyes.

It draws a data set, trains a small DINOv2 on it with the very command that trains a large one, stops the run in the middle with
SIGTERM, resumes it, and ends with a table, a page of pictures and the address of the MLflow run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.train import gpus
from launch.watch import clock
from pipeline.config import Loaded, load
from pipeline.data import scenes
from pipeline.errors import ConfigError, DataError, LaunchError
from pipeline.settings import Config

TRAIN, VALIDATION, SIZE = 8000, 1000, 64
_CONFIGS = {"dinov2": "dinov2/scenes_vit_tiny"}
_START_SECONDS = 25.0  # imports, first evaluation and the page, per run
_PROBE_SECONDS = 4.0


def say(text: str) -> None:
    """A heading between the run's own lines."""
    print(f"\n\x1b[1m{text}\x1b[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def shards_of(data: str | None, val: str | None, directory: Path) -> list[str]:
    """Overrides that name the data: the user's shards, or scenes drawn now."""
    if data is not None:
        named = [f"evaluation.knn.val_shards={json.dumps(val)}"] if val else []
        return [f"data.shards={json.dumps(data)}", *named]
    begin = time.monotonic()
    folder = directory / "scenes"
    written = scenes.write(folder, train=TRAIN, val=VALIDATION, size=SIZE, seed=0, samples_per_shard=1000)
    seconds = time.monotonic() - begin
    say(f"1. The data: {TRAIN + VALIDATION} scenes of {SIZE} x {SIZE} pixels in {len(written)} tar shards ({seconds:.0f} s)")
    train = next(Path(path) for path in written if "train" in Path(path).name)
    return [
        f"data.shards={json.dumps(str(train.parent / '*train-*.tar'))}",
        f"evaluation.knn.val_shards={json.dumps(str(train.parent / '*val-*.tar'))}",
    ]


def images_per_second(config: Config, ranks: int) -> float:
    """A first guess, from a few training steps of one rank on made-up pictures; data and communication are allowed for."""
    import torch

    from pipeline.data.views import Batch, Masks
    from pipeline.recipes.base import Step
    from pipeline.training.assemble import make_recipe

    device = torch.device("cuda" if gpus() else "cpu")
    torch.set_num_threads(1)
    recipe = make_recipe(config, device)
    share = max(config.train.global_batch // ranks, 1)
    views = {v.name: [torch.randn(share, 3, v.size, v.size, device=device) for _ in range(v.count)] for v in recipe.views}
    masks = {}
    for view in recipe.views:
        if view.mask is not None:
            grid = torch.zeros(view.count * share, (view.size // view.mask.patch) ** 2, dtype=torch.bool, device=device)
            grid[: share // 2 + 1, : grid.shape[1] // 3] = True
            index = grid.flatten().nonzero().flatten()
            masks[view.name] = Masks(grid, index, torch.ones(len(index), device=device))
    labels = torch.zeros(share, dtype=torch.int64, device=device)
    batch = Batch(views, labels, [""] * share, [0] * share, 0, masks)
    done, begin = 0, time.monotonic()
    while time.monotonic() - begin < _PROBE_SECONDS or done < 2:
        if done == 1:
            begin = time.monotonic()  # the first one warms up
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            sum(recipe(batch, Step()).values()).backward()
        float(next(recipe.parameters()).detach().sum())
        done += 1
    return 0.5 * ranks * share * (done - 1) / (time.monotonic() - begin)


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "launch.cli", "train", *words])


def _steps_done(run: Path) -> int:
    """The last step that the run's journals tell of."""
    from pipeline.tracking.journal import read

    done = 0
    for path in sorted((run / "tracking").glob("journal-*.jsonl")):
        for _, record in read(path):
            done = max(done, record.get("step", 0))
    return done


def _train(words: list[str], run: Path, stop_at: int | None) -> None:
    """One attempt; stopped with SIGTERM once it has come so far.

    Raises:
        LaunchError: the attempt failed; what it said is above.
    """
    process = _start(words)
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
            f"the run ended with code {code}", where=str(run), hint="its last lines above say why; the same command resumes it"
        )


def _outcome(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "outcome.json").read_text())
    return found


def _table(run: Path, wall: float) -> dict[str, str]:
    """The facts worth a line, also printed."""
    from rich.table import Table

    from launch.terminal import Terminal

    outcome = _outcome(run)
    scores: dict[str, float] = outcome["scores"]
    attempts = json.loads("[" + ",".join((run / "attempts.jsonl").read_text().splitlines()) + "]")
    best = max((int(name.split("/k")[1]) for name in scores if name.startswith("knn/")), default=0)
    facts = {}
    for name, label in (
        ("knn", "k-NN, trained teacher"),
        ("untrained", "k-NN, same network untrained"),
        ("pixels", "k-NN, raw pixels"),
    ):
        if f"{name}/k{best}" in scores:
            facts[label] = f"{100 * scores[f'{name}/k{best}']:.1f} %"
    facts |= {
        "images per second, training alone": f"{outcome['samples_seen'] / max(outcome['seconds'], 1e-9):.0f}",
        "samples seen": f"{outcome['samples_seen']:,}".replace(",", " "),
        "attempts": str(sum(row["event"] == "start" for row in attempts)),
        "steps skipped as not finite": str(outcome["skipped"]),
        "samples substituted": str(sum(outcome["data"]["substituted"].values())),
        "wall time": clock(wall),
    }
    table = Table(title="What came out", show_header=False, title_justify="left")
    for label, value in facts.items():
        table.add_row(label, value)
    Terminal().print(table)
    return facts


def run(*, minutes: float, method: str, data: str | None, directory: Path, val: str | None) -> None:
    """Run the demo.

    Args:
        minutes: wall time it may take, installation apart.
        method: a registered method.
        data: the user's own shards, or ``None`` for scenes.
        directory: where everything goes.
        val: labelled shards for k-NN, if ``data`` is given.

    Raises:
        FoveaError: whatever goes wrong, in a sentence.
    """
    if method not in _CONFIGS:
        raise ConfigError(
            f"there is no demo of {method}",
            where="--method",
            hint=f"Choose of {', '.join(_CONFIGS)}; all others train with `fovea train`.",
        )
    begin = time.monotonic()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    ranks = gpus() or 2
    shards = shards_of(data, val, directory)
    run_directory = directory / f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"
    words = [
        *shards,
        f"run.directory={json.dumps(str(run_directory))}",
        f"launch.ranks={ranks}",
        f"tracking.uri={json.dumps('sqlite:///' + str((directory / 'mlflow.db').resolve()))}",
        "tracking.experiment=fovea demo",
    ]
    loaded = load(_CONFIGS[method], words)
    words += _length(loaded, ranks, minutes - (time.monotonic() - begin) / 60)
    config = load(_CONFIGS[method], words).config
    steps = int(config.train.length.amount)
    typed = f"fovea train {_CONFIGS[method]} {' '.join(map(_quoted, words))}"
    say(f"2. The run: {method} with {ranks} ranks, {steps} steps; the same as\n\n   {typed}\n")
    _train([_CONFIGS[method], *words], run_directory, stop_at=steps // 2)
    say("3. Stopped in the middle, as a preemption would. Now the same command again:")
    _train([_CONFIGS[method], *words], run_directory, stop_at=None)
    if _outcome(run_directory)["stop"] != "FINISHED":
        raise LaunchError("the run was stopped before its end", where=str(run_directory), hint="start the demo again")
    say("4. The result")
    facts = _table(run_directory, time.monotonic() - begin)
    from launch.page import write

    page = write(run_directory, config, run_directory / "page.html", facts=facts)
    print(f"\npictures, curves, neighbours   {page.resolve()}")
    store = f"sqlite:///{(directory / 'mlflow.db').resolve()}"
    print(f"MLflow                         {sys.executable} -m mlflow ui --backend-store-uri {store}")
    print("                               then open http://127.0.0.1:5000, experiment “fovea demo”")
    print(f"the run                        {run_directory.resolve()}")
    print("your own data                  fovea train dinov2/cifar10_vit_tiny data.shards='/data/train-{000..099}.tar'")


def _length(loaded: Loaded, ranks: int, minutes: float) -> list[str]:
    """How many steps fit, and when to evaluate and save on the way."""
    seconds = 60 * minutes - 2 * _START_SECONDS - _PROBE_SECONDS
    if seconds < 20:
        raise DataError(f"{minutes:.1f} minutes are too few", where="--minutes", hint="give at least 2")
    rate = images_per_second(loaded.config, ranks)
    steps = max(20, int(seconds * rate / loaded.config.train.global_batch))
    tenth = max(steps // 10, 1)
    return [
        f"train.length={steps} steps",
        f"evaluation.knn.every={tenth} steps",
        f"checkpoint.every={max(steps // 4, 1)} steps",
        f"train.log_every={max(steps // 100, 1)}",
        f"schedule.lr.warmup={max(steps // 10, 1)} steps",
        f"recipe.freeze_last_layer={max(steps // 50, 1)} steps",
    ]


def _quoted(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " *{}'\"") else word
