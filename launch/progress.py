"""Progress display of a run: one live line on a terminal, plain lines otherwise."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from pipeline.masking import shown
from pipeline.runtime.clock import clock

_SHOWN = {"linear/top1", "logistic/top1", "segmentation/miou", "zeroshot/top1"}


class Lasting:
    """Wrapper of a standard stream that survives the loss of its terminal or pipe; output is then dropped and the run continues.

    Args:
        stream: standard output or error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, unless the stream is closed."""
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        """Flush, unless the stream is closed."""
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_terminal() -> None:
    """Replace both standard streams of this process by :class:`Lasting`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))


class Silent:
    """Progress logger of all ranks but 0; prints only messages."""

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scored: int) -> None:
        """No output."""

    def say(self, text: str) -> None:
        """Write to this rank's log."""
        print(shown(text), flush=True)


class Lines:
    """Progress logger that prints plain lines.

    Args:
        global_batch: samples per step, for the remaining time.
        out: output stream instead of the standard output.
    """

    def __init__(self, global_batch: int, out: TextIO | None = None) -> None:
        self._batch, self._rate, self._out = global_batch, 0.0, out

    def _text(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scored: int) -> str:
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        left = clock((total - done) * self._batch / max(self._rate, 1e-9))
        shown = {name: value for name, value in scores.items() if name.startswith("knn/") or name in _SHOWN}
        knn = "".join(f"  {name} {value:.3f}" for name, value in shown.items())
        old = f" (of step {scored})" if knn and scored != done else ""
        return f"step {done:>6}/{total}  loss {loss:8.4f}  {rate:6.0f} img/s{knn}{old}  left {left}"

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scored: int) -> None:
        """Print one line."""
        print(shown(self._text(done, total, loss, rate, scores, scored)), file=self._out, flush=True)

    def say(self, text: str) -> None:
        """Print one line."""
        print(shown(text), file=self._out, flush=True)


class Live(Lines):
    """Progress logger that rewrites a single line, with a bar if the width allows; messages scroll above it."""

    def __init__(self, global_batch: int) -> None:
        super().__init__(global_batch)
        self._shown = 0.0

    def _line(self, done: int, total: int, text: str) -> str:
        columns = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be rewritten
        width = max(min(24, columns - len(text) - 1), 0)
        full = round(width * done / max(total, 1))
        return f"{'━' * full}{'╌' * (width - full)} {text}".lstrip()[:columns]

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scored: int) -> None:
        """Rewrite the line, at most ten times per second."""
        text = self._text(done, total, loss, rate, scores, scored)
        if time.monotonic() - self._shown > 0.1 or done == total:
            self._shown = time.monotonic()
            sys.stdout.write(f"\r\x1b[2K{self._line(done, total, text)}" + ("\n" if done == total else ""))
            sys.stdout.flush()

    def say(self, text: str) -> None:
        """Print above the line."""
        sys.stdout.write(f"\r\x1b[2K{text}\n")
        sys.stdout.flush()


class Kept:
    """Progress logger that also appends plain lines to a file, unless the disk fails.

    Args:
        inner: the progress logger that displays.
        path: the file, appended to.
        global_batch: samples per step.
    """

    def __init__(self, inner: Lines, path: Path, global_batch: int) -> None:
        self._inner = inner
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file: TextIO = path.open("a")
        except OSError:
            file = StringIO()
        self._copy = Lines(global_batch, file)

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scored: int) -> None:
        """Display and write to the file."""
        self._inner.step(done, total, loss, rate, scores, scored)
        with contextlib.suppress(OSError):
            self._copy.step(done, total, loss, rate, scores, scored)

    def say(self, text: str) -> None:
        """Display and write to the file."""
        self._inner.say(text)
        with contextlib.suppress(OSError):
            self._copy.say(text)


def watcher(rank: int, global_batch: int, keep: Path | None = None) -> Silent | Lines | Kept:
    """The progress logger for this rank and output; ``keep`` is a log file, for runs whose output is not logged otherwise."""
    if rank:
        return Silent()
    shown = Live(global_batch) if sys.stdout.isatty() else Lines(global_batch)
    return Kept(shown, keep, global_batch) if keep else shown


class Clocked:
    """Progress logger that also records the seconds of training in ``train_seconds.json``, beside the attempt's logs.

    Args:
        inner: the progress logger that displays.
        path: the file.
        seconds: returns the seconds of all steps so far, including those of earlier attempts that count.
    """

    def __init__(self, inner: Silent | Lines | Kept, path: Path, seconds: Callable[[], float]) -> None:
        self._inner, self._path, self._seconds, self._began = inner, path, seconds, seconds()

    def step(self, done: int, total: int, loss: float, rate: float, scores: dict[str, float], scored: int) -> None:
        """Display and record the time."""
        self._inner.step(done, total, loss, rate, scores, scored)
        self.note(done)

    def say(self, text: str) -> None:
        """Display."""
        self._inner.say(text)

    def note(self, step: int) -> None:
        """Write the file, unless the disk fails."""
        with contextlib.suppress(OSError):
            temporary = self._path.with_suffix(".new")
            temporary.write_text(json.dumps({"began": self._began, "seconds": self._seconds(), "step": step}))
            temporary.replace(self._path)
