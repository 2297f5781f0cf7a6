"""Progress displays: the loggers of a run, on stdout, and the bar of a command that works through pieces, on stderr.

On a terminal both rewrite one line; otherwise they print plain lines.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Protocol, TextIO

from pipeline.masking import printable, shown
from pipeline.runtime.clock import clock

_SHOWN = {"linear/top1", "logistic/top1", "segmentation/miou", "zeroshot/top1"}


class MessageLogger:
    """Progress logger of all ranks but 0; prints only messages."""

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None:
        """No output."""

    def log(self, text: str) -> None:
        """Write to this rank's log."""
        print(shown(text), flush=True)


class LineLogger:
    """Progress logger that prints plain lines.

    Args:
        global_batch: samples per step, for the remaining time.
        out: output stream instead of the standard output.
    """

    def __init__(self, global_batch: int, out: TextIO | None = None) -> None:
        self._batch, self._rate, self._out = global_batch, 0.0, out

    def _text(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> str:
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        left = clock((total - done) * self._batch / max(self._rate, 1e-9))
        shown = {name: value for name, value in scores.items() if name.startswith("knn/") or name in _SHOWN}
        knn = "".join(f"  {name} {value:.3f}" for name, value in shown.items())
        old = f" (of step {scores_step})" if knn and scores_step != done else ""
        return f"step {done:>6}/{total}  loss {loss:8.4f}  {rate:6.0f} img/s{knn}{old}  left {left}"

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None:
        """Print one line."""
        print(shown(self._text(done, total, loss, rate, scores, scores_step)), file=self._out, flush=True)

    def log(self, text: str) -> None:
        """Print one line."""
        print(shown(text), file=self._out, flush=True)


class LiveLineLogger(LineLogger):
    """Progress logger that rewrites a single line, with a bar if the width allows; messages scroll above it."""

    def __init__(self, global_batch: int) -> None:
        super().__init__(global_batch)
        self._shown = 0.0

    def _line(self, done: int, total: int, text: str) -> str:
        columns = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be rewritten
        width = max(min(24, columns - len(text) - 1), 0)
        full = round(width * done / max(total, 1))
        return f"{'━' * full}{'╌' * (width - full)} {text}".lstrip()[:columns]

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None:
        """Rewrite the line, at most ten times per second."""
        text = self._text(done, total, loss, rate, scores, scores_step)
        if time.monotonic() - self._shown > 0.1 or done == total:
            self._shown = time.monotonic()
            sys.stdout.write(f"\r\x1b[2K{self._line(done, total, text)}" + ("\n" if done == total else ""))
            sys.stdout.flush()

    def log(self, text: str) -> None:
        """Print above the line."""
        sys.stdout.write(f"\r\x1b[2K{text}\n")
        sys.stdout.flush()


class FileLogger:
    """Progress logger that also appends plain lines to a file, unless the disk fails.

    Args:
        inner: the progress logger that displays.
        path: the file, appended to.
        global_batch: samples per step.
    """

    def __init__(self, inner: LineLogger, path: Path, global_batch: int) -> None:
        self._inner = inner
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file: TextIO = path.open("a")
        except OSError:
            file = StringIO()
        self._copy = LineLogger(global_batch, file)

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None:
        """Display and write to the file."""
        self._inner.step(done, total, loss, rate, scores, scores_step)
        with contextlib.suppress(OSError):
            self._copy.step(done, total, loss, rate, scores, scores_step)

    def log(self, text: str) -> None:
        """Display and write to the file."""
        self._inner.log(text)
        with contextlib.suppress(OSError):
            self._copy.log(text)


def progress_logger(rank: int, global_batch: int, keep: Path | None = None) -> MessageLogger | LineLogger | FileLogger:
    """The progress logger for this rank and output; ``keep`` is a log file, for runs whose output is not logged otherwise."""
    if rank:
        return MessageLogger()
    shown = LiveLineLogger(global_batch) if sys.stdout.isatty() else LineLogger(global_batch)
    return FileLogger(shown, keep, global_batch) if keep else shown


class TimeLogger:
    """Progress logger that also records the seconds of training in ``train_seconds.json``, beside the attempt's logs.

    Args:
        inner: the progress logger that displays.
        path: the file.
        seconds: returns the seconds of all steps so far, including those of earlier attempts that count.
    """

    def __init__(self, inner: MessageLogger | LineLogger | FileLogger, path: Path, seconds: Callable[[], float]) -> None:
        self._inner, self._path, self._seconds, self._began = inner, path, seconds, seconds()

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scores_step: int) -> None:
        """Display and record the time."""
        self._inner.step(done, total, loss, rate, scores, scores_step)
        self.note(done)

    def log(self, text: str) -> None:
        """Display."""
        self._inner.log(text)

    def note(self, step: int) -> None:
        """Write the file, unless the disk fails."""
        with contextlib.suppress(OSError):
            temporary = self._path.with_suffix(".new")
            temporary.write_text(json.dumps({"began": self._began, "seconds": self._seconds(), "step": step}))
            temporary.replace(self._path)


# ---- commands that work through pieces ------------------------------------------------------------------------------------


class ProgressCallback(Protocol):
    """Progress callback: pieces done, total pieces, and a line of text if there is one."""

    def __call__(self, done: int, total: int, line: str = "") -> None:
        """Report progress."""


@contextmanager
def progress_bar(what: str) -> Iterator[ProgressCallback]:
    """Show the progress of a task within the context.

    Args:
        what: the task, in a word or two.

    Yields:
        Callback (done, total, line). On a terminal it moves a bar with the remaining time, otherwise it prints the line.
    """
    if not sys.stderr.isatty():

        def write(done: int, total: int, line: str = "") -> None:
            if line:
                print(f"{done}/{total} {printable(line)}", file=sys.stderr, flush=True)

        yield write
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from launch.terminal import Terminal

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}", markup=False),
    )
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, line="")

        def move(done: int, total: int, line: str = "") -> None:
            bar.update(task, completed=done, total=total)
            if line:
                bar.update(task, line=printable(line))

        yield move
