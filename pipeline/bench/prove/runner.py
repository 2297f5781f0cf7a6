"""Runs the stages, each in a process of its own, and writes the results after each of them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bench.prove.stage import STAGES, Check, Setup, Stage
from pipeline.bench.report import write
from pipeline.errors import ConfigError
from pipeline.masking import printable
from pipeline.runtime.interpreter import alone_environment, module_command
from pipeline.untrusted import parse_json

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>: the signal that a process gets when its parent ends
_LIMIT = 900.0  # seconds for one stage
_MARK = "\x1efovea-prove "  # precedes each result on standard output, where libraries print too


@dataclass
class Outcome:
    """Result of one stage.

    Attributes:
        stage: its name.
        seconds: wall time of its process.
        checks: its rows.
        error: why it ended early, or empty.
    """

    stage: str
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended by itself and no check failed."""
        return not self.error and not any(check.ok is False for check in self.checks)


def run(
    setup: Setup, stages: Sequence[str], *, show: Callable[[str, float, Check], None], limit: float = _LIMIT
) -> Iterator[Outcome]:
    """Run stages one after the other; a failure does not end the others.

    Args:
        setup: device and size; each stage gets a directory of its own below ``setup.folder``.
        stages: names, of :data:`STAGES`.
        show: called with the stage, its elapsed seconds and each result.
        limit: time limit of a stage, seconds.
    """
    for name in stages:
        yield _stage(setup, name, show, limit)


def _stage(setup: Setup, name: str, show: Callable[[str, float, Check], None], limit: float) -> Outcome:
    outcome, began = Outcome(name), time.perf_counter()
    setup.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=setup.folder, prefix=f"{name}-") as folder:
        options = {
            "device": setup.device,
            "toy": setup.toy,
            "folder": folder,
            "photos": str(setup.photos) if setup.photos else None,
            "parent": os.getpid(),
        }
        environment = alone_environment() | ({"CUDA_VISIBLE_DEVICES": ""} if setup.device == "cpu" else {})
        log = setup.folder / f"{name}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                module_command("pipeline.bench.prove.runner", name, json.dumps(options)),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
            with _ended_after(process, limit):
                for line in process.stdout or ():
                    _, marked, text = line.partition(_MARK)
                    if marked:
                        check = _check(parse_json(text))
                        outcome.checks.append(check)
                        show(name, time.perf_counter() - began, check)
            code = process.wait()
        outcome.seconds = time.perf_counter() - began
        if outcome.seconds >= limit:
            outcome.error = f"not finished after {limit:.0f} s"
        elif code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            outcome.error = f"code {code}: {printable(lines[-1] if lines else 'no message')[:300]} (see {log})"
    return outcome


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Kill the stage and the processes it started after a time limit, or if an exception leaves the block."""

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException:
        end()
        raise
    finally:
        timer.cancel()


def save(stem: Path, outcomes: Sequence[Outcome], setup: Setup, command: str) -> str:
    """Write the results as JSON and Markdown; returns the page."""
    document = {"device": setup.device, "toy": setup.toy, "stages": [asdict(one) for one in outcomes]}
    return write(stem, command, lambda machine, _: markdown(outcomes, setup, machine, command), document)


def saved(stem: Path, setup: Setup) -> list[Outcome]:
    """Read an earlier result of the same device and size; empty if there is none.

    Raises:
        ConfigError: the file is not a result of this command.
    """
    file = stem.with_name(f"{stem.name}.json")
    if not file.exists():
        return []
    try:
        document = parse_json(file.read_text())
        if (document["device"], document["toy"]) != (setup.device, setup.toy):
            return []
        outcomes = [
            Outcome(str(one["stage"]), float(one["seconds"]), [_check(row) for row in one["checks"]], str(one["error"]))
            for one in document["stages"]
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            "is not a result of fovea prove", where=str(file), hint="Choose another --out, or delete the file"
        ) from error
    return [outcome for outcome in outcomes if outcome.stage in STAGES]


def _check(row: Mapping[str, Any]) -> Check:
    ok = row["ok"]
    return Check(str(row["name"]), str(row["figure"]), str(row["bar"]), ok if isinstance(ok, bool) else None)


def markdown(outcomes: Sequence[Outcome], setup: Setup, machine: dict[str, str], command: str) -> str:
    """Render the page."""
    size = "toy size: speeds mean nothing" if setup.toy else "full size"
    lines = [f"# Proof on {setup.device}, {size}", "", f"`{command}`", "", *(f"- {n}: {v}" for n, v in machine.items()), ""]
    lines += ["| stage | result | s | rows | failed |", "|---|---|---:|---:|---:|"]
    for one in outcomes:
        failed = sum(check.ok is False for check in one.checks)
        lines.append(f"| {one.stage} | {'ok' if one.ok else 'FAILED'} | {one.seconds:.0f} | {len(one.checks)} | {failed} |")
    for one in outcomes:
        lines += ["", f"## {one.stage}", ""]
        if one.error:
            lines += [f"Ended early: {_cell(one.error)}", ""]
        lines += ["| check | result | required | |", "|---|---|---|---|"]
        for check in one.checks:
            result = {True: "ok", False: "**FAILED**", None: ""}[check.ok]
            lines.append(f"| {_cell(check.name)} | {_cell(check.figure)} | {_cell(check.bar)} | {result} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|").replace("\n", " ")


def main(name: str, document: str) -> None:
    """Entry of a stage's process: print each result."""
    options: dict[str, Any] = json.loads(document)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != options["parent"]:  # it died before
        os._exit(1)
    photos = Path(options["photos"]) if options["photos"] else None
    setup = Setup(options["device"], options["toy"], Path(options["folder"]), photos)
    assert name in STAGES
    stage: Stage = importlib.import_module(f"pipeline.bench.prove.{name}")
    for check in stage.checks(setup):
        print(f"\n{_MARK}{json.dumps(asdict(check))}", flush=True)
    sys.stderr.flush()
    os._exit(0)  # interpreter shutdown takes seconds


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
