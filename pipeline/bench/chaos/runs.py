"""Runs that are disturbed: started and started again with the commands that a user would type."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.bench.chaos.observe import Progress
from pipeline.errors import TrainingError

_STUCK = 1800.0  # seconds without a new step after which a run is given up
PATIENCE = 600.0  # seconds in which anything that a run is expected to do has happened on a busy machine


def failed(problem: str) -> TrainingError:
    """The error of a run that does not do what its user expects."""
    return TrainingError(problem, where="fovea bench chaos", hint="See the logs of the run, kept in failed/ beside the rows")


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE, pause: float = 0.02) -> None:
    """Wait for a condition.

    Raises:
        TrainingError: it does not hold in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise failed(f"{what} within {seconds:.0f} s")
        time.sleep(pause)


def kill(process: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; whether the process was there. Zero and less, to ``kill(2)`` whole groups of processes, are never there."""
    if process <= 0:
        return False
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


def kill_group(group: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal to a group of processes; whether it was there, see :func:`kill`."""
    if group <= 0:
        return False
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def children(parent: int) -> list[int]:
    """Running descendants of a process; none of process 0, which every first process has as its parent."""
    descendants: list[int] = []
    if parent <= 0:
        return descendants
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
            if fields and int(fields[1]) == parent and fields[0] != "Z":
                descendants += [int(entry.name), *children(int(entry.name))]
    return descendants


class Run:
    """A run and its user, who types the same command again until it has ended.

    Args:
        directory: run directory.
        command: the command.
        environment: its variables.
        steps: length of the run.
        log: file that its output is appended to.

    Attributes:
        progress: when which step was complete.
        launches: monotonic times at which the command was typed.
    """

    def __init__(
        self, directory: Path, command: Sequence[str], environment: Mapping[str, str], steps: int, log: Path, root: Path
    ) -> None:
        self.directory, self.command, self.steps, self.log, self.root = directory, list(command), steps, log, root
        self.environment = dict(environment)
        self.progress = Progress(directory)
        self.launches: list[float] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Type the command."""
        if not self.launches:
            self.progress.start()
        self.launches.append(time.monotonic())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def running(self) -> bool:
        """Whether the command, or the job, has not ended."""
        return self.process is not None and self.process.poll() is None

    def ended(self) -> bool:
        """Whether the run has come to its end; waits until its command has."""
        assert self.process is not None
        self.watch(lambda: not self.running())
        code = self.process.wait()
        until(lambda: not self.alive(), "a rank was left behind", 120)
        return code == 0 and self.finished()

    def watch(self, over: Callable[[], object]) -> None:
        """Wait for a condition as long as the run advances.

        Raises:
            TrainingError: it has not advanced for too long.
        """
        while not over():
            advanced = self.progress.times[-1][0] if self.progress.times else 0.0
            if time.monotonic() > max(advanced, self.launches[-1]) + _STUCK:
                raise failed(f"it neither ends nor advances within {_STUCK:.0f} s")
            time.sleep(0.02)

    def finished(self) -> bool:
        """Whether the checkpoint of the last step is there."""
        return (self.directory / "checkpoints" / f"step_{self.steps:09d}" / "manifest.json").is_file()

    def reach(self, step: int) -> None:
        """Wait until so many steps are complete.

        Raises:
            TrainingError: the run ends before, or does not get there.
        """
        until(lambda: self.progress.steps >= step or not self.running(), f"step {step} was not reached", pause=0.005)
        if self.progress.steps < step:
            raise failed(f"it ended before step {step}")

    def attempt(self) -> int:
        """Number of the newest attempt."""
        return max((int(path.name[8:]) for path in (self.directory / "logs").glob("attempt-*")), default=0)

    def rank(self, number: int, attempt: int | None = None) -> int:
        """Process of a rank of an attempt, by default of the newest; 0 if it is not running."""
        folder = self.directory / "logs" / f"attempt-{self.attempt() if attempt is None else attempt:04d}" / "pulse"
        try:
            process = int(json.loads((folder / f"rank-{number}.json").read_text())["pid"])
        except (OSError, ValueError, KeyError):
            return 0
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return 0
        return 0 if state == "Z" else process

    def alive(self) -> list[int]:
        """Running processes of the ranks of the newest attempt."""
        pulses = (self.directory / "logs" / f"attempt-{self.attempt():04d}" / "pulse").glob("rank-*.json")
        return [process for pulse in pulses if (process := self.rank(int(pulse.stem.removeprefix("rank-"))))]

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        return max((self.directory / "checkpoints").glob("step_*"), default=None)

    def reported(self) -> str:
        """The last line of output that reports an error; empty if there is none."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return next((line.strip() for line in reversed(text.splitlines()) if "error: " in line), "")

    def close(self) -> None:
        """End whatever still runs."""
        for process in self.alive():
            kill(process)
        if self.process is not None and self.process.poll() is None:
            kill(self.process.pid)
            self.process.wait()
        if self.progress.ident is not None:
            self.progress.close()
