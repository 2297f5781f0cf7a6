"""How far a long work is: a bar on a terminal, a line for each finished piece elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pipeline.masking import printable


class Tell(Protocol):
    """Told of progress: pieces done, pieces in all, and a line if there is something worth one."""

    def __call__(self, done: int, total: int, line: str = "") -> None:
        """Tells it."""


@contextmanager
def meter(what: str) -> Iterator[Tell]:
    """Shows the progress of a work while the block runs.

    Args:
        what: the work, in a word or two.

    Yields:
        What to call with (done, total, line). On a terminal it moves a bar with the time left, elsewhere it prints the line.
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
