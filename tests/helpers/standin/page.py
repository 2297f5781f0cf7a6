"""Writes the benchmark page of the host's path, before and after: ``python -m tests.helpers.standin.page OUT --before CHECKOUT``.

Each method is measured in both checkouts in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.bench.report import write
from tests.helpers.standin import process
from tests.helpers.standin.methods import BATCH, METHODS
from tests.helpers.standin.recorder import Record

_COMMAND = "python -m tests.helpers.standin.page pipeline/bench/results/host-path --before <checkout of 6373b94>"
_STEPS, _KEPT = 12, 8
_AFTER = ("step", "teacher", "log")  # phases in which a GPU whose host has just waited for it is idle
_COMPILED = ("dinov2", "clip")  # as a GPU runs them by default; the earlier checkout has no default, and runs them eagerly
COLUMNS = {
    "waits": "host waits",
    "blocking": "blocking copies",
    "launches": "launches",
    "optimizer": "optimizer calls",
    "collectives": "collectives",
    "megabytes": "MB",
    "cpu_ms": "CPU ms",
    "after_backward_ms": "of it after backward",
    "loader_blocks": "loader: waits and blocking copies",
    "loader_default": "loader: on the training stream",
}


def figures(records: list[Record]) -> dict[str, float]:
    """The columns of the page, a step: exact of the last step, CPU time the median of all, the loader's the mean of all."""
    last = records[-1]
    trains = [block for block in last.blocks if block.thread != "fovea-data"]
    loads = [call for record in records for call in record.calls if call.thread == "fovea-data"]
    blocked = [block for record in records for block in record.blocks if block.thread == "fovea-data"]
    sent = [one for one in last.collectives if one.device == "cuda"]
    at_default = sum(call.calls for call in loads if call.stream == "default" and call.kind in ("kernel", "copy", "wait"))
    return {
        "waits": sum(block.calls for block in trains if block.what.startswith("for ")),
        "blocking": sum(block.calls for block in trains if not block.what.startswith("for ")),
        "launches": sum(call.calls for call in last.calls if call.kind in ("kernel", "gemm")),
        "optimizer": last.functions.get("optimizer step", 0),
        "collectives": sum(one.calls for one in sent),
        "megabytes": sum(one.bytes for one in sent) / 1e6,
        "cpu_ms": 1000 * statistics.median(sum(record.seconds.values()) for record in records),
        "after_backward_ms": 1000 * statistics.median(sum(record.seconds.get(name, 0) for name in _AFTER) for record in records),
        "loader_blocks": sum(block.calls for block in blocked) / len(records),
        "loader_default": at_default / len(records),
    }


def measure(name: str, checkout: Path, *overrides: str) -> dict[str, Any]:
    """One method in one checkout."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        options = (f"--steps={_STEPS}", f"--kept={_KEPT}")
        done = process.run("method_step", str(out), *METHODS[name], BATCH, *overrides, *options, checkout=checkout)
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        document: dict[str, Any] = json.loads(out.read_text())
    records = [Record.from_json(record) for record in document.pop("records")]
    return {**document, **figures(records)}


def render(rows: dict[str, dict[str, dict[str, Any]]], machine: dict[str, str], command: str) -> str:
    """The page; each cell is before and after."""
    lines = ["# A step's path on the host, on stand-in CUDA devices", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += ["", "| method | config | parameters | " + " | ".join(COLUMNS.values()) + " |"]
    lines += ["|---|---|---:|" + "---:|" * len(COLUMNS)]
    for name, row in rows.items():
        before, after = row["before"], row["after"]
        cells = [_cell(before[key], after[key]) for key in COLUMNS]
        lines.append(f"| {name} | {after['config']} | {after['parameters'] / 1e6:.0f} M | " + " | ".join(cells) + " |")
    lines += [
        "",
        "One step of one micro-batch of 16 as rank 0 of 8, bf16; before → after where they differ. Eager, but for the rows that",
        "say compiled, as a GPU runs by default, whose earlier state is eager. Kernels do nothing here: this shows what the host",
        "does and where it waits, not a GPU's speed. Launches are kernels and matrix products; bytes those that this rank gives",
        "to collectives on the device. CPU time is that of all threads but the loader's, the median of",
        f"{_KEPT} steps, and that after the backward pass, in which a GPU is idle if the host has just waited for it. Most of it",
        "is torch's own dispatch of what a GPU must compute. CPU times waver on a busy machine, by half or more; the other",
        f"columns are exact. The loader's are means of {_KEPT} steps, without decoder and augmenter.",
    ]
    return "\n".join(lines) + "\n"


def _cell(before: float, after: float) -> str:
    shown = [f"{value:.1f}" if isinstance(value, float) and value else f"{value:.0f}" for value in (before, after)]
    return shown[0] if shown[0] == shown[1] else f"{shown[0]} → {shown[1]}"


def main() -> None:
    """Entry of the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    o = parser.parse_args()
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    with TemporaryDirectory() as folder:
        before = process.overlay(o.before.resolve(), Path(folder))
        for name in o.methods:
            rows[name] = {"before": measure(name, before), "after": measure(name, process.ROOT)}
            if name in _COMPILED:
                compiled = measure(name, process.ROOT, "train.compile=true")
                rows[f"{name}, compiled"] = {"before": rows[name]["before"], "after": compiled}
            print(name, rows[name], file=sys.stderr, flush=True)
            write(o.out, _COMMAND, partial(render, rows), {"methods": rows})


if __name__ == "__main__":
    main()
