"""Writes a measurement as JSON, as Markdown, and as a table on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pipeline.bench.data import Result, rows
from pipeline.bench.machine import describe

_FED = ("read", "plan", "hand over")  # cost besides decoding and augmenting


def markdown(result: Result, machine: dict[str, str], command: str) -> str:
    """Render the result page: description, host, the table, and the time by stage."""
    lines = ["# Processor time of a picture on its way to training", ""]
    lines += [f"`{command}`", "", *(f"- {name}: {value}" for name, value in {**machine, **result.options}.items())]
    if result.milliseconds:
        lines += [
            "",
            "Views of DINOv2 (2 of 224 and 8 of 96 pixels). Ratios compare equal tasks: hue with hue, none with none.",
            "",
        ]
        lines += ["| path | CPU ms a picture | torchvision takes | DALI's reader takes |", "|---|---:|---:|---:|"]
        lines += [f"| {name} | {cost:.2f} | {ratios[0]} times | {ratios[1]} times |" for name, cost, ratios in rows(result)]
    if result.stages:
        total = sum(result.stages.values())
        fed = sum(result.stages.get(stage, 0.0) for stage in _FED)
        lines += ["", "Ours without hue, by stage:", "", "| stage | CPU ms a picture | share |", "|---|---:|---:|"]
        lines += [f"| {stage} | {cost:.3f} | {cost / total:.1%} |" for stage, cost in result.stages.items()]
        lines += ["", f"Reading and feeding ({', '.join(_FED)}) take {fed / total:.1%}."]
    if result.rates:
        lines += ["", "| on the GPU | |", "|---|---:|", *(f"| {name} | {rate:,.2f} |" for name, rate in result.rates.items())]
    return "\n".join(lines) + "\n"


def save(result: Result, path: Path, command: str) -> list[Path]:
    """Write ``path`` with the extensions ``.json`` and ``.md``, and return both."""
    machine = describe()
    path.parent.mkdir(parents=True, exist_ok=True)
    document, page = path.with_suffix(".json"), path.with_suffix(".md")
    document.write_text(json.dumps({"command": command, "machine": machine, **asdict(result)}, indent=2) + "\n")
    page.write_text(markdown(result, machine, command))
    return [document, page]
