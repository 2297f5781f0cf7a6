"""Trains one of several runs as a process of its own: for ``fovea reproduce`` and ``fovea sweep``."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Sequence

from launch.local import tied
from pipeline.runtime.interpreter import alone_environment, module_command
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import read_json


def outcome(run: RunDirectory) -> dict[str, object]:
    """How the last attempt of a run ended; empty if it has not."""
    file = run.path / "outcome.json"
    document = read_json(file) if file.exists() else {}
    return document if isinstance(document, dict) else {}


def finished(run: RunDirectory) -> bool:
    """Whether a run has done all of its steps."""
    return outcome(run).get("stop") == "FINISHED"


def train(config: str, overrides: Sequence[str]) -> tuple[int, float]:
    """Run ``fovea train`` to its end; it dies with this process. Ctrl-C reaches it too: it saves and stops.

    Args:
        config: name or file of the config.
        overrides: texts ``KEY=VALUE``, among them ``run.directory``.

    Returns:
        Its exit code, and the CPU minutes of its processes.
    """
    before = _cpu_seconds()
    argv = module_command("launch.cli.main", "train", config, *overrides)
    with subprocess.Popen(tied(argv), env=alone_environment(), stdin=subprocess.DEVNULL) as process:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                continue
    return code, (_cpu_seconds() - before) / 60


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
