"""``fovea reproduce``: trains a config with several seeds, compares the result with the record, and adds it to the ledger."""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch import members
from launch.slurm.render import code_state
from launch.terminal import Terminal
from pipeline.bench import machine
from pipeline.bench.reproduction import agreement, headers, ledger
from pipeline.bench.reproduction.ledger import Entry, SeedResult
from pipeline.config.load import available, load, resolve
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, DataError, TrainingError
from pipeline.reports.history import read_history
from pipeline.runtime.locks import lock
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import printable, read_json

_STATE = "reproduction.json"
_PACKAGES = ("torch", "timm", "numpy", "nvidia-dali-cuda130")


@dataclass(frozen=True)
class Order:
    """What to reproduce.

    Attributes:
        name: the config's name, or its file.
        overrides: ``KEY=VALUE`` settings that do not change what is computed, such as ``data.shards``.
        seeds: values of ``run.seed``.
        directory: of the runs, one for each seed.
        ledger: file of the ledger.
    """

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    directory: Path
    ledger: Path


def run(order: Order) -> int:
    """Train what is not trained yet, compare, record and print; returns the exit code, 1 if the result is worse than the record.

    Raises:
        FoveaError: settings that change the config, a directory of another reproduction, or a run that failed.
    """
    config = _checked(order)
    digest, metric = ledger.config_hash(config), ledger.main_metric(config)
    entries = ledger.read(order.ledger)
    order.directory.mkdir(parents=True, exist_ok=True)
    with (order.directory / ".lock").open("a") as file:
        try:
            lock(file.fileno(), file.name, wait=False)
        except BlockingIOError:
            raise ConfigError(
                "another reproduction runs here", where=str(order.directory), hint="Wait for it, or choose another --directory"
            ) from None
        state = _state(order, digest)
        results = [_seed(order, seed, digest, metric) for seed in order.seeds]
    entry = _entry(order, config, digest, metric, state["id"], results)
    old = ledger.record([one for one in entries if one.id != entry.id], entry.config, digest)
    entry = entry.model_copy(update={"agreement": agreement.compare(entry, old)})
    added = ledger.append(order.ledger, entry)
    _print(entry, old)
    print(f"{'added to' if added else 'already in'} {order.ledger}")
    return 1 if entry.agreement == "worse" else 0


def _checked(order: Order) -> Config:
    """The config with the overrides, which may not change what it computes."""
    plain, config = load(order.name).config, load(order.name, order.overrides).config
    if ledger.config_hash(plain) != ledger.config_hash(config):
        raise ConfigError(
            "the settings on the command line change what the config computes",
            where=order.name,
            hint="Leave out all but paths, data loading and launch settings, or write them to a config of your own",
        )
    return config


def _state(order: Order, digest: str) -> dict[str, Any]:
    """The reproduction's record in its directory, written at the first start."""
    file = order.directory / _STATE
    if not file.exists():
        RunDirectory(order.directory).write(_STATE, {"id": uuid.uuid4().hex, "config": _name(order.name), "hash": digest})
    state = read_json(file, error=ConfigError)
    hint = "Choose another --directory, or remove this one"
    if not isinstance(state, dict) or not isinstance(state.get("id"), str):
        raise ConfigError("is not the record of a reproduction", where=str(file), hint=hint)
    if (state.get("config"), state.get("hash")) != (_name(order.name), digest):
        raise ConfigError(f"belongs to a reproduction of {state.get('config')!r} with other settings", where=str(file), hint=hint)
    return state


def _name(config: str) -> str:
    """The name of a shipped config, or the file's own."""
    file = resolve(config).resolve()
    return next((name for name, shipped in available().items() if shipped.resolve() == file), file.name)


def _seed(order: Order, seed: int, digest: str, metric: str) -> SeedResult:
    """Train and evaluate one seed, unless that is done; a run that was interrupted is resumed."""
    folder = RunDirectory(order.directory / f"seed-{seed}")
    notes = _notes(folder)
    if not members.finished(folder):
        state = code_state().split(" (")[0]
        commits = list(dict.fromkeys([*_commits(notes), state]))
        folder.write(_STATE, {"commits": commits, "cpu_minutes": None})
        cpu = _train(order, seed, folder.path)
        folder.write(_STATE, {"commits": commits, "cpu_minutes": cpu if folder.next_attempt() == 1 else None})
        notes = _notes(folder)
    if ledger.config_hash(folder.settings()) != digest:
        raise ConfigError("is a run with other settings", where=str(folder.path), hint="Choose another --directory, or remove it")
    curve = tuple(read_history(folder).line(metric, folder.settings().train.global_batch_size))
    about = {"seed": seed, "commits": tuple(_commits(notes)), "cpu_minutes": notes.get("cpu_minutes"), "curve": curve}
    return ledger.result_of(read_json(folder.path / "outcome.json"), **about)


def _notes(folder: RunDirectory) -> dict[str, Any]:
    file = folder.path / _STATE
    notes = read_json(file) if file.exists() else {}
    return notes if isinstance(notes, dict) else {}


def _commits(notes: dict[str, Any]) -> list[str]:
    commits = notes.get("commits")
    return [str(one) for one in commits] if isinstance(commits, list) else []


def _train(order: Order, seed: int, folder: Path) -> float:
    """Run ``fovea train``; returns the CPU minutes of its processes.

    Raises:
        TrainingError: it failed, or stopped before its end.
    """
    print(f"seed {seed}", flush=True)
    code, cpu = members.train(order.name, [*order.overrides, f"run.directory={folder}", f"run.seed={seed}"])
    if code or not members.finished(RunDirectory(folder)):
        what = f"ended with {code}; its messages are above" if code else "stopped before its end"
        raise TrainingError(f"seed {seed} {what}", where=order.name, hint="Repeat the same command to continue")
    return cpu


def _entry(order: Order, config: Config, digest: str, metric: str, id_: str, results: Sequence[SeedResult]) -> Entry:
    if missing := [result.seed for result in results if metric not in result.scores]:
        raise DataError(
            f"seed {missing[0]} has no {metric}", where=str(order.directory), hint="Name labelled evaluation.knn.val_shards"
        )
    data = read_json(order.directory / f"seed-{order.seeds[0]}" / "outcome.json").get("data", {})
    here = machine.describe()
    return Entry(
        id=id_,
        config=_name(order.name),
        config_hash=digest,
        metric=metric,
        data_fingerprint=str(data.get("fingerprint", "")),
        data_samples=int(data.get("samples", 0)),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        versions={"python": platform.python_version(), **{name: machine.package_version(name) for name in _PACKAGES}},
        machine={"processor": here["processor"], "cores": here["cores"], "system": platform.system()},
        ranks=config.launch.num_processes or 1,
        seeds=tuple(results),
    )


def _print(entry: Entry, old: Entry | None) -> None:
    """A table with a row for each seed, their mean, and the record."""
    from rich.table import Table

    table = Table()
    for title in (entry.config, entry.metric, "random init", "pixels", "minutes"):
        table.add_column(title, justify="left" if title == entry.config else "right")
    kinds = [f"baseline/{name}/{entry.metric}" for name in ("random_init", "pixels")]
    for result in entry.seeds:
        scores = [result.scores.get(name) for name in (entry.metric, *kinds)]
        cells = ["" if value is None else f"{100 * value:.1f} %" for value in scores]
        table.add_row(f"seed {result.seed}", *cells, f"{result.minutes:.1f}")
    table.add_section()
    table.add_row("mean", agreement.interval(entry.values()).percent(), *_beside(entry), f"{entry.minutes:.1f}", style="bold")
    if old is not None:
        table.add_row("record", agreement.interval(old.values()).percent(), *_beside(old), f"{old.minutes:.1f}")
    console = Terminal()
    console.print(table)
    console.print(f"{entry.agreement}: {_MEANING[entry.agreement]}", highlight=False, soft_wrap=True)


_MEANING = {
    "recorded": "the first result of this config as it is now",
    "reproduced": "the difference from the record is within chance (95 %)",
    "better": "above the record by more than chance (95 %)",
    "worse": "below the record by more than chance (95 %)",
    "other data": "the training shards are not those of the record, so that nothing is compared",
    "undecided": "too few seeds to compare",
}


def _beside(entry: Entry) -> list[str]:
    values = [entry.baseline(name) for name in ("random_init", "pixels")]
    return ["" if value is None else f"{100 * value:.1f} %" for value in values]


def list_records(file: Path) -> int:
    """Print what was recorded of each config, what it costs, and how often it was repeated; returns the exit code."""
    entries = ledger.read(file)
    rows: list[tuple[str, ...]] = [("config", "metric", "reached", "random init", "pixels", "minutes", "seeds", "repeated")]
    for name, _, entry in headers.records(entries):
        again = [one for one in entries if one.config == name and one.config_hash == entry.config_hash and one.id != entry.id]
        agreeing = sum(one.agreement in ("reproduced", "better") for one in again)
        cells = (entry.metric, agreement.interval(entry.values()).percent(), *_beside(entry), f"{entry.minutes:.0f}")
        rows.append((name, *cells, str(len(entry.seeds)), f"{agreeing} of {len(again)}" if again else ""))
    if len(rows) == 1:
        print(f"{printable(str(file))} has no result of a config as it is now")
        return 0
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("minutes: of training, a seed")
    return 0


def write_page(file: Path, out: Path) -> int:
    """Write the page with the curves of all records; returns the exit code."""
    from pipeline.reports.learning import write

    records = [(name, entry) for name, _, entry in headers.records(ledger.read(file))]
    print(f"{write(records, out)}: open it in a browser")
    return 0


def write_headers(file: Path) -> int:
    """Write the ledger's records into the headers of the configs; returns the exit code."""
    for name, path, entry in headers.records(ledger.read(file)):
        text = path.read_text(encoding="utf-8")
        new = headers.updated(text, entry)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(f"updated {name}", file=sys.stderr)
    return 0
