"""The live view of ``fovea status --watch``: one run, or all runs of a directory, redrawn in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.slurm import status as standing
from launch.terminal import Terminal
from pipeline.errors import ConfigError, FoveaError
from pipeline.runtime.run_directory import RunDirectory
from pipeline.untrusted import printable, shown

_COLORS = {"finished": "green", "running": "cyan", "waiting": "yellow", "stopped": "yellow", "failed": "red", "unknown": "red"}


def watch_run(run: RunDirectory, interval: float) -> None:
    """Show a run until it has ended; away from a terminal its status is printed again and again.

    Args:
        run: the run directory.
        interval: seconds between two looks.
    """

    def look() -> tuple[RenderableType, str, bool]:
        one = standing.status(run)
        over = one.state in ("finished", "stopped", "failed")
        return view(one), shown(standing.table(one)), over

    _watch(look, interval)


def watch_runs(lines: Callable[[], list[str]], interval: float) -> None:
    """Show the lines of a list of runs until Ctrl-C.

    Args:
        lines: reads them.
        interval: seconds between two looks.
    """

    def look() -> tuple[RenderableType, str, bool]:
        rows = [printable(line) for line in lines()]
        text = Text("\n".join(rows), no_wrap=True, overflow="ellipsis")
        return Panel(text, title=time.strftime("%H:%M:%S"), title_align="right"), "\n".join(rows), False

    _watch(look, interval)


def view(one: standing.Status) -> RenderableType:
    """A run as a panel: state and reason, progress bar, the lines of ``fovea status``.

    Args:
        one: its status.
    """
    first, *rest = shown(standing.table(one)).splitlines()
    rows = Table.grid(expand=True)
    rows.add_row(Text(first.partition(": ")[2], style=_COLORS.get(one.state, "")))
    if one.steps:
        rows.add_row(ProgressBar(total=one.steps, completed=min(one.step, one.steps)))
    rows.add_row(Text("\n".join(line.removeprefix("  ") for line in rest)))
    title = printable(Path(one.run).name)
    return Panel(rows, title=Text(title), subtitle=time.strftime("%H:%M:%S"), subtitle_align="right")


def _watch(look: Callable[[], tuple[RenderableType, str, bool]], interval: float) -> None:
    """Draw until it is over. An error that may pass, such as a record that is just being written, is shown, and no end."""
    console = Terminal(highlight=False)
    if not console.is_terminal:
        while True:
            _, text, over = look()
            print(text, flush=True)
            if over:
                return
            time.sleep(interval)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        seen = False
        while True:
            over = False
            try:
                drawn, _, over = look()
                seen = True
            except ConfigError as error:
                if not seen:
                    raise
                drawn = Text(shown(str(error)), style="red")
            except FoveaError as error:
                drawn = Text(shown(str(error)), style="red")
            live.update(drawn, refresh=True)
            if over:
                return
            time.sleep(interval)
