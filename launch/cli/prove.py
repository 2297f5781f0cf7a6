"""``fovea prove``: checks that everything works on this machine, and measures how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.bench import command_line
from launch.cli.choices import Device
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.bench.prove.stage import Check


def prove(device: Device, stages: str, first: str, toy: bool | None, photos: Path | None, out: Path) -> int:
    """Run the stages; returns the exit code, 1 if one failed.

    Raises:
        ConfigError: an unknown stage, no CUDA device, or the page to continue is not one of this command.
    """
    from pipeline.bench.prove import runner
    from pipeline.bench.prove.stage import STAGES, Setup

    chosen = list(STAGES) if stages == "all" else [name.strip() for name in stages.split(",") if name.strip()]
    for option, names in (("--stages", chosen), ("--from", [first] if first else [])):
        if unknown := [name for name in names if name not in STAGES]:
            raise ConfigError(f"no stage is called {unknown[0]!r}", where=option, hint=f"Choose from {', '.join(STAGES)}")
    if first:
        chosen = [name for name in chosen if STAGES.index(name) >= STAGES.index(first)]
    if not chosen:
        raise ConfigError("no stage is selected", where="--stages", hint=f"Choose from {', '.join(STAGES)}")
    if device == Device.CUDA and not _has_cuda():
        raise ConfigError("no CUDA device is available", where="--device", hint="Choose --device cpu, which checks at toy size")
    small = device == Device.CPU if toy is None else toy
    setup = Setup(device.value, small, out.with_name(f"{out.name}-files"), photos)
    done = {one.stage: one for one in runner.saved(out, setup)} if first or stages != "all" else {}
    if kept := [name for name in STAGES if name in done and name not in chosen]:
        print(f"kept from {out}.json: {', '.join(kept)}")
    for outcome in runner.run(setup, chosen, show=_show):
        done[outcome.stage] = outcome
        message = "ok" if outcome.ok else outcome.error or f"{sum(check.ok is False for check in outcome.checks)} checks failed"
        print(f"{outcome.stage:8} {outcome.seconds:6.0f} s  {message}", flush=True)
        runner.save(out, [done[name] for name in STAGES if name in done], setup, command_line())
    failed = [name for name in STAGES if name in done and not done[name].ok]
    print(f"{'failed: ' + ', '.join(failed) if failed else 'all checks passed'}; the page is {out}.md")
    return 1 if failed else 0


def _has_cuda() -> bool:
    """Whether there is a CUDA device; true if torch cannot be imported, which the first stage reports."""
    try:
        import torch
    except Exception:
        return True
    return torch.cuda.is_available()


def _show(stage: str, seconds: float, check: Check) -> None:
    mark = {True: "ok    ", False: "FAILED", None: "      "}[check.ok]
    bar = f"  ({check.bar})" if check.bar else ""
    print(f"{stage:8} {seconds:6.0f} s  {mark} {check.name}: {check.figure}{bar}", flush=True)
