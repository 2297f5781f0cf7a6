"""Progress of a long task on stderr: a bar on a terminal, otherwise a line per finished piece."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from pipeline.masking import printable


class Tell(Protocol):
    """Progress callback: pieces done, total pieces, and a line of text if there is one."""

    def __call__(self, done: int, total: int, line: str = "") -> None:
        """Report progress."""


@contextmanager
def meter(what: str) -> Iterator[Tell]:
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
